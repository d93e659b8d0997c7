"""Flags, tables and 8-bit floats: the forms agree, and each does what it says."""

import math

import pytest
import torch
from helpers.operators import agree, agree_in_triton, needs_compiler, needs_triton, run

from hf_actcompress.ops.bitmaps import decode_table, pack_flags
from hf_actcompress.ops.cpu.forms import two_valued
from hf_actcompress.ops.float8 import FORMATS
from hf_actcompress.ops.ranges import tensor_scale

SHAPES = [(256,), (3, 5, 128), (7, 1000), (13,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def unpacked(bits, shape):
    return decode_table(bits, torch.tensor([0, 1], dtype=torch.uint8), list(shape), 1).bool()


@needs_compiler
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
@pytest.mark.parametrize("high", [None, 0.5])
def test_flags(high, dtype):
    for shape in SHAPES:
        x = torch.randn(shape)
        x.view(-1)[:5] = torch.tensor([-0.25, 0.5, math.nan, math.inf, -math.inf])
        x = x.to(dtype) if dtype != torch.bool else x > 0
        bits = agree("pack_flags", x, -0.25, high)
        expected = ~(x <= -0.25) if high is None else (x > -0.25) & (x < high)
        assert torch.equal(unpacked(bits, shape), expected)


@needs_compiler
@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_tables(bits, dtype):
    table = (torch.randn(2**bits) * 9).to(dtype) if dtype != torch.uint8 else torch.arange(2**bits, dtype=dtype)
    for shape in SHAPES:
        n = math.prod(shape)
        codes = torch.randint(0, 256, ((n // 128 * 128 + -(-(n % 128) // 8) * 8) * bits // 8,), dtype=torch.uint8)
        y = agree("decode_table", codes, table, list(shape), bits)
        assert set(y.view(-1).tolist()) <= set(table.tolist())


def test_two_values():
    mask = (torch.rand(7, 1000) > 0.3).float() / 0.7
    value = float(mask.max())
    assert torch.equal(unpacked(two_valued(mask, value), (7, 1000)), mask != 0)
    mask[3, 3] = 0.1
    assert two_valued(mask, value) is None


@pytest.mark.parametrize("format", FORMATS)
def test_float8_is_that_of_torch(format):
    x = torch.randn(40, 50) * torch.logspace(-6, 2, 50)
    scale = tensor_scale(x, torch.finfo(FORMATS[format]).max, True, None)
    codes, _ = run("encode_float8", "reference", x, scale, format)
    expected = (x / scale[1]).to(FORMATS[format])
    assert torch.equal(codes, expected.view(torch.uint8).view(-1))
    assert torch.equal(run("decode_float8", "reference", codes, scale, [40, 50], x.dtype, format)[0],
                       expected.float() * scale[1])  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_float8_in_cpp(format, dtype):
    for shape in (*SHAPES, (7, 6000)):  # several pieces
        x = (torch.randn(shape) * 3).to(dtype)
        x.view(-1)[:3] = torch.tensor([math.nan, 0.0, -1e-30])
        scale = torch.tensor([0.0, 0.37])
        codes, _ = run("encode_float8", "reference", x, scale, format)
        y = agree("decode_float8", codes, scale, list(shape), dtype, format)
        assert torch.equal(agree("roundtrip_float8", x, scale, format).nan_to_num(7), y.nan_to_num(7))
    view = x.view(60, 700).T[::2]
    expected = y.view(60, 700).T[::2].nan_to_num(7)
    assert torch.equal(agree("roundtrip_float8", view, scale, format).nan_to_num(7), expected)
    agree("decode_float8", torch.arange(256, dtype=torch.uint8), scale, [256], dtype, format)


@needs_triton
@pytest.mark.parametrize("format", FORMATS)
def test_float8_in_triton(format):
    x = torch.cat([torch.randn(40) * 10.0**e for e in range(-9, 3)]).view(-1, 5)
    scale = tensor_scale(x, torch.finfo(FORMATS[format]).max, True, None)
    codes, _ = agree_in_triton("encode_float8", x, scale, format)
    agree_in_triton("decode_float8", codes, scale, list(x.shape), torch.float32, format)
    agree_in_triton("roundtrip_float8", x, scale, format)
    every = torch.arange(256, dtype=torch.uint8)
    agree_in_triton("decode_float8", every, torch.tensor([0.0, 0.5]), [256], torch.float32, format)


@needs_triton
def test_flags_and_tables_in_triton():
    for shape in SHAPES[1:]:
        x = torch.randn(shape)
        for high in (None, 1.0):
            agree_in_triton("pack_flags", x, 0.0, high)
        codes, _ = agree_in_triton("pack_flags", x > 0, 0.0, None)
        agree_in_triton("decode_table", codes, torch.randn(2), list(shape), 1)


def test_flags_of_nothing():
    assert pack_flags(torch.empty(0), 0.0, None).numel() == 0
