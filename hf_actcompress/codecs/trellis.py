"""Trellis-coded quantization: each value is coded with regard to its neighbours, at the same number of bits.

The levels are those of one bit more, dealt out to four subsets in turn.  A shift register of the last three path bits
says which two subsets the next value may use, the path bit which one of them, the other bits which level of the
subset.  So `bits` bits per value choose among 2**(bits + 1) levels, and the Viterbi algorithm finds the path of least
squared error: a quarter less than the best levels for single values at 2 bits, a third less at 4.
A code is (level within its subset) * 2 + path bit; every row starts from an empty register.
Sources: Marcellin and Fischer, "Trellis coded quantization", 1990; the 8-state code of Ungerboeck, 1982 (its parity
check polynomials 13 and 04, octal, here as a feedforward encoder, which a decoder undoes without recursion).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..ops.compiled import Kernel
from ..ops.rows import apply
from .transforms.levels import gauss_levels

STATES = 8
LANES = 16  # rows that a vector register holds side by side
STEPS = 2  # columns that one call of a kernel advances
# What the Lloyd-Max levels of one bit more are multiplied by: the least squared error on a unit Gaussian in rows of
# 128, to two digits; and that error (both: tests/codecs/test_trellis.py).
STRETCH = {1: 0.80, 2: 0.85, 3: 0.88, 4: 0.90, 5: 0.91, 6: 0.92, 7: 0.93, 8: 0.94}
DISTORTION = {1: 0.3083, 2: 0.0880, 3: 0.02424, 4: 0.00645, 5: 0.00166, 6: 0.000425, 7: 0.000108, 8: 0.0000275}


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
def _subset_edges(bits: int, device: torch.device) -> Tensor:
    """fp32 [4, 2**(bits - 1) - 1]: halfway between neighbouring levels of each subset."""
    levels = torch.tensor(trellis_levels(bits), dtype=torch.float32, device="cpu").view(-1, 4).T
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous().to(device)


@functools.cache
def _table(bits: int, gain: float, device: torch.device) -> Tensor:
    """fp32 [2**(bits + 1)]: the level at 2 * code with the path bit taken out + subset, times `gain`."""
    return torch.tensor([gain * v for v in trellis_levels(bits)], dtype=torch.float32, device="cpu").to(device)


def encode(z: Tensor, bits: int) -> Tensor:
    """fp32 [R, C] in units of the deviation -> codes uint8 [R, C]."""
    rows, cols = z.shape
    blocks = -(-rows // LANES)
    if rows % LANES:
        z = torch.cat([z, z.new_zeros(blocks * LANES - rows, cols)])
    # Column by column, LANES rows side by side: [C] of [N, 1, LANES]
    columns = list(z.view(blocks, LANES, cols).permute(2, 0, 1).contiguous()[:, :, None].unbind(0))
    edges, levels = _subset_edges(bits, z.device), _table(bits, 1.0, z.device)
    compilable = bits <= 4
    # Tensors of their own: a compiler takes arguments that are one and the same for another function.
    costs, back = [torch.full_like(columns[0], 1e9 * min(s, 1)) for s in range(STATES)], []
    for at in range(0, cols, STEPS):
        *found, = apply(advance, columns[at], [*columns[at + 1 : at + STEPS], *costs], shared=[edges, levels],
                        bits=bits, steps=STEPS, compilable=compilable)  # fmt: skip
        costs, back = found[:STATES], [*back, *found[STATES:]]
    state = torch.stack(costs).argmin(0).to(torch.int32)
    codes: list[Tensor] = [state] * cols
    for at in range(cols - STEPS, -1, -STEPS):
        state, *found = apply(
            trace, columns[at], [*columns[at + 1 : at + STEPS], *back[at : at + STEPS], state], shared=[edges],
            bits=bits, steps=STEPS, compilable=compilable,
        )  # fmt: skip
        codes[at : at + STEPS] = found
    return torch.stack(codes)[:, :, 0].permute(1, 2, 0).reshape(-1, cols)[:rows]


def decode(codes: Tensor, bits: int, gain: float) -> Tensor:
    """uint8 [R, C] -> fp32 [R, C], levels times `gain`."""
    return apply(values, codes[:, None], shared=[_table(bits, gain, codes.device)])[0][:, 0]


def _nearest(x: Tensor, edges: Tensor, s: int, bits: int) -> Tensor:
    """int32: which level of subset s is nearest."""
    if not torch.compiler.is_compiling():
        return torch.bucketize(x.contiguous(), edges[s], out_int32=True)
    index = torch.zeros_like(x, dtype=torch.int32)
    for i in range(2 ** (bits - 1) - 1):
        index = index + torch.where(x > edges[s, i], 1, 0).to(torch.int32)
    return index


def _advance(*args: Tensor, bits: int, steps: int) -> tuple[Tensor, ...]:
    """x of each step [N, 1, L], cost of each state [N, 1, L], edges, levels -> the new costs, and for each step in
    bit s which of its two predecessors state s has."""
    xs, costs, (edges, levels) = args[:steps], list(args[steps:-2]), args[-2:]
    back = []
    for x in xs:
        errors = []
        for s in range(4):
            level = levels[s]
            for i in range(2 ** (bits - 1) - 1):
                level = torch.where(x > edges[s, i], levels[4 * (i + 1) + s], level)
            errors.append((x - level) * (x - level))
        found, choice = [], None
        for state in range(STATES):
            path, first = state & 1, state >> 1
            one = costs[first] + errors[subset(first, path)]
            other = costs[first | 4] + errors[subset(first | 4, path)]
            found.append(torch.minimum(one, other))
            bit = torch.where(other < one, 1 << state, 0).to(torch.int32)
            choice = bit if choice is None else choice | bit
        costs = found
        back.append(choice.to(torch.uint8))
    return *costs, *back


def _trace(*args: Tensor, bits: int, steps: int) -> tuple[Tensor, ...]:
    """x and choices of each step, the state (int32) after the last one, edges -> the state before the first one and
    the codes (uint8) of each step."""
    xs, back, state, edges = args[:steps], args[steps : 2 * steps], args[-2], args[-1]
    codes: list[Tensor] = []
    for x, choice in zip(reversed(xs), reversed(back), strict=True):
        path = state & 1
        before = (state >> 1) | (((choice.to(torch.int32) >> state) & 1) << 2)
        s = 2 * (path ^ (before & 1) ^ (before >> 2)) + ((before >> 1) & 1)
        inner = torch.zeros_like(state)
        for i in range(4) if bits > 1 else ():
            inner = torch.where(s == i, _nearest(x, edges, i, bits), inner)
        codes.insert(0, (2 * inner + path).to(torch.uint8))
        state = before
    return state, *codes


def _values(codes: Tensor, table: Tensor) -> tuple[Tensor]:
    """Codes uint8 [N, K, C] -> the table at (level within its subset) * 4 + subset."""
    path = codes & 1
    last, second, third = (
        torch.cat([torch.zeros_like(path[..., :i]), path[..., :-i]], -1) for i in (1, 2, 3)
    )  # fmt: skip
    index = (codes.int() >> 1) * 4 + (2 * (path ^ last ^ third) + second).int()
    return (table[index],)


# A column of few rows is work enough for the first two: many operations each.
advance, trace, values = Kernel(_advance, 64), Kernel(_trace, 64), Kernel(_values)
