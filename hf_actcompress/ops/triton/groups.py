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
    load_packed_tail,
    rounded,
    store_packed,
    store_tail_plane,
    tail_places,
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
def _store_tail(  # noqa: ANN202
    x, features, base, lo, inverse, first, left, width, count, inner, key,  # noqa: ANN001
    COLS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, STOCHASTIC: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One plane of the short group's codes."""
    if BITS & WIDTH:
        c = tail_places(width, COLS, WIDTH)
        z = values(x, features, first + tl.minimum(c, left - 1), c >= 0, count, inner, FEATURES)
        code = rounded((z - lo) * inverse, first + c, key, (1 << BITS) - 1, STOCHASTIC)
        store_tail_plane(code, base, width, COLS, BITS, WIDTH)


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
def _quantize_tail(  # noqa: ANN202
    x, features, scale, codes, scales, out, nonfinite, n, full, count, inner, key,  # noqa: ANN001
    COLS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, GIVEN: tl.constexpr,  # noqa: N803
    STOCHASTIC: tl.constexpr, ROUNDTRIP: tl.constexpr, COUNT: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A last, short group, filled with its last value up to a multiple of 8."""
    TOP: tl.constexpr = (1 << BITS) - 1  # noqa: N806
    first = full.to(tl.int64) * COLS
    left = (n - first).to(tl.int32)
    width = (left + 7) // 8 * 8
    col = tl.arange(0, COLS)[None, :]
    at = first + tl.minimum(col, left - 1)
    y = values(x, features, at, col >= 0, count, inner, FEATURES)
    lo, step, inverse = _scale_of(y, scale, TOP, GIVEN)
    if ROUNDTRIP:
        code = rounded((y - lo) * inverse, first + col, key, TOP, STOCHASTIC)
        y = restored(lo + code.to(tl.float32) * step, features, at, col >= 0, count, inner, FEATURES)
        tl.store(out + first + col, to_kind(y, out), mask=col < left)
    else:
        base = codes + full.to(tl.int64) * (COLS * BITS // 8)
        _store_tail(x, features, base, lo, inverse, first, left, width, count, inner, key, COLS, BITS, FEATURES,
                    STOCHASTIC, 8)  # fmt: skip
        _store_tail(x, features, base, lo, inverse, first, left, width, count, inner, key, COLS, BITS, FEATURES,
                    STOCHASTIC, 4)  # fmt: skip
        _store_tail(x, features, base, lo, inverse, first, left, width, count, inner, key, COLS, BITS, FEATURES,
                    STOCHASTIC, 2)  # fmt: skip
        _store_tail(x, features, base, lo, inverse, first, left, width, count, inner, key, COLS, BITS, FEATURES,
                    STOCHASTIC, 1)  # fmt: skip
        if not GIVEN:
            pair = scales + 2 * full.to(tl.int64) + tl.zeros((1, 1), tl.int32)
            tl.store(pair, lo.to(tl.bfloat16))
            tl.store(pair + 1, step.to(tl.bfloat16))
    if COUNT:
        strange = tl.sum((step != step).to(tl.int32))
        if strange > 0:
            tl.atomic_add(nonfinite, strange.to(tl.int64))


@triton.jit
def _quantize(  # noqa: ANN202
    x, features, scale, codes, scales, out, nonfinite, n, count, inner, key,  # noqa: ANN001
    COLS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, GIVEN: tl.constexpr,  # noqa: N803
    STOCHASTIC: tl.constexpr, ROUNDTRIP: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    full = n // COLS
    program = tl.program_id(0)
    if program * ROWS < full:
        _quantize_rows(x, features, scale, codes, scales, out, nonfinite, full, program, count, inner, key,
                       COLS, ROWS, BITS, FEATURES, GIVEN, STOCHASTIC, ROUNDTRIP, COUNT, WIDE)
    else:
        _quantize_tail(x, features, scale, codes, scales, out, nonfinite, n, full, count, inner, key,
                       COLS, BITS, FEATURES, GIVEN, STOCHASTIC, ROUNDTRIP, COUNT)


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
def _dequantize_tail(  # noqa: ANN202
    codes, scales, features, out, n, full, count, inner,  # noqa: ANN001
    COLS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, SHARED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    first = full.to(tl.int64) * COLS
    left = (n - first).to(tl.int32)
    col = tl.arange(0, COLS)[None, :]
    pair = scales + (0 if SHARED else 2 * full.to(tl.int64))
    lo, step = tl.load(pair).to(tl.float32), tl.load(pair + 1).to(tl.float32)
    base = codes + full.to(tl.int64) * (COLS * BITS // 8)
    code = load_packed_tail(base, (left + 7) // 8 * 8, COLS, BITS)
    inside = col < left
    y = restored(lo + code.to(tl.float32) * step, features, first + col, inside, count, inner, FEATURES)
    tl.store(out + first + col, to_kind(y, out), mask=inside)


@triton.jit
def _dequantize(  # noqa: ANN202
    codes, scales, features, out, n, count, inner,  # noqa: ANN001
    COLS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, FEATURES: tl.constexpr, SHARED: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    full = n // COLS
    program = tl.program_id(0)
    if program * ROWS < full:
        _dequantize_rows(codes, scales, features, out, full, program, count, inner, COLS, ROWS, BITS, FEATURES, SHARED,
                         WIDE)  # fmt: skip
    else:
        _dequantize_tail(codes, scales, features, out, n, full, count, inner, COLS, BITS, FEATURES, SHARED)


def _programs(n: int, cols: int) -> tuple[int, int]:
    """Programs, and groups of a program."""
    rows = max(1, ELEMENTS // cols)
    return -(-(n // cols) // rows) + (n % cols > 0), rows


def _run(x: Tensor, features, inner, scale, cols, bits, key, nonfinite, codes, scales, out) -> None:  # noqa: ANN001
    n = x.numel()
    programs, rows = _programs(n, cols)
    launch(
        _quantize, programs, x.device, x, features, scale, codes, scales, out, nonfinite, n,
        0 if features is None else features.shape[1], inner, key or 0, COLS=cols, ROWS=rows, BITS=bits,
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
    if dtype not in FLOATS or not n or bits > 8 or not 8 <= cols <= 1024 or cols & (cols - 1):
        return NotImplemented
    out = codes.new_empty(shape, dtype=dtype)
    programs, rows = _programs(n, cols)
    launch(
        _dequantize, programs, codes.device, codes.contiguous(), scales.contiguous(), features, out, n,
        0 if features is None else features.shape[1], inner, COLS=cols, ROWS=rows, BITS=bits,
        FEATURES=features is not None, SHARED=scales.numel() == 2, WIDE=is_wide(n),
    )  # fmt: skip
    return out
