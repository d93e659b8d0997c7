"""Masks in one bit, against numpy and comparisons of whole tensors."""

import math

import pytest
import torch

from hf_actcompress.ops.packing import COLS
from hf_actcompress.saved.masks import pack_flags, pack_two_values, unpack_flags

SHAPES = [(1,), (7,), (128,), (3, 5, 43), (1000, 129), (2, 70_000)]
WAYS = [(kernels, dtype) for kernels in "01" for dtype in (torch.float32, torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("policy", "dtype"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flags_come_back(shape, dtype, policy, monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_KERNELS", policy)
    x = torch.randn(shape).to(dtype) * 3
    x.view(-1)[0] = math.nan
    bits = pack_flags(x)
    assert bits.dtype == torch.uint8 and bits.numel() <= -(-x.numel() // 8)
    assert torch.equal(unpack_flags(bits, shape, 0.0, 1.0, dtype), (~(x <= 0)).to(dtype))
    inside = unpack_flags(pack_flags(x, -1.0, 2.0), shape, -7.0, 3.0, dtype)
    assert torch.equal(inside, torch.where((x > -1) & (x < 2), 3.0, -7.0).to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_bools_come_back(shape):
    x = torch.rand(shape) > 0.3
    assert torch.equal(unpack_flags(pack_flags(x), shape, 0, 1, torch.bool), x)


@pytest.mark.parametrize(("policy", "dtype"), WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("other", "value"), [
    (0.0, 1.0), (0.0, -2.0), (0.0, 1 / 0.9), (0.0, -math.inf), (-3.0, 2.0), (-math.inf, 1.0),
])  # fmt: skip
def test_masks_of_two_values_are_found(shape, other, value, dtype, policy, monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_KERNELS", policy)
    x = torch.where(torch.rand(shape) > 0.1, value, other).to(dtype)
    x.view(-1)[-1] = value
    bits, low, high = pack_two_values(x)
    assert torch.equal(unpack_flags(bits, shape, low, high, x.dtype), x)


@pytest.mark.parametrize("policy", ["0", "1"])
def test_other_tensors_are_not(policy, monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_KERNELS", policy)
    for values in ([0.0, 2.0, 1.0], [-1.0, 0.0, 1.0], [math.nan, 1.0], [math.nan] * 2):
        assert pack_two_values(torch.tensor(values)) is None
    rare = torch.zeros(100_000)
    rare[50_001] = -math.inf  # a second value where the sample does not look
    assert pack_two_values(rare)[1:] == (-math.inf, 0.0)
    rare[50_003] = 1.0
    assert pack_two_values(rare) is None
    many = torch.zeros(100_000)
    many[1::2] = 1
    assert pack_two_values(many)[1:] == (0.0, 1.0)
    for odd in (0.5, math.nan):
        many[50_001] = odd  # where the sample does not look
        assert pack_two_values(many) is None


def test_bits_are_those_of_other_codes():
    """In rows of 128: bit i of byte j of 16 is element 16 i + j."""
    x = torch.randn(256)
    bits = pack_flags(x).view(2, 16)
    for i in range(8):
        assert torch.equal((bits >> i) & 1, (x.view(2, 8, 16)[:, i] > 0).to(torch.uint8))
    assert COLS == 128
