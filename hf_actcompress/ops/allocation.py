"""Bits given to groups by their energy, at an average that is fixed.

A group of larger deviation gains more from one more bit than a small one loses by giving it up.  Groups are sorted by
the deviation that the payload holds anyway, so a decoder finds the same bits for itself and nothing more travels.
The largest group takes a bit from the smallest, the second largest from the second smallest, and so on while the
squared error falls; then once more.  Sequences of a padded batch show what it is good for: the padding is nearly
alike everywhere and gives its bits to the words.

Groups share within windows of up to WINDOW of them, so that one kernel can encode a window, and no tensor is sorted as
a whole.  The groups are cut into runs of equal length, and a window takes one group of every run, a random one: it is
a sample of the whole tensor, and the squared error grows by half a percent at most on hidden states of MiniLM and
feature maps of EfficientNet-Lite0, by 1.5 % where deviations differ by orders of magnitude at random.
Source: optimal bit allocation, Huang and Schultheiss, 1963, with whole bits and the errors of Gaussian levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import gaussian, trellis
from .hadamard import hashed

WINDOW = 512
MOST = 2  # bits that one group may win or lose
TOP = 8  # the most bits of a code


class Windows(NamedTuple):
    """How groups fall into windows: `count` windows of `members` groups, those from `full` on of one less."""

    count: int
    members: int
    full: int

    @classmethod
    def of(cls, groups: int) -> "Windows":
        count = -(-groups // WINDOW)
        members = -(-groups // count)
        return cls(count, members, groups - (members - 1) * count)

    def groups(self, device: torch.device) -> Tensor:
        """int64 [count, members]: which groups; what is not below their number is none."""
        run = torch.arange(self.members, device=device)
        turn = hashed(run) % self.count
        if self.full < self.count:
            turn = torch.where(run == self.members - 1, 0, turn)
        return run * self.count + (torch.arange(self.count, device=device)[:, None] + turn) % self.count

    def first(self, device: torch.device) -> Tensor:
        """int64 [count]: how many groups lie in the windows before."""
        window = torch.arange(self.count, device=device)
        return window * (self.members - 1) + window.clamp(max=self.full)


def thresholds(bits: int, distortion: Sequence[float]) -> list[tuple[float, float]]:
    """For the first, second ... bit that moves: (a, b), where it lowers the error if a * larger > b * smaller.

    larger, smaller: the deviations of the two groups.  distortion: the squared error of a unit Gaussian at 0, 1 ...
    TOP bits.
    """
    steps = range(1, min(MOST, bits, TOP - bits) + 1)
    return [(math.sqrt(distortion[bits + s - 1] - distortion[bits + s]),
             math.sqrt(distortion[bits - s] - distortion[bits - s + 1])) for s in steps]  # fmt: skip


def moves(bits: int, paths: bool) -> list[tuple[float, float]]:
    """The thresholds of single levels, or of trellis-coded ones."""
    return thresholds(bits, trellis.DISTORTION if paths else gaussian.distortions())


def allocate(spread: Tensor, bits: int, limits: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Deviations bf16 [G] -> bits of each group int64 [G], and the sum of those before it in the payload.

    They are `bits` on average exactly.  Groups lie window by window, in each one in their order.  NaN counts as 0.

    limits: the `thresholds`.
    """
    count, device = spread.numel(), spread.device
    windows = Windows.of(count)
    index = windows.groups(device)
    there = index < count
    key = spread.view(torch.int16).int() & 0x7FFF  # numbers without sign are in the order of their bits
    key = torch.where(key >= 0x7F80, 0, key)[index.clamp(max=count - 1)]
    key, order = torch.where(there, key, -1).sort(dim=1, descending=True, stable=True)
    size, rank = there.sum(1, keepdim=True), torch.arange(windows.members, device=device)
    own = (key.clamp_min(0) << 16).view(torch.float32)
    other = own.gather(1, (size - 1 - rank).clamp_min(0))
    wins, gives = rank < size // 2, (rank >= size - size // 2) & (rank < size)
    moved, change = torch.ones_like(wins), torch.zeros_like(order)
    for a, b in limits:
        moved = moved & torch.where(wins, own * a > other * b, other * a > own * b)
        change = change + (moved & wins).long() - (moved & gives).long()
    given = torch.zeros_like(change).scatter_(1, order, torch.where(rank < size, bits + change, 0))
    before = windows.first(device)[:, None] * bits + given.cumsum(1) - given
    at, whole = torch.where(there, index, count).view(-1), index.new_empty(2, count + 1)
    whole[:, at] = torch.stack([given.view(-1), before.view(-1)])
    return whole[0, :count], whole[1, :count]
