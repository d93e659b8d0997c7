"""The C++ library: compiled once into a private folder, and nothing depends on it but time."""

import ctypes
import subprocess

import pytest
import torch
from helpers.operators import needs_compiler

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops.cpu import library
from hf_actcompress.ops.library import kernels_allowed


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (library._target, library._library):
        cached.cache_clear()
    yield tmp_path
    for cached in (library._target, library._library):
        cached.cache_clear()


@pytest.mark.parametrize("value", ["relative/cache", "~/cache", ""])
def test_a_cache_folder_that_is_no_absolute_path_is_passed_over(cache, value, monkeypatch):
    """Else the library would lie in whatever folder a run was started from."""
    monkeypatch.chdir(cache)
    monkeypatch.setenv("HOME", str(cache / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    (cache / "home").mkdir()
    assert library._private_folder() == (cache / "home" / ".cache" / "hf_actcompress").resolve()
    assert [path.name for path in cache.iterdir()] == ["home"]


def test_without_a_compiler_nothing_changes(cache, monkeypatch, caplog):
    codec, x = parse_codec("block:bits=4"), torch.randn(64, 256)
    monkeypatch.setattr(library, "_compiler", lambda: None)
    found = codec.encode(x)
    codec.encode(x)
    assert [r.message.split(" (")[0] for r in caplog.records] == ["There is no C++ compiler"]
    monkeypatch.undo()
    library._library.cache_clear()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in codec.encode(x).tensors.items())


def test_a_compiler_that_fails_is_reported_once(cache, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise subprocess.CalledProcessError(1, "g++", stderr=b"no such file")

    monkeypatch.setattr(library, "_compiler", lambda: "g++")
    monkeypatch.setattr(library.subprocess, "run", broken)
    for _ in range(2):
        parse_codec("block:bits=4").encode(torch.randn(64, 256))
    assert sum("no such file" in record.message for record in caplog.records) == 1


@needs_compiler
def test_it_is_compiled_once_into_a_private_folder(cache, caplog, monkeypatch):
    # One small source is enough to see it; all of them take half a minute.
    source = cache / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(library, "SOURCES", [source])
    monkeypatch.setattr(library, "SIGNATURES", {"answer": (ctypes.c_int,)})
    assert library.library_for(100) is None and not (cache / "hf_actcompress").exists()  # small tensors gain nothing
    assert library.library_for(library.SMALLEST).answer() == 42
    made = sorted(path.suffix for path in (cache / "hf_actcompress").iterdir())
    assert made == [".lock", ".so"] and (cache / "hf_actcompress").stat().st_mode & 0o777 == 0o700
    assert [r.message for r in caplog.records if r.message.startswith("Compiling")] and len(caplog.records) == 1
    library._library.cache_clear()
    assert library.library_for(100) is None and library.library_for(library.SMALLEST) is not None
    assert len(caplog.records) == 1  # not compiled again
    library._target().chmod(0o666)
    library._library.cache_clear()
    assert library._library() is None and "others may change it" in caplog.records[-1].message


@pytest.mark.parametrize("kind", ["link", "file", "open parent", "another user"])
def test_a_place_that_others_may_change_is_not_used(cache, caplog, monkeypatch, kind):
    folder = cache / "hf_actcompress"
    if kind == "link":
        (cache / "elsewhere").mkdir()
        folder.symlink_to(cache / "elsewhere")
    elif kind == "file":
        folder.write_text("")
    elif kind == "open parent":
        cache.chmod(0o777)
    else:
        monkeypatch.setattr(library.os, "getuid", lambda: 12345)
    assert library._target() is None and library._target() is None
    assert len(caplog.records) == 1 and "no private folder" in caplog.records[0].message


def test_the_variable(monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_KERNELS", "yes")
    with pytest.raises(ValueError, match="HF_ACTCOMPRESS_KERNELS='yes' is not known: 1"):
        kernels_allowed()
    monkeypatch.setenv("HF_ACTCOMPRESS_KERNELS", "0")
    called = []
    monkeypatch.setattr(library, "_library", lambda: called.append(1))
    parse_codec("block:bits=4").encode(torch.randn(64, 256))
    assert not called
