"""Trellis-coded quantization: each value is coded with regard to its neighbours, at the same number of bits.

The levels are those of one bit more, dealt out to four subsets in turn.  A shift register of the last three path bits
says which two subsets the next value may use, the path bit which one of them, the other bits which level of the
subset.  So `bits` bits per value choose among 2**(bits + 1) levels, and the Viterbi algorithm finds the path of least
squared error: a quarter less than the best levels for single values at 2 bits, a third less at 4.
A code is path bit + 2 * (level within its subset); every row starts from an empty shift register.
Sources: Marcellin and Fischer, "Trellis coded quantization", 1990; the 8-state code of Ungerboeck, 1982 (its parity
check polynomials 13 and 04, octal, here as a feedforward encoder, which a decoder undoes without recursion).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .gaussian import gauss_levels

STATES = 8
NEVER = 1e9  # the cost of states that no row starts from
# What the Lloyd-Max levels of one bit more are multiplied by: the least squared error on a unit Gaussian in rows of
# 128, to two digits; and that error (both: tests/ops/test_trellis.py).
STRETCH = {1: 0.80, 2: 0.85, 3: 0.88, 4: 0.90, 5: 0.91, 6: 0.92, 7: 0.93, 8: 0.94}
DISTORTION = (1.0, 0.3083, 0.0880, 0.02424, 0.00645, 0.00166, 0.000425, 0.000108, 0.0000275)


def subset(state: int, path: int) -> int:
    """Which of the four subsets a value uses: 2 * (path ^ last ^ third last path bit) + second last path bit.

    state: the last three path bits, the last one lowest.
    """
    return 2 * (path ^ (state & 1) ^ (state >> 2)) + ((state >> 1) & 1)


@functools.cache
def trellis_levels(bits: int) -> tuple[float, ...]:
    """2**(bits + 1) levels for a unit Gaussian, ascending; subset s holds every fourth from s on."""
    return tuple(STRETCH[bits] * level for level in gauss_levels(bits + 1))


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 [3, 1024]: edges (halfway between neighbouring levels of a subset, then Inf), levels, and those that are
    decoded, divided as in gaussian.py.  What belongs to a number of bits lies from 2**(bits + 1) on, by subsets.
    """
    found = torch.full((3, 1024), torch.inf, dtype=torch.float32, device="cpu")
    for bits in range(1, 9):
        levels = torch.tensor(trellis_levels(bits), dtype=torch.float32, device="cpu").view(-1, 4).T
        edges, own, decoded = found[:, 2 ** (bits + 1) : 2 ** (bits + 2)].view(3, 4, -1)
        edges[:, :-1] = (levels[:, 1:] + levels[:, :-1]) / 2
        own[:], decoded[:] = levels, levels / (1 - DISTORTION[bits])
    return tuple(found.to(device))


def quantize(w: Tensor, bits: Tensor, low: int, high: int) -> Tensor:
    """fp32 [R, C], bits of each row [R], from `low` to `high` -> codes uint8 [R, C], the path of least error."""
    edges, levels, _ = tables(w.device)
    nearest = torch.zeros(4, *w.shape, dtype=torch.uint8, device=w.device)
    level = torch.zeros(4, *w.shape, dtype=w.dtype, device=w.device)
    for b in range(max(low, 1), high + 1):
        at, size, mine = 2 ** (b + 1), 2 ** (b - 1), (bits == b)[:, None]
        for s in range(4):
            found = torch.bucketize(w, edges[at + s * size : at + (s + 1) * size - 1])
            nearest[s] = torch.where(mine, found.to(torch.uint8), nearest[s])
            level[s] = torch.where(mine, levels[at + s * size + found], level[s])
    errors = (w - level).square_()
    return _traced(*_advanced(errors.permute(2, 0, 1).contiguous()), nearest.permute(2, 0, 1).contiguous())


def _advanced(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Errors [C, 4, R] of the nearest level of each subset -> costs of the last states [8, R], and which of its two
    predecessors (s >> 1, and that + 4) each state s has after every column, bool [C, 8, R]."""
    columns, _, count = errors.shape
    cost = torch.full((STATES, count), NEVER, dtype=errors.dtype, device=errors.device)
    cost[0] = 0
    back = torch.empty(columns, STATES, count, dtype=torch.bool, device=errors.device)
    for c, error in enumerate(errors):
        added = torch.stack([error[subset(before, path)] for before in range(STATES) for path in (0, 1)])
        one, other = (cost[:, None] + added.view(STATES, 2, count)).view(2, STATES, count)
        torch.lt(other, one, out=back[c])
        cost = torch.minimum(one, other)
    return cost, back


def _traced(cost: Tensor, back: Tensor, nearest: Tensor) -> Tensor:
    state, least = torch.zeros_like(cost[0], dtype=torch.int64), cost[0]
    for s in range(1, STATES):
        state, least = torch.where(cost[s] < least, s, state), torch.minimum(cost[s], least)
    codes = torch.empty(len(back), cost.shape[1], dtype=torch.uint8, device=cost.device)
    for c in range(len(back) - 1, -1, -1):
        path = state & 1
        before = (state >> 1) | (back[c].gather(0, state[None])[0].long() << 2)
        s = 2 * (path ^ (before & 1) ^ (before >> 2)) + ((before >> 1) & 1)
        codes[c] = path + 2 * nearest[c].gather(0, s[None])[0].long()
        state = before
    return codes.T.contiguous()


def dequantize(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] -> fp32 [R, C]."""
    path = codes & 1
    last, second, third = (torch.nn.functional.pad(path, (i, 0))[:, : path.shape[1]] for i in (1, 2, 3))
    s = (2 * (path ^ last ^ third) + second).long()
    return tables(codes.device)[2][2 ** (bits + 1) + s * 2 ** (bits - 1) + (codes >> 1).long()]
