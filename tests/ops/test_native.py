"""Kernels written by hand give the bits of those that they stand beside, or step aside."""

import math
import subprocess

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops.compiled import Kernel, compiler_for
from hf_actcompress.ops.cpu import native
from hf_actcompress.saved.masks import pack_flags, unpack_flags
from hf_actcompress.saved.slopes import decode_slopes, encode_slopes

needs_compiler = pytest.mark.skipif(compiler_for("cpu") is None, reason="no C++ compiler")
SHAPES = [(256,), (64, 768), (3, 5, 128), (2, 3, 40, 50), (7, 1000)]


@pytest.fixture(autouse=True)
def _nothing_else_is_compiled(monkeypatch):
    """Every combination of bits and dtypes would take seconds; tests/ops/test_compiled.py is about that."""
    monkeypatch.setattr(Kernel, "choose", lambda *args, **kwargs: None)


@pytest.fixture
def used(monkeypatch):
    """Counts the calls that the library took."""
    calls, plain = [], native._ready

    def ready(*args):
        found = plain(*args)
        if found is not None:
            calls.append(args)
        return found

    monkeypatch.setattr(native, "_ready", ready)
    return calls


@pytest.fixture
def decoded(monkeypatch):
    """Which functions of the library gave values of codes."""
    calls = []

    def noting(name, plain):
        def noted(*args, **kwargs):
            found = plain(*args, **kwargs)
            if found is not None:
                calls.append(name)
            return found

        return noted

    for name in ("group_decode", "table_decode"):
        monkeypatch.setattr(native, name, noting(name, getattr(native, name)))
    return calls


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("options", ["", ",round=stochastic", ",equalize=none,group=256", ",group=48"])
def test_same_payload(bits, options, dtype, used, monkeypatch):
    codec = parse_codec(f"block:bits={bits}{options}")
    for i, shape in enumerate(SHAPES):
        torch.manual_seed(i)
        x = (torch.randn(shape) * torch.rand(shape) * 3 - 1).to(dtype)
        x.view(-1)[:3] = torch.tensor([0.0, -0.0, 50.0])
        payloads, decoded = [], []
        for policy in ("0", "1"):
            monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", policy)
            payloads.append(codec.encode(x, codec.init_state("here")))
            decoded.append(codec.roundtrip(x, codec.init_state("here")))
        for name, tensor in payloads[0].tensors.items():
            assert torch.equal(tensor, payloads[1].tensors[name]), (shape, name)
        assert torch.equal(decoded[0], decoded[1]) and torch.equal(decoded[0], codec.decode(payloads[0]))
    assert used


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("options", ["", ",equalize=none,group=256", ",group=48", ",dim=channel"])
def test_groups_are_decoded_to_the_same_bits(bits, options, dtype, decoded, monkeypatch):
    codec = parse_codec(f"block:bits={bits}{options}")
    for shape in [*SHAPES, (7, 2304), (1, 16)]:
        x = (torch.randn(shape) * torch.rand(shape) * 3 - 1).to(dtype)
        payload = codec.encode(x)
        found = []
        for policy in ("0", "1"):
            monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", policy)
            found.append(codec.decode(payload))
        assert torch.equal(*found) and found[1].dtype == dtype and found[1].shape == shape
    assert "group_decode" in decoded


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [*(f"kmeans:bits={b}" for b in (1, 2, 3, 4, 5, 6, 8)), "sort:bits=8,splits=6"])
def test_tables_are_looked_up_to_the_same_bits(spec, dtype, decoded, monkeypatch):
    codec = parse_codec(spec)
    for shape in SHAPES:
        payload = codec.encode(torch.randn(shape).to(dtype))
        found = []
        for policy in ("0", "1"):
            monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", policy)
            found.append(codec.decode(payload))
        assert torch.equal(*found) and found[1].dtype == dtype
    assert decoded


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.bool])
def test_masks_come_back_the_same_way(dtype, decoded, monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
    for shape in [(256,), (3, 5, 128), (7, 1000), (13,)]:
        x = torch.rand(shape) > 0.3
        low, high = (0, 1) if dtype == torch.bool else (-0.5, 1 / 0.9)
        expected = torch.where(x, torch.tensor(high, dtype=dtype), torch.tensor(low, dtype=dtype))
        assert torch.equal(unpack_flags(pack_flags(x), shape, low, high, dtype), expected)
    assert decoded or dtype == torch.float16  # which has no kernel of its own


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("high", [None, 0.5])
def test_flags_are_those_of_the_comparison(high, dtype, used, monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
    x = torch.randn(9, 1000).to(dtype)
    x.view(-1)[:5] = torch.tensor([-0.25, 0.5, float("nan"), float("inf"), -float("inf")])
    expected = ~(x <= -0.25) if high is None else (x > -0.25) & (x < high)
    found = unpack_flags(pack_flags(x, -0.25, high), (9, 1000), 0, 1, torch.bool)
    assert torch.equal(found, expected) and used


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reach_is_the_largest_bound(dtype, monkeypatch):
    scales = torch.randn(1001, 2).to(dtype)
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "0")
    assert native.reach(scales, 3.0) is None
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
    expected = (scales[:, 0].float().abs() + scales[:, 1].float() * 3).amax()
    assert native.reach(scales, 3.0) == expected
    scales[7, 1] = float("inf")
    assert native.reach(scales, 3.0) == float("inf")
    scales[900, 0] = float("nan")
    assert math.isnan(native.reach(scales, 3.0))


@needs_compiler
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_slopes_are_decoded_to_the_same_bits(bits, decoded, monkeypatch):
    codes = encode_slopes(torch.randn(7, 1000), "gelu", bits, None)
    found = []
    for policy in ("0", "1"):
        monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", policy)
        found.append(decode_slopes(codes, (7, 1000), torch.float32, "gelu", bits))
    assert torch.equal(*found) and decoded


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("options", ["", ",round=stochastic", ",group=64"])
def test_images_with_channels_last_are_not_moved(bits, options, dtype, used, monkeypatch):
    codec = parse_codec(f"block:bits={bits}{options}")
    for shape in [(5, 32, 16, 8), (2, 16, 32, 32)]:
        x = (torch.randn(shape) * torch.rand(shape[1], 1, 1) - 1).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "0")
        y = codec.decode(codec.encode(x, codec.init_state("here")))
        monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
        used.clear()
        z = codec.roundtrip(x, codec.init_state("here"))
        assert torch.equal(y, z) and z.stride() == x.stride()
        assert [args[0].shape[-1] for args in used] == [codec.group or 128]  # the one call, on the tensor as it lies
    # 49 pixels are no whole groups, 8 channels no cache line: these take the other way.
    for shape in [(5, 32, 7, 7), (5, 8, 16, 8)]:
        x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        z = codec.roundtrip(x, codec.init_state("here"))
        assert torch.equal(codec.decode(codec.encode(x, codec.init_state("here"))), z)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_values_that_cannot_be_coded_are_seen(value, monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
    x = torch.randn(64, 256)
    x[33, 100] = value
    assert parse_codec("block:bits=4").encode(x).raw
    if value != 1e30:
        assert encode_slopes(x, "gelu", 3, None) is None


@needs_compiler
@pytest.mark.parametrize("spec", ["block:bits=7", "block:bits=12", "block:bits=4,group=40"])
def test_what_it_does_not_take_goes_the_other_way(spec, used, monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
    parse_codec(spec).encode(torch.randn(64, 240))
    assert not used


def test_without_a_compiler_nothing_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
    codec, x = parse_codec("block:bits=4"), torch.randn(64, 256)
    expected = codec.encode(x)

    def broken(*args, **kwargs):
        raise subprocess.CalledProcessError(1, "g++", stderr=b"no such file")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.subprocess, "run", broken)
    native._target.cache_clear()
    native._library.cache_clear()
    try:
        found = codec.encode(x)
        assert native._library() is None
    finally:
        native._target.cache_clear()
        native._library.cache_clear()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "auto")
    for cached in (native._target, native._library):
        cached.cache_clear()
    yield tmp_path
    for cached in (native._target, native._library):
        cached.cache_clear()


@needs_compiler
def test_it_is_compiled_once_into_a_private_folder(cache, caplog, monkeypatch):
    x = torch.randn(1024, 1, 128)
    monkeypatch.setattr(native, "_served", 0)
    monkeypatch.setattr(native, "PATIENCE", 2 * x.numel())
    assert [native._ready(x, 4) for _ in range(2)] == [None] * 2  # a short run does not wait for a compiler
    assert native._ready(x[:8], 4) is None  # small tensors gain nothing
    assert native._ready(x.half(), 4) is None
    assert native._ready(x.view(512, 2, 128).transpose(0, 1), 4) is None
    assert not list((cache / "hf_actcompress").iterdir()) and native._ready(x, 4) is not None
    library, = (cache / "hf_actcompress").iterdir()
    assert library == native._target() and (cache / "hf_actcompress").stat().st_mode & 0o777 == 0o700
    assert [r.message for r in caplog.records if r.message.startswith("Compiling")] and len(caplog.records) == 1
    library.chmod(0o666)
    native._library.cache_clear()
    assert native._library() is None and "others may change it" in caplog.records[-1].message


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
        monkeypatch.setattr(native.os, "getuid", lambda: 12345)
    assert native._target() is None and native._target() is None
    assert len(caplog.records) == 1 and "no private folder" in caplog.records[0].message


def test_counts_are_checked_before_a_pointer_is_handed_out(monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
    codes = torch.zeros(8, 1, 64, dtype=torch.uint8)
    if native._library() is None:
        pytest.skip("no native kernels")
    with pytest.raises(ValueError, match="scales: 14 numbers .* need 16"):
        native.group_decode(codes, torch.zeros(7, 1, 2), None, None, bits=4, dtype=torch.float32)
    for table, given in ((torch.zeros(15), codes), (torch.zeros(16), codes.to(torch.int8))):
        with pytest.raises(ValueError, match="the table: 1[56] numbers"):
            native.table_decode(given, table, bits=4)
