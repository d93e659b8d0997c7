"""Groups to codes and back (ops/groups.py): one kernel each, every value read once and every code written once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import in_memory_order
from ..packing import codes_nbytes
from .common import (
    ELEMENTS,
    FLOATS,
    finite_scale,
    group_scale,
    is_wide,
    launch,
    load_packed,
    rounded,
    store_packed,
    takes,
    to_kind,
)


@triton.jit
def values(x, features, at, inside, count, inner, FEATURES: tl.constexpr):  # noqa: ANN001, ANN202, N803
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if FEATURES:
        f = (at // inner) % count
        mean = tl.load(features + f, mask=inside, other=0.0).to(tl.float32)
        root = tl.load(features + count + f, mask=inside, other=1.0).to(tl.float32)
        y = (y - mean) * tl.div_rn(1.0, root)
    return y


@triton.jit
def restored(y, features, at, inside, count, inner, FEATURES: tl.constexpr):  # noqa: ANN001, ANN202, N803
    if FEATURES:
        f = (at // inner) % count
        mean = tl.load(features + f, mask=inside, other=0.0).to(tl.float32)
        root = tl.load(features + count + f, mask=inside, other=1.0).to(tl.float32)
        y = y * root + mean
    return y


@triton.jit
def _scale_of(y, scale, TOP: tl.constexpr, GIVEN: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Minimum, step and inverse of each row [R, 1]."""
    if GIVEN:
        zero = tl.sum(y * 0.0, axis=1, keep_dims=True) * 0.0
        zero = tl.where(zero == 0.0, zero, 0.0)
        return finite_scale(zero + tl.load(scale), zero + tl.load(scale + 1), 1.0)
    strange = tl.max((~(tl.abs(y) <= 3.4028234663852886e38)).to(tl.int32), axis=1, keep_dims=True) > 0
    return group_scale(
        tl.min(y, axis=1, keep_dims=True), tl.max(y, axis=1, keep_dims=True), strange, TOP
    )  # fmt: skip


@triton.jit
def _store_odd(  # noqa: ANN202
    x, features, base, inside, lo, inverse, first, left, width, count, inner, key,  # noqa: ANN001
    LANES: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, STOCHASTIC: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One plane of the codes of groups [R] that begin at `first` and are packed in `width` columns, `left` of which
    are there.  The values are read once more, each beside those that it shares a byte with."""
    if BITS & WIDTH:
        FIELDS: tl.constexpr = 8 // WIDTH  # noqa: N806
        j = tl.arange(0, LANES // FIELDS)[None, None, :]
        field = tl.arange(0, FIELDS)[None, :, None]
        run = width * WIDTH // 8
        at = first[:, None, None] + tl.minimum(field * run + j, left - 1)
        z = values(x, features, at, inside[:, None, None] & (j >= 0) & (field >= 0), count, inner, FEATURES)
        place = first[:, None, None] + field * run + j
        code = rounded((z - lo[:, :, None]) * inverse[:, :, None], place, key, (1 << BITS) - 1, STOCHASTIC)
        part = ((code >> (BITS % WIDTH)) & ((1 << WIDTH) - 1)) << (field * WIDTH)
        where = base[:, None, None] + width * (BITS - BITS % (2 * WIDTH)) // 8 + j
        byte = tl.sum(part, axis=1, keep_dims=True)
        tl.store(where, byte.to(tl.uint8), mask=inside[:, None, None] & (j < run))


@triton.jit
def _load_odd(  # noqa: ANN202
    codes, base, inside, width, ROWS: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,  # noqa: ANN001, N803
):  # fmt: skip
    """Adds one plane of the codes [R, LANES] of groups that are packed in `width` columns."""
    if BITS & WIDTH:
        col, run = tl.arange(0, LANES)[None, :], width * WIDTH // 8
        field = col // run
        where = base[:, None] + width * (BITS - BITS % (2 * WIDTH)) // 8 + col - field * run
        byte = tl.load(where, mask=inside[:, None] & (col < width), other=0).to(tl.int32)
        codes += ((byte >> (field * WIDTH)) & ((1 << WIDTH) - 1)) << (BITS % WIDTH)
    return codes


@triton.jit
def _quantize_rows(  # noqa: ANN202
    x, features, scale, codes, scales, out, nonfinite, full, program, count, inner, key,  # noqa: ANN001
    COLS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, GIVEN: tl.constexpr,  # noqa: N803
    STOCHASTIC: tl.constexpr, ROUNDTRIP: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    TOP: tl.constexpr = (1 << BITS) - 1  # noqa: N806
    row = program * ROWS + tl.arange(0, ROWS)
    if WIDE:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < full)[:, None] & (tl.arange(0, COLS) >= 0)[None, :]
    y = values(x, features, at, inside, count, inner, FEATURES)
    lo, step, inverse = _scale_of(y, scale, TOP, GIVEN)
    code = rounded((y - lo) * inverse, at, key, TOP, STOCHASTIC)
    if ROUNDTRIP:
        y = restored(lo + code.to(tl.float32) * step, features, at, inside, count, inner, FEATURES)
        tl.store(out + at, to_kind(y, out), mask=inside)
    else:
        store_packed(code, codes + row * (COLS * BITS // 8), row < full, ROWS, COLS, BITS)
        if not GIVEN:
            pair = scales + 2 * row[:, None]
            tl.store(pair, lo.to(tl.bfloat16), mask=(row < full)[:, None])
            tl.store(pair + 1, step.to(tl.bfloat16), mask=(row < full)[:, None])
    if COUNT:
        strange = tl.sum(((step != step) & (row < full)[:, None]).to(tl.int32))
        if strange > 0:
            tl.atomic_add(nonfinite, strange.to(tl.int64))


@triton.jit
def _quantize_odd(  # noqa: ANN202
    x, features, scale, codes, scales, out, nonfinite, row, inside, left, width, count, inner, key,  # noqa: ANN001
    COLS: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, GIVEN: tl.constexpr,  # noqa: N803
    STOCHASTIC: tl.constexpr, ROUNDTRIP: tl.constexpr, COUNT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Groups `row` [R] whose size is no power of two, and a last, short one, which is filled with its last value up
    to a multiple of 8.

    left, width: values of a group, and columns in which it is packed.
    """
    TOP: tl.constexpr = (1 << BITS) - 1  # noqa: N806
    first = row.to(tl.int64) * COLS
    col = tl.arange(0, LANES)[None, :]
    at = first[:, None] + tl.minimum(col, left - 1)
    there = inside[:, None] & (col >= 0)
    y = values(x, features, at, there, count, inner, FEATURES)
    lo, step, inverse = _scale_of(y, scale, TOP, GIVEN)
    if ROUNDTRIP:
        code = rounded((y - lo) * inverse, first[:, None] + col, key, TOP, STOCHASTIC)
        y = restored(lo + code.to(tl.float32) * step, features, at, there, count, inner, FEATURES)
        tl.store(out + first[:, None] + col, to_kind(y, out), mask=inside[:, None] & (col < left))
    else:
        base = codes + row.to(tl.int64) * (COLS * BITS // 8)
        _store_odd(x, features, base, inside, lo, inverse, first, left, width, count, inner, key, LANES, BITS,
                   FEATURES, STOCHASTIC, 8)  # fmt: skip
        _store_odd(x, features, base, inside, lo, inverse, first, left, width, count, inner, key, LANES, BITS,
                   FEATURES, STOCHASTIC, 4)  # fmt: skip
        _store_odd(x, features, base, inside, lo, inverse, first, left, width, count, inner, key, LANES, BITS,
                   FEATURES, STOCHASTIC, 2)  # fmt: skip
        _store_odd(x, features, base, inside, lo, inverse, first, left, width, count, inner, key, LANES, BITS,
                   FEATURES, STOCHASTIC, 1)  # fmt: skip
        if not GIVEN:
            pair = scales + 2 * row.to(tl.int64)[:, None]
            tl.store(pair, lo.to(tl.bfloat16), mask=inside[:, None])
            tl.store(pair + 1, step.to(tl.bfloat16), mask=inside[:, None])
    if COUNT:
        strange = tl.sum(((step != step) & inside[:, None]).to(tl.int32))
        if strange > 0:
            tl.atomic_add(nonfinite, strange.to(tl.int64))


@triton.jit
def _quantize(  # noqa: ANN202
    x, features, scale, codes, scales, out, nonfinite, n, count, inner, key,  # noqa: ANN001
    COLS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr,  # noqa: N803
    GIVEN: tl.constexpr, STOCHASTIC: tl.constexpr, ROUNDTRIP: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    full = n // COLS
    program = tl.program_id(0)
    if program * ROWS >= full:
        left = (n - full.to(tl.int64) * COLS).to(tl.int32)
        last = full.to(tl.int64) + tl.arange(0, 1)  # names are of one branch: their types may not differ
        _quantize_odd(x, features, scale, codes, scales, out, nonfinite, last, last >= 0, left, (left + 7) // 8 * 8,
                      count, inner, key, COLS, LANES, BITS, FEATURES, GIVEN, STOCHASTIC, ROUNDTRIP, COUNT)
    elif LANES == COLS:
        _quantize_rows(x, features, scale, codes, scales, out, nonfinite, full, program, count, inner, key,
                       COLS, ROWS, BITS, FEATURES, GIVEN, STOCHASTIC, ROUNDTRIP, COUNT, WIDE)
    else:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        _quantize_odd(x, features, scale, codes, scales, out, nonfinite, row, row < full, COLS, COLS, count, inner,
                      key, COLS, LANES, BITS, FEATURES, GIVEN, STOCHASTIC, ROUNDTRIP, COUNT)


@triton.jit
def _dequantize_rows(  # noqa: ANN202
    codes, scales, features, out, full, program, count, inner,  # noqa: ANN001
    COLS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, SHARED: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = program * ROWS + tl.arange(0, ROWS)
    if WIDE:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < full)[:, None] & (tl.arange(0, COLS) >= 0)[None, :]
    pair = scales + (row[:, None] * 0 if SHARED else row[:, None] * 2)
    lo = tl.load(pair, mask=(row < full)[:, None], other=0.0).to(tl.float32)
    step = tl.load(pair + 1, mask=(row < full)[:, None], other=0.0).to(tl.float32)
    code = load_packed(codes + row * (COLS * BITS // 8), row < full, ROWS, COLS, BITS)
    y = restored(lo + code.to(tl.float32) * step, features, at, inside, count, inner, FEATURES)
    tl.store(out + at, to_kind(y, out), mask=inside)


@triton.jit
def _dequantize_odd(  # noqa: ANN202
    codes, scales, features, out, row, inside, left, width, count, inner,  # noqa: ANN001
    COLS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr,  # noqa: N803
    SHARED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    col = tl.arange(0, LANES)[None, :]
    at = row[:, None] * COLS + col
    pair = scales + (row[:, None] * 0 if SHARED else row[:, None] * 2)
    lo = tl.load(pair, mask=inside[:, None], other=0.0).to(tl.float32)
    step = tl.load(pair + 1, mask=inside[:, None], other=0.0).to(tl.float32)
    base, code = codes + row * (COLS * BITS // 8), tl.zeros((ROWS, LANES), tl.int32)
    code = _load_odd(code, base, inside, width, ROWS, LANES, BITS, 8)
    code = _load_odd(code, base, inside, width, ROWS, LANES, BITS, 4)
    code = _load_odd(code, base, inside, width, ROWS, LANES, BITS, 2)
    code = _load_odd(code, base, inside, width, ROWS, LANES, BITS, 1)
    there = inside[:, None] & (col < left)
    y = restored(lo + code.to(tl.float32) * step, features, at, there, count, inner, FEATURES)
    tl.store(out + at, to_kind(y, out), mask=there)


@triton.jit
def _dequantize(  # noqa: ANN202
    codes, scales, features, out, n, count, inner,  # noqa: ANN001
    COLS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr,  # noqa: N803
    SHARED: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    full = n // COLS
    program = tl.program_id(0)
    if program * ROWS >= full:
        left = (n - full.to(tl.int64) * COLS).to(tl.int32)
        last = full.to(tl.int64) + tl.arange(0, 1)
        _dequantize_odd(codes, scales, features, out, last, last >= 0, left, (left + 7) // 8 * 8, count, inner, COLS,
                        LANES, 1, BITS, FEATURES, SHARED)  # fmt: skip
    elif LANES == COLS:
        _dequantize_rows(codes, scales, features, out, full, program, count, inner, COLS, ROWS, BITS, FEATURES, SHARED,
                         WIDE)  # fmt: skip
    else:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        _dequantize_odd(codes, scales, features, out, row, row < full, COLS, COLS, count, inner, COLS, LANES, ROWS,
                        BITS, FEATURES, SHARED)  # fmt: skip


def _programs(n: int, cols: int) -> tuple[int, dict[str, int]]:
    """Programs; lanes of a group, a power of two, and groups of a program."""
    lanes = 1 << (cols - 1).bit_length()
    rows = max(1, ELEMENTS // lanes)
    return -(-(n // cols) // rows) + (n % cols > 0), {"COLS": cols, "LANES": lanes, "ROWS": rows}


def _run(x: Tensor, features, inner, scale, cols, bits, key, nonfinite, codes, scales, out) -> None:  # noqa: ANN001
    n = x.numel()
    programs, sizes = _programs(n, cols)
    launch(
        _quantize, programs, x.device, x, features, scale, codes, scales, out, nonfinite, n,
        0 if features is None else features.shape[1], inner, key or 0, **sizes, BITS=bits,
        FEATURES=features is not None, GIVEN=scale is not None, STOCHASTIC=key is not None, ROUNDTRIP=out is not None,
        COUNT=nonfinite is not None and scale is None, WIDE=is_wide(n),
    )  # fmt: skip


def quantize_groups(x, features, inner, scale, cols, bits, key, nonfinite):  # noqa: ANN001, ANN201
    if not takes(x, cols, bits):
        return NotImplemented
    x, n = x.contiguous(), x.numel()
    codes = x.new_empty(codes_nbytes(n, cols, bits), dtype=torch.uint8)
    scales = x.new_empty(0 if scale is not None else -(-n // cols), 2, dtype=torch.bfloat16)
    _run(x, features, inner, scale, cols, bits, key, nonfinite, codes, scales, None)
    return codes, scales


def roundtrip_groups(x, features, inner, scale, cols, bits, key, nonfinite):  # noqa: ANN001, ANN201
    if not takes(x, cols, bits):
        return NotImplemented
    if scale is not None and key is None and not x.is_contiguous():  # one scale, no counter: any order will do
        if in_memory_order(x).is_contiguous():
            out = torch.empty_like(x)
            _run(x, None, 1, scale, cols, bits, key, nonfinite, None, None, out)
            return out
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(x.contiguous(), features, inner, scale, cols, bits, key, nonfinite, None, None, out)
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)


def dequantize_groups(codes, scales, features, inner, shape, dtype, cols, bits):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if dtype not in FLOATS or not n or bits > 8 or not 8 <= cols <= 1024 or cols % 8:
        return NotImplemented
    out = codes.new_empty(shape, dtype=dtype)
    programs, sizes = _programs(n, cols)
    launch(
        _dequantize, programs, codes.device, codes.contiguous(), scales.contiguous(), features, out, n,
        0 if features is None else features.shape[1], inner, **sizes, BITS=bits,
        FEATURES=features is not None, SHARED=scales.numel() == 2, WIDE=is_wide(n),
    )  # fmt: skip
    return out
