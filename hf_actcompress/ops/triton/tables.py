"""Groups with sorted limits (ops/tables.py): one kernel each."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..layout import in_memory_order
from ..packing import codes_nbytes
from .common import (
    ELEMENTS,
    FLOATS,
    TINY,
    finite_scale,
    is_wide,
    launch,
    load_packed,
    load_packed_tail,
    store_packed,
    store_tail_plane,
    tail_places,
    to_kind,
)

ROWS = ELEMENTS // 128
LANES = 256  # groups of a program that makes scales


@triton.jit
def _scales(sample, scale, edges, scales, n, SPLITS: tl.constexpr, TOP: tl.constexpr, LANES: tl.constexpr):  # noqa: ANN001, ANN202, N803
    COUNT: tl.constexpr = 1 << SPLITS  # noqa: N806
    group = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = group < COUNT
    least, quarter = tl.load(scale), tl.load(scale + 1)  # a quarter of the range
    lo = tl.load(sample + group.to(tl.int64) * n // COUNT, mask=inside, other=0.0).to(tl.float32)
    tl.store(edges + group - 1, lo, mask=inside & (group > 0))
    lo = tl.where(group == 0, least, lo)
    last = group == COUNT - 1
    end = tl.load(sample + (group + 1).to(tl.int64) * n // COUNT, mask=inside & ~last, other=0.0).to(tl.float32)
    top = lo * 0.0 + TOP
    most = tl.div_rn(quarter + least * 0.25 + lo * 0.0, top) * 4.0
    step = tl.where(last, most, tl.div_rn(end, top)) - tl.div_rn(lo, top)
    step = tl.where(step < TINY, TINY, step)
    lo, step, _ = finite_scale(tl.where(tl.abs(lo) < TINY, 0.0, lo), step, 1.0)
    bad = quarter != quarter
    tl.store(scales + 2 * group, tl.where(bad, quarter, lo), mask=inside)
    tl.store(scales + 2 * group + 1, tl.where(bad, quarter, step), mask=inside)


@triton.jit
def _find(y, edges, scales, SPLITS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Groups of the values: a search without branches.  0 where the first scale is NaN."""
    at = tl.where(y == y, 0, 0)
    for i in tl.static_range(SPLITS):
        half = 1 << (SPLITS - 1 - i)
        at += tl.where(y >= tl.load(edges + at + (half - 1)), half, 0)
    first = tl.load(scales)
    return tl.where(first == first, at, 0)


@triton.jit
def _inner(y, group, scales, TOP: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Steps in the group (whole numbers in fp32), minimum and step."""
    lo, step = tl.load(scales + 2 * group), tl.load(scales + 2 * group + 1)
    y = (y - lo) * tl.div_rn(step * 0.0 + 1.0, step)
    y = tl.where(y > 0, y, 0.0)  # below the range, and NaN
    y = tl.where(y > TOP, TOP * 1.0, y)
    return (y + 8388608.0) - 8388608.0, lo, step


@triton.jit
def _code(x, at, inside, edges, scales, BITS: tl.constexpr, SPLITS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    code = _find(y, edges, scales, SPLITS)
    if BITS > SPLITS:
        inner, _, _ = _inner(y, code, scales, (1 << (BITS - SPLITS)) - 1)
        code = (code << (BITS - SPLITS)) + inner.to(tl.int32)
    return code


@triton.jit
def _tail_plane(  # noqa: ANN202
    x, first, left, width, base, edges, scales,  # noqa: ANN001
    BITS: tl.constexpr, SPLITS: tl.constexpr, SHIFT: tl.constexpr, OWN: tl.constexpr, WIDTH: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """The plane of WIDTH bits of the OWN bits of a code from SHIFT on."""
    if OWN & WIDTH:
        c = tail_places(width, 128, WIDTH)
        code = _code(x, first + tl.minimum(c, left - 1), c >= 0, edges, scales, BITS, SPLITS)
        store_tail_plane((code >> SHIFT) & ((1 << OWN) - 1), base, width, 128, OWN, WIDTH)


@triton.jit
def _tail_planes(  # noqa: ANN202
    x, first, left, width, base, edges, scales,  # noqa: ANN001
    BITS: tl.constexpr, SPLITS: tl.constexpr, SHIFT: tl.constexpr, OWN: tl.constexpr,  # noqa: N803
):  # fmt: skip
    _tail_plane(x, first, left, width, base, edges, scales, BITS, SPLITS, SHIFT, OWN, 8)
    _tail_plane(x, first, left, width, base, edges, scales, BITS, SPLITS, SHIFT, OWN, 4)
    _tail_plane(x, first, left, width, base, edges, scales, BITS, SPLITS, SHIFT, OWN, 2)
    _tail_plane(x, first, left, width, base, edges, scales, BITS, SPLITS, SHIFT, OWN, 1)


@triton.jit
def _quantize(  # noqa: ANN202
    x, edges, scales, codes, n,  # noqa: ANN001
    ROWS: tl.constexpr, BITS: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    HIGH: tl.constexpr = 8 if BITS > 8 else BITS  # noqa: N806
    LOW: tl.constexpr = BITS - HIGH  # noqa: N806
    full = n // 128
    program = tl.program_id(0)
    if program * ROWS < full:
        row = program * ROWS + tl.arange(0, ROWS)
        if WIDE:
            row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < full)[:, None] & (tl.arange(0, 128) >= 0)[None, :]
        code = _code(x, row[:, None] * 128 + tl.arange(0, 128)[None, :], inside, edges, scales, BITS, SPLITS)
        base = codes + row * (16 * BITS)
        store_packed(code >> LOW, base, row < full, ROWS, 128, HIGH)
        if LOW > 0:
            store_packed(code & ((1 << LOW) - 1), base + 128, row < full, ROWS, 128, LOW)
    else:
        first = full.to(tl.int64) * 128
        left = (n - first).to(tl.int32)
        width = (left + 7) // 8 * 8
        tail = codes + full.to(tl.int64) * (16 * BITS)
        _tail_planes(x, first, left, width, tail, edges, scales, BITS, SPLITS, LOW, HIGH)
        if LOW > 0:
            _tail_planes(x, first, left, width, tail + width, edges, scales, BITS, SPLITS, 0, LOW)


@triton.jit
def _value(code, scales, BITS: tl.constexpr, SPLITS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    if BITS > SPLITS:
        group, inner = code >> (BITS - SPLITS), code & ((1 << (BITS - SPLITS)) - 1)
        y = tl.load(scales + 2 * group) + inner.to(tl.float32) * tl.load(scales + 2 * group + 1)
    else:
        y = tl.load(scales + code)
    return y


@triton.jit
def _dequantize(  # noqa: ANN202
    codes, scales, out, n,  # noqa: ANN001
    ROWS: tl.constexpr, BITS: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    HIGH: tl.constexpr = 8 if BITS > 8 else BITS  # noqa: N806
    LOW: tl.constexpr = BITS - HIGH  # noqa: N806
    full = n // 128
    program = tl.program_id(0)
    if program * ROWS < full:
        row = program * ROWS + tl.arange(0, ROWS)
        if WIDE:
            row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        base = codes + row * (16 * BITS)
        code = load_packed(base, row < full, ROWS, 128, HIGH)
        if LOW > 0:
            code = (code << LOW) + load_packed(base + 128, row < full, ROWS, 128, LOW)
        inside = (row < full)[:, None] & (tl.arange(0, 128) >= 0)[None, :]
        y = _value(code, scales, BITS, SPLITS)
        tl.store(out + row[:, None] * 128 + tl.arange(0, 128)[None, :], to_kind(y, out), mask=inside)
    else:
        first = full.to(tl.int64) * 128
        left = (n - first).to(tl.int32)
        width = (left + 7) // 8 * 8
        tail = codes + full.to(tl.int64) * (16 * BITS)
        last = load_packed_tail(tail, width, 128, HIGH)
        if LOW > 0:
            last = (last << LOW) + load_packed_tail(tail + width, width, 128, LOW)
        col = tl.arange(0, 128)[None, :]
        tl.store(out + first + col, to_kind(_value(last, scales, BITS, SPLITS), out), mask=col < left)


@triton.jit
def _roundtrip(x, edges, scales, out, n, BITS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    group = _find(y, edges, scales, SPLITS)
    if BITS > SPLITS:
        inner, lo, step = _inner(y, group, scales, (1 << (BITS - SPLITS)) - 1)
        y = lo + inner * step
    else:
        y = tl.load(scales + group)
    tl.store(out + at, to_kind(y, out), mask=at < n)


def _programs(n: int) -> int:
    return -(-(n // 128) // ROWS) + (n % 128 > 0)


def quantile_scales(sample, scale, bits, splits):  # noqa: ANN001, ANN201
    if sample.dtype not in FLOATS:
        return NotImplemented
    edges = torch.empty(2**splits - 1, dtype=torch.float32, device=sample.device)
    scales = torch.empty(2**splits, 2, dtype=torch.float32, device=sample.device)
    launch(_scales, -(-(2**splits) // LANES), sample.device, sample, scale, edges, scales, sample.numel(),
           SPLITS=splits, TOP=2 ** (bits - splits) - 1, LANES=LANES)  # fmt: skip
    return edges, scales


def quantize_sorted(x, edges, scales, bits, splits):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel():
        return NotImplemented
    x, n = x.contiguous(), x.numel()
    codes = x.new_empty(codes_nbytes(n, 128, bits), dtype=torch.uint8)
    launch(_quantize, _programs(n), x.device, x, edges.contiguous(), scales.contiguous(), codes, n, ROWS=ROWS,
           BITS=bits, SPLITS=splits, WIDE=is_wide(n))  # fmt: skip
    return codes


def dequantize_sorted(codes, scales, shape, dtype, bits, splits):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if dtype not in FLOATS or not n:
        return NotImplemented
    out = codes.new_empty(shape, dtype=dtype)
    launch(_dequantize, _programs(n), codes.device, codes.contiguous(), scales.contiguous(), out, n, ROWS=ROWS,
           BITS=bits, SPLITS=splits, WIDE=is_wide(n))  # fmt: skip
    return out


def roundtrip_sorted(x, edges, scales, bits, splits):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel():
        return NotImplemented
    dense = in_memory_order(x).is_contiguous()
    own = x if dense else x.contiguous()
    out, n = torch.empty_like(own), x.numel()
    launch(_roundtrip, -(-n // ELEMENTS), x.device, own, edges.contiguous(), scales.contiguous(), out, n, BITS=bits,
           SPLITS=splits, BLOCK=ELEMENTS)  # fmt: skip
    return out if dense else torch.empty_like(x).copy_(out)
