"""Compiled kernels give the bits of eager ones; a new shape compiles nothing; without a compiler all still works."""

import logging
import shutil

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops import compiled
from hf_actcompress.ops.compiled import Kernel, compiler_for

needs_compiler = pytest.mark.skipif(compiler_for("cpu") is None, reason="there is no C++ compiler on this machine")


def outcome(spec, xs, monkeypatch, policy):
    """Payloads, decoded tensors and roundtrips of some calls in a row, under one policy."""
    monkeypatch.setenv(compiled.VARIABLE, policy)
    codec, found = parse_codec(spec), []
    states = [codec.init_state("s", 1), codec.init_state("s", 1)]
    for x in xs:
        payload = codec.encode(x, states[0])
        found += [*payload.tensors.values(), codec.decode(payload), codec.roundtrip(x, states[1])]
    return found


def tensors(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator) * (1 + i)).to(dtype) for i, shape in enumerate(shapes)]


SPECS = [
    ("block:bits=4", torch.float32), ("block:bits=3,round=stochastic", torch.bfloat16),
    ("block:bits=12,equalize=none", torch.float16), ("uniform:bits=8", torch.float32),
    ("uniform:bits=2,round=stochastic", torch.float16), ("uniform:bits=10", torch.bfloat16),
    ("sort:bits=8", torch.float32), ("sort:bits=12", torch.bfloat16), ("kmeans:bits=4", torch.float32),
    ("kmeans:bits=3", torch.float16),
    ("rotated:bits=2", torch.bfloat16), ("topk:ratio=0.2", torch.float32),
    ("topk:ratio=0.1|uniform:bits=4", torch.bfloat16), ("float8", torch.float32),
    ("float8:format=e5m2", torch.float16),
    ("trellis:bits=2", torch.float32),
]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(("spec", "dtype"), SPECS, ids=[f"{s}-{str(d)[6:]}" for s, d in SPECS])
def test_compiled_and_eager_bits_agree(monkeypatch, caplog, spec, dtype):
    """Shapes with a tail, with a broken period, and of images."""
    xs = tensors(dtype, (600, 384), (1031, 100), (8, 32, 12, 12))
    eager = outcome(spec, xs, monkeypatch, "0")
    with caplog.at_level(logging.WARNING):
        fast = outcome(spec, xs, monkeypatch, "1")
    assert not [r.message for r in caplog.records if "could not be compiled" in r.message]
    for slow, quick in zip(eager, fast, strict=True):
        assert slow.dtype == quick.dtype and torch.equal(slow, quick)


@needs_compiler
def test_a_new_shape_compiles_nothing_new(monkeypatch):
    from torch._dynamo.utils import counters

    spec = "block:bits=6,round=stochastic"
    outcome(spec, tensors(torch.float32, (600, 256)), monkeypatch, "1")
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    outcome(spec, tensors(torch.float32, (900, 256), (40, 30, 384), (300, 768), (5000, 32)), monkeypatch, "1")
    assert counters["stats"]["unique_graphs"] == before


def add(x, y=None, *, by):
    return (x + by if y is None else x + y,)


def test_short_runs_stay_eager(monkeypatch):
    """Elements are counted, not seconds: the same run always compiles at the same call."""
    monkeypatch.delenv(compiled.VARIABLE, raising=False)
    monkeypatch.setattr(compiled, "PATIENCE", 3 * compiled.SMALLEST)
    kernel, x = Kernel(add), torch.zeros(compiled.SMALLEST)
    assert [kernel.choose(x, by=1) for _ in range(3)] == [None] * 3
    assert kernel.choose(x[1:], by=1) is None, "small tensors are not worth a call"
    assert kernel.choose(x, by=2) is None, "other static arguments are another function"
    assert (kernel.choose(x, by=1) is not None) == (compiler_for("cpu") is not None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 bytes")])
def test_memory_that_ran_out_is_reported_as_that(monkeypatch, caplog, error):
    def compile_(fn, **options):
        def run(*args, **static):
            raise error

        return run

    monkeypatch.setenv(compiled.VARIABLE, "1")
    monkeypatch.setattr(compiled, "compiler_for", lambda device: "here")
    monkeypatch.setattr(torch, "compile", compile_)
    kernel, x = Kernel(add), torch.ones(4, 8)
    with pytest.raises(type(error)):
        kernel.choose(x, by=1)(x)
    assert not caplog.records and kernel.choose(x, by=1) is not None


def test_without_a_compiler_everything_runs_eager_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setenv(compiled.VARIABLE, "1")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(compiled, "_said", set())
    kernel, x = Kernel(add), torch.zeros(4, 8)
    with caplog.at_level(logging.INFO):
        assert kernel.choose(x, by=1) is None and kernel.choose(x, by=2) is None
    assert [r.message for r in caplog.records] == ["no compiler for cpu was found: codecs run eager"]


def test_a_function_that_cannot_be_compiled_runs_eager(monkeypatch, caplog):
    def branches(x, *, by):
        return (x + by if float(x.sum()) > 0 else x - by,)  # fullgraph refuses this

    monkeypatch.setenv(compiled.VARIABLE, "1")
    monkeypatch.setattr(compiled, "compiler_for", lambda device: "here")
    kernel, x = Kernel(branches), torch.ones(4, 8)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(kernel.choose(x, by=1)(x)[0], x + 1)
        assert kernel.choose(x, by=1) is None
    assert sum("branches could not be compiled" in r.message for r in caplog.records) == 1


def test_the_policy_is_checked(monkeypatch):
    monkeypatch.setenv(compiled.VARIABLE, "yes")
    with pytest.raises(ValueError, match="HF_ACTCOMPRESS_COMPILE='yes' is not known: 0 never compiles"):
        parse_codec("uniform:bits=8").roundtrip(torch.randn(4, 8))
