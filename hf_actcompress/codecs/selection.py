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

from .base import strided_sample
from .kernels import band_bits
from .rows import COLS, apply, join, parts

SAMPLE = 1 << 15
RUN = 1 << 17  # bytes of a bitmap that are expanded at once; a multiple of a row's
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


def find_cut(flat: Tensor, k: int) -> Cut:
    """The k largest magnitudes of `flat`; of equal ones the first."""
    n = flat.numel()
    for lo, hi in _bands(flat, k):
        found = [apply(band_bits, part.take(flat), shared=[lo, hi]) for part in parts(n, COLS)]
        inside, above = (join([bits.view(-1) for bits in both]) for both in zip(*found, strict=True))
        _clear_filling(above, n)
        rest = k - int(torch.bincount(above, minlength=256) @ _popcounts(above.device).long())
        band = set_bits(inside, n, sparse=True)
        if 0 < rest <= band.numel():
            size = flat[band].abs()
            least = size.kthvalue(size.numel() - rest + 1).values
            larger = size > least
            ties = band[size == least].sort().values[: rest - int(larger.sum())]
            return Cut(hi, above, torch.cat([band[larger], ties]))
    raise AssertionError("a band of all magnitudes holds the k-th largest")


def _bands(flat: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
    """Bands of magnitudes [lo, hi] to search, fp32 (fp64 for fp64)."""
    n, wide = flat.numel(), _wide(flat)
    everything = (flat.new_full((), 0.0, dtype=wide), flat.new_full((), math.inf, dtype=wide))
    if n <= 4 * SAMPLE:
        return [everything]
    ranked = strided_sample(flat, SAMPLE).abs().to(wide).sort(descending=True).values
    share, m = k / n, ranked.numel()
    slack = SIGMAS * math.sqrt(m * share * (1 - share)) + 2
    first, last = math.floor(m * share - slack), math.ceil(m * share + slack)
    lo = ranked[last] if last < m else everything[0]
    hi = ranked[first] if first >= 0 else everything[1]
    return [(lo, hi), everything]


def set_bits(bits: Tensor, n: int, sparse: bool = False) -> Tensor:
    """Bitmap of n elements -> int64 indices of the set ones, byte by byte.  sparse: few of them are expected."""
    return join(list(runs_of_set_bits(bits, n, bits.numel() if sparse else RUN, sparse)))


def runs_of_set_bits(bits: Tensor, n: int, run: int | None = None, sparse: bool = False) -> Iterator[Tensor]:
    """The same in runs of so many bytes, so that what is between stays in a cache."""
    whole, run = n // COLS * (COLS // 8), run or RUN
    for start in range(0, whole, run):
        index = _ones(bits[start : min(start + run, whole)], sparse)
        # In a row of whole bytes bit i of byte j is element 16 i + j: the low seven bits of the index are turned.
        low = index & (COLS - 1)
        index -= low
        index += low >> 3
        index += low.bitwise_and_(7).bitwise_left_shift_(4)
        yield index.add_(8 * start)
    if whole < bits.numel() or not n:
        tail, width = _ones(bits[whole:], False), bits.numel() - whole
        tail = n // COLS * COLS + (tail & 7) * width + (tail >> 3)
        yield tail[tail < n]


def _ones(bits: Tensor, sparse: bool) -> Tensor:
    """8 * byte + bit of the set bits, int64, ascending."""
    if sparse:
        used = bits.nonzero().view(-1)
        found = _ones(bits[used], False)
        return used[found >> 3] * 8 + (found & 7)
    if bits.device.type == "cpu":  # an eighth of the time of torch's shifts
        expanded = torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little"))
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
        expanded = ((bits[:, None] >> shifts) & 1).view(-1)
    return expanded.view(torch.bool).nonzero().view(-1)


def _clear_filling(bits: Tensor, n: int) -> None:
    """Unset what filled the last byte's row."""
    at, bit = _places(torch.arange(n, n + -n % 8), n)
    for byte, shift in zip(at.tolist(), bit.tolist(), strict=True):
        bits[byte] &= 0xFF ^ (1 << shift)


def _places(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Elements of a tensor of n -> their bytes and bits."""
    row, at = index // COLS, index % COLS
    width = torch.full_like(index, COLS // 8)
    if n % COLS:
        width = torch.where(row == n // COLS, -(-(n % COLS) // 8), width)  # of the last, short row
    return row * (COLS // 8) + at % width, at // width


@functools.cache
def _popcounts(device: torch.device) -> Tensor:
    return torch.tensor([i.bit_count() for i in range(256)], dtype=torch.int32, device=device)


def ranks(bits: Tensor) -> Tensor:
    """For each byte how many bits are set before it (int32, or int64 from 2**31 elements)."""
    counts = _popcounts(bits.device)[bits.int()]
    dtype = torch.int32 if bits.numel() < 2**28 else torch.int64
    return counts.cumsum(0, dtype=dtype).sub_(counts)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
