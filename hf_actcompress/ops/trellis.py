"""Trellis-coded quantization: the Viterbi algorithm over rows of values, and its inverse.

A code of `bits` bits is (level within its subset) * 2 + path bit; every row starts from an empty shift register.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import Kernel
from .rows import apply

STATES = 8
LANES = 16  # rows that a vector register holds side by side
STEPS = 2  # columns that one call of a kernel advances


def subset(state: int, path: int) -> int:
    """Which of the four subsets a value uses: 2 * (path ^ last ^ third last path bit) + second last path bit.

    state: the last three path bits, the last one lowest.
    """
    return 2 * (path ^ (state & 1) ^ (state >> 2)) + ((state >> 1) & 1)


def encode(z: Tensor, bits: int, edges: Tensor, levels: Tensor) -> Tensor:
    """fp32 [R, C] -> codes uint8 [R, C], the path of least squared error.

    edges: fp32 [4, 2**(bits - 1) - 1], halfway between neighbouring levels of each subset.
    levels: fp32 [2**(bits + 1)], ascending; subset s holds every fourth from s on.
    """
    rows, cols = z.shape
    blocks = -(-rows // LANES)
    if rows % LANES:
        z = torch.cat([z, z.new_zeros(blocks * LANES - rows, cols)])
    # Column by column, LANES rows side by side: [C] of [N, 1, LANES]
    columns = list(z.view(blocks, LANES, cols).permute(2, 0, 1).contiguous()[:, :, None].unbind(0))
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


def decode(codes: Tensor, levels: Tensor) -> Tensor:
    """uint8 [R, C] -> fp32 [R, C]; levels fp32 [2**(bits + 1)] as above."""
    return apply(values, codes[:, None], shared=[levels])[0][:, 0]


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
advance, trace, values = Kernel(_advance, 64, weight=64), Kernel(_trace, 64, weight=16), Kernel(_values)
