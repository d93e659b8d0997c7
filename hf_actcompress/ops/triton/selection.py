"""The k largest magnitudes (ops/selection.py) by histograms of their leading bits: 7 kernels; their places: 3."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, launch

BINS = 2048
DIGITS = {torch.float32: (11, 10, 10), torch.bfloat16: (8, 7, 0), torch.float16: (8, 7, 0)}  # bits of a key, in turn
PROGRAMS = 512  # that make histograms
TILE = 2048
ROWS = 8  # of 128 elements, of a program that counts or writes
BLOCK = ROWS * 128


@triton.jit
def _keys(x):  # noqa: ANN001, ANN202
    """Magnitudes as integers; all NaN are one, above Inf."""
    if x.dtype == tl.float32:
        keys = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    elif x.dtype == tl.bfloat16:
        keys = tl.minimum(x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7F81)
    else:
        keys = tl.minimum(x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0x7C01)
    return keys


@triton.jit
def _digit(counts, k, WIDTH: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """The bin of the k-th largest, and how many of that bin are among the k largest."""
    index = tl.arange(0, 1 << WIDTH)
    own = tl.load(counts + index, cache_modifier=".cg")  # as other programs left it
    above = tl.sum(own, 0) - tl.cumsum(own, 0)
    here = (above < k) & (above + own >= k)
    return tl.sum(tl.where(here, index, 0), 0), k - tl.sum(tl.where(here, above, 0), 0)


@triton.jit
def _prefix(counts, k, LEVEL: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Leading bits of the k-th largest key as far as LEVEL histograms tell, and how many with these are to be kept."""
    prefix, rest = _digit(counts, k, A)
    if LEVEL > 1:
        digit, rest = _digit(counts + 2048, rest, B)
        prefix = (prefix << B) + digit
    if LEVEL > 2:
        digit, rest = _digit(counts + 4096, rest, C)
        prefix = (prefix << C) + digit
    return prefix, rest


@triton.jit
def _histogram(  # noqa: ANN202
    x, counts, n, k, steps, programs,  # noqa: ANN001
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Of the next bits of the keys that begin as the k-th largest does.  The last program of the last histogram writes
    the k-th largest key, and how many of the elements equal to it are kept, behind the histograms."""
    WIDTH: tl.constexpr = A if LEVEL == 0 else (B if LEVEL == 1 else C)  # noqa: N806
    SHIFT: tl.constexpr = B + C if LEVEL == 0 else (C if LEVEL == 1 else 0)  # noqa: N806
    prefix = 0
    if LEVEL > 0:
        prefix, _ = _prefix(counts, k, LEVEL, A, B, C)
    found = tl.zeros((1 << WIDTH,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * steps * TILE
    for step in range(steps):
        at = first + step * TILE + tl.arange(0, TILE)
        keys = _keys(tl.load(x + at, mask=at < n, other=0.0)) >> SHIFT
        mine = at < n
        if LEVEL > 0:
            mine = mine & ((keys >> WIDTH) == prefix)
        found += tl.histogram(keys & ((1 << WIDTH) - 1), 1 << WIDTH, mask=mine)
    tl.atomic_add(counts + LEVEL * 2048 + tl.arange(0, 1 << WIDTH), found.to(tl.int64), mask=found > 0)
    if LEVEL == LEVELS - 1:
        tl.debug_barrier()
        result = counts + LEVELS * 2048
        if tl.atomic_add(result, 1, sem="acq_rel") == programs - 1:
            least, rest = _prefix(counts, k, LEVELS, A, B, C)
            tl.store(result + 1, least.to(tl.int64))
            tl.store(result + 2, rest.to(tl.int64))


@triton.jit
def _count(x, result, sums, n, blocks, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Elements above the threshold, and equal to it, of each block."""
    least = tl.load(result + 1).to(tl.int32)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keys = _keys(tl.load(x + at, mask=at < n, other=0.0))
    tl.store(sums + tl.program_id(0), tl.sum(((keys > least) & (at < n)).to(tl.int32), 0))
    tl.store(sums + blocks + tl.program_id(0), tl.sum(((keys == least) & (at < n)).to(tl.int32), 0))


@triton.jit
def _write(  # noqa: ANN202
    x, result, sums, upto, values, where, n, blocks, ROWS: tl.constexpr, FORM: tl.constexpr,  # noqa: ANN001, N803
):  # fmt: skip
    """FORM 0: values and a bitmap, 1: values and indices, 2: x with zeros for what is not kept."""
    least, rest = tl.load(result + 1).to(tl.int32), tl.load(result + 2)
    program = tl.program_id(0)
    above_before = tl.load(upto + program) - tl.load(sums + program)
    ties_before = tl.load(upto + blocks + program) - tl.load(sums + blocks + program)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, 128)[None, :]
    at = row[:, None] * 128 + col
    v = tl.load(x + at, mask=at < n, other=0.0)
    keys = _keys(v)
    ties = ((keys == least) & (at < n)).to(tl.int32)
    rank = tl.reshape(tl.cumsum(tl.reshape(ties, (ROWS * 128,)), 0), (ROWS, 128)) + ties_before
    keep = ((keys > least) & (at < n)) | ((ties > 0) & (rank <= rest))
    first = above_before + tl.minimum(ties_before, rest)
    if FORM == 2:
        tl.store(values + at, tl.where(keep, v, 0.0), mask=at < n)
    elif FORM == 1:
        kept = keep.to(tl.int32)
        place = tl.reshape(tl.cumsum(tl.reshape(kept, (ROWS * 128,)), 0), (ROWS, 128)) - kept + first
        tl.store(values + place, v, mask=keep)
        tl.store(where + place, at.to(where.dtype.element_ty), mask=keep)
    else:  # byte by byte, from bit 0 on
        left = tl.minimum(n - row * 128, 128).to(tl.int32)
        width = tl.maximum((left + 7) // 8, 1)[:, None]
        element = tl.where(col < 8 * width, (col & 7) * width + (col >> 3), 127)
        kept = tl.gather(keep.to(tl.int32), element, axis=1)
        kept = tl.where((col < 8 * width) & (element < left[:, None]), kept, 0)
        place = tl.reshape(tl.cumsum(tl.reshape(kept, (ROWS * 128,)), 0), (ROWS, 128)) - kept + first
        own = tl.load(x + row[:, None] * 128 + element, mask=kept > 0, other=0.0)
        tl.store(values + place, own, mask=kept > 0)
        bytes_ = tl.sum(tl.reshape(kept, (ROWS, 16, 8)) << tl.arange(0, 8)[None, None, :], axis=2)
        j = tl.arange(0, 16)[None, :]
        tl.store(where + row[:, None] * 16 + j, bytes_.to(tl.uint8), mask=j * 8 < left[:, None])


@triton.jit
def _count_bits(bits, sums, nbytes, ROWS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    at = tl.program_id(0).to(tl.int64) * (ROWS * 16) + tl.arange(0, ROWS * 16)
    byte = tl.load(bits + at, mask=at < nbytes, other=0).to(tl.int32)
    byte = byte - ((byte >> 1) & 0x55)
    byte = (byte & 0x33) + ((byte >> 2) & 0x33)
    tl.store(sums + tl.program_id(0), tl.sum((byte + (byte >> 4)) & 0x0F, 0))


@triton.jit
def _place(values, bits, sums, upto, out, n, k, ROWS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    program = tl.program_id(0)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, 128)[None, :]
    left = tl.minimum(n - row * 128, 128).to(tl.int32)
    width = tl.maximum((left + 7) // 8, 1)[:, None]
    inside = (col < 8 * width) & (left > 0)[:, None]
    byte = tl.load(bits + row[:, None] * 16 + (col >> 3), mask=inside, other=0).to(tl.int32)
    kept = (byte >> (col & 7)) & 1
    before = tl.load(upto + program) - tl.load(sums + program)
    place = tl.reshape(tl.cumsum(tl.reshape(kept, (ROWS * 128,)), 0), (ROWS, 128)) - kept + before
    # Whatever the bits are, nothing is read beyond the values.
    own = tl.load(values + tl.minimum(place, k - 1), mask=kept > 0, other=0.0)
    element = (col & 7) * width + (col >> 3)
    tl.store(out + row[:, None] * 128 + element, own, mask=inside & (element < left[:, None]))


def _selected(x: Tensor, k: int, form: int, values: Tensor, where: Tensor | None) -> None:
    n, (a, b, c) = x.numel(), DIGITS[x.dtype]
    levels, blocks, tiles = (3 if c else 2), -(-n // BLOCK), -(-n // TILE)
    steps = -(-tiles // PROGRAMS)
    counts = torch.zeros(levels + 1, BINS, dtype=torch.int64, device=x.device)
    programs = -(-tiles // steps)
    for level in range(levels):
        launch(_histogram, programs, x.device, x, counts, n, k, steps, programs, LEVEL=level, LEVELS=levels, A=a, B=b,
               C=c, TILE=TILE)  # fmt: skip
    sums, result = torch.empty(2, blocks, dtype=torch.int32, device=x.device), counts[levels]
    launch(_count, blocks, x.device, x, result, sums, n, blocks, BLOCK=BLOCK)
    launch(_write, blocks, x.device, x, result, sums, sums.cumsum(1), values, where, n, blocks, ROWS=ROWS, FORM=form)


def select_largest(x, k, bitmap):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel():
        return NotImplemented
    x, n, values = x.contiguous(), x.numel(), x.new_empty(k)
    if bitmap:
        where = x.new_empty(-(-n // 8), dtype=torch.uint8)
    else:
        where = x.new_empty(k, dtype=torch.int32 if n < 2**31 else torch.int64)
    _selected(x, k, 0 if bitmap else 1, values, where)
    return values, where


def keep_largest(x, k):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel():
        return NotImplemented
    own = x.contiguous()
    out = torch.empty_like(own)
    _selected(own, k, 2, out, None)
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)


def place_values(values, bits, shape):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if values.dtype not in FLOATS or not n:
        return NotImplemented
    values, bits, out = values.contiguous(), bits.contiguous(), values.new_empty(shape)
    blocks = -(-n // BLOCK)
    sums = torch.empty(blocks, dtype=torch.int32, device=values.device)
    launch(_count_bits, blocks, values.device, bits, sums, bits.numel(), ROWS=ROWS)
    launch(_place, blocks, values.device, values, bits, sums, sums.cumsum(0), out, n, values.numel(), ROWS=ROWS)
    return out
