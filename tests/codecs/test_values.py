"""Values and memory that are out of the ordinary: views of every kind, constants, tiny and subnormal numbers."""

import dataclasses

import pytest
import torch
from helpers.specs import SPECS

from hf_actcompress.codecs import codec_names, parse_codec

# One of each kind, wrappers included.
KINDS = [
    "identity", "uniform:bits=8", "block:bits=4", "block:bits=4,dim=channel", "block:bits=4,round=stochastic",
    "rotated:bits=4,prototypes=3", "trellis:bits=2", "sort:bits=8", "sort:bits=4,quantiles=exact", "kmeans:bits=4",
    "topk:ratio=0.2", "lowrank:rank=4", "float8", "topk:ratio=0.2|uniform:bits=4", "ef+block:bits=4",
    "delta+block:bits=4",
]  # fmt: skip
KINDS += [name for name in codec_names() if not any(spec.partition(":")[0] == name for spec in KINDS)]


def roundtrips(spec, x):
    codec = parse_codec(spec)
    states = [None if codec.traits.per_sample else codec.init_state("a", 0) for _ in range(2)]
    return codec.decode(codec.encode(x, states[0])), codec.roundtrip(x, states[1])


def views():
    """Name -> a tensor whose memory is not in the order of its shape, or not its own."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 512, generator=g)
    return {
        "transposed": x.T, "permuted": x.view(1, 64, 32, 16).flatten(2).transpose(1, 2),
        "channels last": x.view(2, 16, 32, 32).contiguous(memory_format=torch.channels_last),
        "expanded": x[:1].expand(600, 512), "every other": x[:, ::2], "flipped": x.flip(0)[::2],
        "negative": torch._neg_view(x),
        "imaginary": torch.randn(64, 64, dtype=torch.complex64, generator=g).conj().imag,
        "0-dim": x[0, 0], "one": x[:1, :1], "half": x.T.half(), "bf16": x.T.bfloat16(), "fp64": x.T.double(),
    }  # fmt: skip


@pytest.mark.parametrize("spec", KINDS)
def test_a_view_gives_the_values_of_its_contiguous_copy(spec):
    for name, x in views().items():
        copy = x.resolve_neg().contiguous()
        if "rank" in spec and x.shape[-1:] < (4,) or spec.endswith("channel") and x.dim() < 2:
            continue
        expected = roundtrips(spec, copy)[0]
        for y in roundtrips(spec, x):
            assert torch.equal(y, expected) and y.shape == x.shape and y.dtype == x.dtype, (spec, name)


@pytest.mark.parametrize("spec", [
    "block:bits=2", "block:bits=2,round=stochastic", "rotated:bits=2", "rotated:bits=4", "trellis:bits=2",
    "uniform:bits=2", "sort:bits=4,splits=1", "kmeans:bits=2", "float8",
])  # fmt: skip
def test_a_constant_stays_one(spec):
    for shape in ((), (1,), (3, 5), (8, 128), (2, 16, 4, 4), (4, 64, 14, 14), (600, 40), (2, 5, 6, 9)):
        for value in (3.3, -0.7, 1e-30, 2.0**40):
            x = torch.full(shape, value)
            for y in roundtrips(spec, x):
                torch.testing.assert_close(y, x, rtol=5e-3, atol=0)


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.startswith("ef+")])
def test_tiny_values_are_no_worse_than_zeros(spec):
    """Normal numbers near the bottom of fp32, and subnormal ones below."""
    x = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
    usual = max(float((y - x).norm() / x.norm()) for y in roundtrips(spec, x))
    # Between 0 and the least normal number stochastic rounding can only throw a coin.
    for size in (1e-30, 1e-34, 1e-37, *(() if "stochastic" in spec else (1e-39, 1e-42))):
        small = x * size
        for y in roundtrips(spec, small):
            error = float((y.double() - small.double()).norm() / small.double().norm())
            assert error <= max(1.01, 1.1 * usual), (size, error)


@pytest.mark.parametrize("spec", [s for s in KINDS if not s.startswith(("ef+", "delta")) and "|" not in s])
def test_a_payload_that_was_cut_is_refused(spec):
    """Nothing reads beyond what is there."""
    codec = parse_codec(spec)
    for shape in ((600, 40), (2, 16, 4, 4), (7,)):
        if codec.name == "lowrank" and len(shape) == 1:
            continue
        payload = codec.encode(torch.randn(shape), codec.init_state("a", 0))
        for name, tensor in payload.tensors.items():
            for wrong in (tensor.reshape(-1)[:-1], tensor.reshape(-1).repeat(2)):
                bad = dataclasses.replace(payload, tensors={**payload.tensors, name: wrong})
                with pytest.raises(ValueError, match=f"'{name}' of a payload.*damaged|positions"):
                    codec.decode(bad)
        with pytest.raises(ValueError, match="has nothing"):
            codec.decode(dataclasses.replace(payload, tensors={"other": torch.zeros(1)}))


def test_positions_beyond_the_tensor_are_refused():
    for ratio, change in ((0.01, lambda p: p + 10**6), (0.01, lambda p: -p - 1), (0.3, lambda p: p | 255)):
        codec = parse_codec(f"topk:ratio={ratio}")
        payload = codec.encode(torch.randn(100, 40))
        tensors = {**payload.tensors, "positions": change(payload.tensors["positions"])}
        with pytest.raises(ValueError, match="positions of a payload do not fit"):
            codec.decode(dataclasses.replace(payload, tensors=tensors))


@pytest.mark.parametrize("spec", ["rotated:bits=8", "rotated:bits=2", "trellis:bits=4", "float8:format=e5m2"])
def test_the_relative_error_does_not_depend_on_the_magnitude(spec):
    """Squares of small values underflow, and so does a maximum that is divided by the largest code."""
    codec, x = parse_codec(spec), torch.randn(64, 128, generator=torch.Generator().manual_seed(0))

    def error(size):
        scaled = (x.double() * size).float()
        return float((codec.roundtrip(scaled).double() - scaled.double()).norm() / scaled.double().norm())

    for size in (1e-18, 1e-24, 1e-30, 1e-35):
        assert error(size) == pytest.approx(error(1.0), rel=0.1), size
