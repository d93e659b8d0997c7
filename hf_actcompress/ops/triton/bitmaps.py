"""Flags and tables (ops/bitmaps.py), packed in rows of 128."""

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
    store_packed,
    store_tail_plane,
    tail_places,
)

ROWS = ELEMENTS // COLS


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


def decode_table(codes: Tensor, table: Tensor, shape: list[int], bits: int) -> Tensor:
    n = math.prod(shape)
    if bits > 8 or not n:
        return NotImplemented
    out = table.new_empty(shape)
    launch(_table, _programs(n), codes.device, codes.contiguous(), table.contiguous(), out, n, ROWS=ROWS, BITS=bits,
           WIDE=is_wide(n))  # fmt: skip
    return out
