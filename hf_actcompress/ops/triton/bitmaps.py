"""Flags, slopes and tables (ops/bitmaps.py), packed in rows of 128."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import COLS, codes_nbytes
from .common import (
    ELEMENTS,
    FLOATS,
    is_wide,
    launch,
    load_packed,
    load_packed_tail,
    rounded,
    store_packed,
    store_tail_plane,
    tail_places,
)

ROWS = ELEMENTS // COLS
FUNCTIONS = ("gelu", "gelu_tanh", "silu")


@triton.jit
def _flag(x, at, inside, low, high, BOTH: tl.constexpr):  # noqa: ANN001, ANN202, N803
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    there = (y < high) & (y > low) if BOTH else ~(y <= low)
    return (there & inside).to(tl.int32)


@triton.jit
def _flags(x, bits, n, low, high, ROWS: tl.constexpr, BOTH: tl.constexpr, WIDE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    full = n // 128
    program = tl.program_id(0)
    if program * ROWS < full:
        _flag_rows(x, bits, full, program, low, high, ROWS, BOTH, WIDE)
    else:
        _flag_tail(x, bits, n, full, low, high, BOTH)


@triton.jit
def _flag_rows(x, bits, full, program, low, high, ROWS: tl.constexpr, BOTH: tl.constexpr, WIDE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    row = program * ROWS + tl.arange(0, ROWS)
    if WIDE:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < full)[:, None] & (tl.arange(0, 128) >= 0)[None, :]
    code = _flag(x, row[:, None] * 128 + tl.arange(0, 128)[None, :], inside, low, high, BOTH)
    store_packed(code, bits + row * 16, row < full, ROWS, 128, 1)


@triton.jit
def _flag_tail(x, bits, n, full, low, high, BOTH: tl.constexpr):  # noqa: ANN001, ANN202, N803
    first = full.to(tl.int64) * 128
    left = (n - first).to(tl.int32)
    width = (left + 7) // 8 * 8
    c = tail_places(width, 128, 1)
    code = _flag(x, first + tl.minimum(c, left - 1), c < left, low, high, BOTH)
    store_tail_plane(code, bits + full.to(tl.int64) * 16, width, 128, 1, 1)


@triton.jit
def _slope(x, FUNCTION: tl.constexpr):  # noqa: ANN001, ANN202, N803
    if FUNCTION == 0:
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(x * x * -0.5) * 0.3989422804014327
    elif FUNCTION == 1:
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * u))
        y = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (0.7978845608028654 * (1.0 + 0.134145 * x * x))
    else:
        s = 1.0 / (1.0 + tl.exp(-x))
        y = s * (1.0 + x * (1.0 - s))
    return y


@triton.jit
def _slope_code(  # noqa: ANN202
    x, at, counter, inside, least, scale, key, nonfinite, BITS: tl.constexpr, FUNCTION: tl.constexpr,  # noqa: ANN001, N803
    COUNT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if COUNT:
        if tl.max(((y != y) & inside).to(tl.int32)) > 0:
            tl.atomic_add(nonfinite, 1)
    strange = y != y
    y = tl.where(y > 40.0, 40.0, tl.where(y < -40.0, -40.0, y))
    y = tl.where(strange, y, (_slope(y, FUNCTION) - least) * scale)
    return rounded(y, counter, key, (1 << BITS) - 1, True)


@triton.jit
def _slope_rows(  # noqa: ANN202
    x, codes, nonfinite, full, program, least, scale, key,  # noqa: ANN001
    ROWS: tl.constexpr, BITS: tl.constexpr, FUNCTION: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = program * ROWS + tl.arange(0, ROWS)
    if WIDE:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (row < full)[:, None] & (tl.arange(0, 128) >= 0)[None, :]
    code = _slope_code(x, at, at, inside, least, scale, key, nonfinite, BITS, FUNCTION, COUNT)
    store_packed(code, codes + row * (16 * BITS), row < full, ROWS, 128, BITS)


@triton.jit
def _slope_plane(  # noqa: ANN202
    x, base, first, left, width, least, scale, key,  # noqa: ANN001
    BITS: tl.constexpr, FUNCTION: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
):  # fmt: skip
    if BITS & WIDTH:
        c = tail_places(width, 128, WIDTH)
        code = _slope_code(x, first + tl.minimum(c, left - 1), first + c, c >= 0, least, scale, key, base, BITS,
                           FUNCTION, False)  # fmt: skip
        store_tail_plane(code, base, width, 128, BITS, WIDTH)


@triton.jit
def _slope_tail(  # noqa: ANN202
    x, codes, nonfinite, n, full, least, scale, key,  # noqa: ANN001
    BITS: tl.constexpr, FUNCTION: tl.constexpr, COUNT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    first = full.to(tl.int64) * 128
    left = (n - first).to(tl.int32)
    width = (left + 7) // 8 * 8
    if COUNT:
        col = tl.arange(0, 128)
        y = tl.load(x + first + tl.minimum(col, left - 1)).to(tl.float32)
        if tl.max((y != y).to(tl.int32)) > 0:
            tl.atomic_add(nonfinite, 1)
    base = codes + full.to(tl.int64) * (16 * BITS)
    _slope_plane(x, base, first, left, width, least, scale, key, BITS, FUNCTION, 8)
    _slope_plane(x, base, first, left, width, least, scale, key, BITS, FUNCTION, 4)
    _slope_plane(x, base, first, left, width, least, scale, key, BITS, FUNCTION, 2)
    _slope_plane(x, base, first, left, width, least, scale, key, BITS, FUNCTION, 1)


@triton.jit
def _slopes(  # noqa: ANN202
    x, codes, nonfinite, n, least, scale, key,  # noqa: ANN001
    ROWS: tl.constexpr, BITS: tl.constexpr, FUNCTION: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    full = n // 128
    program = tl.program_id(0)
    if program * ROWS < full:
        _slope_rows(x, codes, nonfinite, full, program, least, scale, key, ROWS, BITS, FUNCTION, COUNT, WIDE)
    else:
        _slope_tail(x, codes, nonfinite, n, full, least, scale, key, BITS, FUNCTION, COUNT)


@triton.jit
def _table(codes, table, out, n, ROWS: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    full = n // 128
    program = tl.program_id(0)
    if program * ROWS < full:
        _table_rows(codes, table, out, full, program, ROWS, BITS, WIDE)
    else:
        _table_tail(codes, table, out, n, full, BITS)


@triton.jit
def _table_rows(codes, table, out, full, program, ROWS: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    row = program * ROWS + tl.arange(0, ROWS)
    if WIDE:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < full)[:, None] & (tl.arange(0, 128) >= 0)[None, :]
    code = load_packed(codes + row * (16 * BITS), row < full, ROWS, 128, BITS)
    tl.store(out + row[:, None] * 128 + tl.arange(0, 128)[None, :], tl.load(table + code), mask=inside)


@triton.jit
def _table_tail(codes, table, out, n, full, BITS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    first = full.to(tl.int64) * 128
    left = (n - first).to(tl.int32)
    col = tl.arange(0, 128)[None, :]
    code = load_packed_tail(codes + full.to(tl.int64) * (16 * BITS), (left + 7) // 8 * 8, 128, BITS)
    tl.store(out + first + col, tl.load(table + code), mask=col < left)


def _programs(n: int) -> int:
    return -(-(n // COLS) // ROWS) + (n % COLS > 0)


def pack_flags(x, low, high):  # noqa: ANN001, ANN201
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dtype not in (*FLOATS, torch.uint8) or not x.numel():
        return NotImplemented
    x, n = x.contiguous(), x.numel()
    bits = x.new_empty(codes_nbytes(n, COLS, 1), dtype=torch.uint8)
    launch(_flags, _programs(n), x.device, x, bits, n, float(low), 0.0 if high is None else float(high), ROWS=ROWS,
           BOTH=high is not None, WIDE=is_wide(n))  # fmt: skip
    return bits


def encode_slopes(x, function, least, most, bits, key, nonfinite):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or bits > 8 or not x.numel():
        return NotImplemented
    x, n = x.contiguous(), x.numel()
    codes = x.new_empty(codes_nbytes(n, COLS, bits), dtype=torch.uint8)
    launch(
        _slopes, _programs(n), x.device, x, codes, nonfinite, n, least, (2**bits - 1) / (most - least), key,
        ROWS=ROWS, BITS=bits, FUNCTION=FUNCTIONS.index(function), COUNT=nonfinite is not None, WIDE=is_wide(n),
    )  # fmt: skip
    return codes


def decode_table(codes: Tensor, table: Tensor, shape: list[int], bits: int) -> Tensor:
    n = math.prod(shape)
    if bits > 8 or not n:
        return NotImplemented
    out = table.new_empty(shape)
    launch(_table, _programs(n), codes.device, codes.contiguous(), table.contiguous(), out, n, ROWS=ROWS, BITS=bits,
           WIDE=is_wide(n))  # fmt: skip
    return out
