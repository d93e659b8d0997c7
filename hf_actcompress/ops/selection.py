"""The k largest magnitudes of a tensor without sorting it, and bitmaps of where they are.

A sample tells in which narrow band of magnitudes the k-th largest lies; one pass counts what is above the band, and
only what is inside is ranked.  The result is exact: where the sample was wrong the band is widened to everything.
A bitmap is packed in rows of COLS like all codes: bit i of byte j of a row of 8 w elements is element i w + j.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .layout import in_memory_order, positions
from .quantize import band_bits
from .reductions import LARGEST, strided_sample
from .rows import COLS, apply, join, parts

SAMPLE = 1 << 16
RUN = 1 << 15  # bytes of a bitmap that are expanded at once: a multiple of a row's, and what comes of it fits a cache
SIGMAS = 4.0  # half-width of the band, in standard deviations of a rank in the sample


@dataclass(frozen=True)
class Cut:
    """What stays: the magnitudes above `hi`, which `bits` marks, and the elements `more` (int64)."""

    hi: Tensor
    bits: Tensor
    more: Tensor

    def bitmap(self) -> Tensor:
        n = self.bits.numel() * 8
        at, bit = _places(self.more, n)
        # Of different bits that are not set yet, the sum is the union.
        return self.bits.index_add(0, at, (1 << bit).to(torch.uint8))


def find_cut(x: Tensor, k: int) -> Cut | None:
    """The k largest magnitudes of `x`; of equal ones the first.  None where one is NaN or beyond LARGEST.

    The cut counts elements as they lie in memory; which of them is the first is told by the order of the shape.
    """
    n, flat = x.numel(), in_memory_order(x).reshape(-1)
    for lo, hi in _bands(flat, k):
        found = [apply(band_bits, part.take(flat), shared=[lo, hi], limit=LARGEST) for part in parts(n, COLS)]
        inside, above, strange = (join([piece.view(-1) for piece in pieces]) for pieces in zip(*found, strict=True))
        if strange.any():
            return None
        _clear_filling(above, n)
        rest = k - _count(above)
        band = set_bits(inside, n, sparse=True)
        if 0 < rest <= band.numel():
            size = flat[band].abs()
            least, = _kths(size, size.numel() - rest)
            larger = size > least
            ties = band[size == least]
            first = positions(x, ties).argsort()[: rest - int(larger.sum())]
            return Cut(hi, above, torch.cat([band[larger], ties[first]]))
    raise AssertionError("a band of all magnitudes holds the k-th largest")


def _bands(flat: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
    """Bands of magnitudes [lo, hi] to search, fp32 (fp64 for fp64)."""
    n, wide = flat.numel(), _wide(flat)
    everything = (flat.new_full((), 0.0, dtype=wide), flat.new_full((), math.inf, dtype=wide))
    if n <= 4 * SAMPLE:
        return [everything]
    sizes = strided_sample(flat, SAMPLE).abs().to(wide)
    share, m = k / n, sizes.numel()
    slack = SIGMAS * math.sqrt(m * share * (1 - share)) + 2
    first, last = math.floor(m * share - slack), math.ceil(m * share + slack)
    low, high = _kths(sizes, max(0, m - 1 - last), min(m - 1, m - 1 - first))
    lo = low if last < m else everything[0]
    hi = high if first >= 0 else everything[1]
    return [(lo, hi), everything]


def _kths(sizes: Tensor, *ks: int) -> list[Tensor]:
    """The elements at places `ks` of the ascending order."""
    if sizes.device.type == "cpu" and sizes.dtype == torch.float32:  # numpy takes a fifth of the time of torch
        some = torch.from_numpy(np.partition(sizes.numpy(), ks))
        return [some[k] for k in ks]
    return [sizes.kthvalue(k + 1).values for k in ks]


def set_bits(bits: Tensor, n: int, sparse: bool = False) -> Tensor:
    """Bitmap of n elements -> int64 indices of the set ones, byte by byte.  sparse: few of them are expected."""
    if sparse:
        used = bits.nonzero().view(-1)
        found = _ones(bits[used])
        byte, bit = used[found >> 3], found & 7
        width = _widths(byte, n)
        row = byte // (COLS // 8)
        index = row * COLS + bit * width + byte - row * (COLS // 8)
        return index[index < n]  # without what fills the last row
    return join([start + index.long() for start, index in runs_of_set_bits(bits, n)])


def runs_of_set_bits(bits: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """The same in runs of RUN bytes, so that what is between stays in a cache: (first element of the run, integers
    that count from it)."""
    whole = n // COLS * (COLS // 8)
    for start in range(0, whole, RUN):
        run = bits[start : min(start + RUN, whole)]
        yield 8 * start, _elements(bits.device)[_ones(run)]
    if whole < bits.numel() or not n:
        tail, width = _ones(bits[whole:]), bits.numel() - whole
        tail = (tail & 7) * width + (tail >> 3)
        yield n // COLS * COLS, tail[tail < n % COLS]


@functools.cache
def _elements(device: torch.device) -> Tensor:
    """int32 [8 * RUN]: which element of a run 8 * byte + bit stands for."""
    index = torch.arange(8 * RUN, dtype=torch.int32, device=device)
    return index.view(-1, 8, COLS // 8).transpose(1, 2).reshape(-1)


def _ones(bits: Tensor) -> Tensor:
    """8 * byte + bit of the set bits, int64, ascending."""
    if bits.device.type == "cpu":  # numpy takes an eighth of the time of torch's shifts, and less than its nonzero
        return torch.from_numpy(np.flatnonzero(np.unpackbits(bits.numpy(), bitorder="little").view(np.bool_)))
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).view(-1).nonzero().view(-1)


def _clear_filling(bits: Tensor, n: int) -> None:
    """Unset what filled the last byte's row."""
    at, bit = _places(torch.arange(n, n + -n % 8), n)
    for byte, shift in zip(at.tolist(), bit.tolist(), strict=True):
        bits[byte] &= 0xFF ^ (1 << shift)


def _places(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Elements of a tensor of n -> their bytes and bits."""
    row, at = index // COLS, index % COLS
    width = _widths(row * (COLS // 8), n)
    return row * (COLS // 8) + at % width, at // width


def _widths(byte: Tensor, n: int) -> Tensor:
    """Bytes of the row in which a byte lies: COLS / 8, or less in a last, short row."""
    width = torch.full_like(byte, COLS // 8)
    if n % COLS:
        width = torch.where(byte >= n // COLS * (COLS // 8), -(-(n % COLS) // 8), width)
    return width


def ranks(bits: Tensor) -> Tensor:
    """For each byte how many bits are set before it (int32, or int64 from 2**31 elements)."""
    dtype = torch.int32 if bits.numel() < 2**28 else torch.int64
    counts, sums = _counts(bits)
    total = (sums >> 56) & 0xFF
    before = total.cumsum(0).sub_(total).to(dtype)
    inner = (sums - counts).view(torch.uint8).view(-1, 8).to(dtype)
    return inner.add_(before[:, None]).view(-1)[: bits.numel()]


def _count(bits: Tensor) -> int:
    return int(((_counts(bits)[1] >> 56) & 0xFF).sum())


def _counts(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Eight bytes at a time (int64): the number of bits in each, and in it and those before it."""
    if bits.numel() % 8 or bits.storage_offset() % 8:
        bits = torch.cat([bits, bits.new_zeros(-bits.numel() % 8)])
    v = bits.view(torch.int64)
    v = v - ((v >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    return v, v * 0x0101010101010101


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
