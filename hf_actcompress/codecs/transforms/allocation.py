"""Bits given to groups by their energy, at an average that is fixed.

A group of larger deviation gains more from one more bit than a small one loses by giving it up.  Groups are sorted by
the deviation that the payload holds anyway, so a decoder finds the same bits for itself and nothing more travels.
The largest group takes a bit from the smallest, the second largest from the second smallest, and so on while the
squared error falls; then once more.  Sequences of a padded batch show what it is good for: the padding is nearly
alike everywhere and gives its bits to the words.
Source: optimal bit allocation, Huang and Schultheiss, 1963, with whole bits and the errors of Gaussian levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

MOST = 2  # bits that one group may win or lose
TOP = 8  # the most bits of gauss levels


def allocate(spread: Tensor, bits: int, distortion: Callable[[int], float]) -> Tensor:
    """Deviations [G] (fp32, as the payload holds them) -> int32 bits per group, `bits` on average exactly.

    distortion: the squared error of a unit Gaussian at so many bits, from 1 on.
    """
    error = [1.0, *(distortion(b) for b in range(1, min(bits + MOST, TOP) + 1))]
    given = torch.full(spread.shape, bits, dtype=torch.int32, device=spread.device)
    order = torch.argsort(spread, descending=True, stable=True)
    half = spread.numel() // 2
    high, low = order[:half], order.flip(0)[:half]
    # Squares of ratios, not of deviations, which may be beyond the range of fp32.
    unit = spread.amax().clamp_min(torch.finfo(spread.dtype).tiny) if spread.numel() else spread
    gain, loss = (spread[high] / unit).square(), (spread[low] / unit).square()
    moved = torch.ones_like(high, dtype=torch.bool)
    for step in range(1, min(MOST, bits, TOP - bits) + 1):
        won = error[bits + step - 1] - error[bits + step]
        lost = error[bits - step] - error[bits - step + 1]
        moved = moved & (gain * won > loss * lost)
        given[high] += moved.int()
        given[low] -= moved.int()
    return given


class Regions:
    """Where the codes of each width lie in a payload: those of the least width first, each in the order of groups.

    given: int32 bits per group [G]; cols: elements per group.
    """

    def __init__(self, given: Tensor, cols: int) -> None:
        self.given, self.cols, self.nbytes = given, cols, 0
        self.at: dict[int, int] = {}
        for bits, count in enumerate(torch.bincount(given, minlength=1).tolist()):
            self.at[bits] = self.nbytes
            self.nbytes += count * cols * bits // 8

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, slice]]:
        """(bits, which of the groups start .. stop, their bytes), for runs of groups in ascending order."""
        for bits in self.at:
            rows = (self.given[start:stop] == bits).nonzero().view(-1)
            if bits and rows.numel():
                begin = self.at[bits]
                self.at[bits] += rows.numel() * self.cols * bits // 8
                yield bits, rows, slice(begin, self.at[bits])
