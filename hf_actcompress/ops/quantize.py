"""Steps of kernels: to whole numbers, by edges, by a table.

Pure functions of tensors, for `compiled.Kernel`.

Shapes: a tensor is a grid x [N, K, C] of groups of C elements.  What belongs to a group is [N, K, ...]; tables that
repeat over N (the features of a period of the tensor) are [K, C].  Only elementwise operations, minima and maxima:
they give the same bits compiled and eager.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import noise

SELECTED = 4  # bits up to which a table is looked up by choices


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def rounded(y: Tensor, top: int, starts: Tensor | None, lanes: Tensor | None, key: Tensor | None) -> Tensor:
    """y in units of the step -> whole numbers 0 .. top (fp32); stochastic where a key is given."""
    if key is None:
        return torch.round(y).clamp(0, top)
    return torch.floor(y + noise(starts + lanes, key)).clamp(0, top)


def units(x: Tensor, mean: Tensor | None, inverse: Tensor | None) -> Tensor:
    return x.float() if mean is None else (x.float() - mean) * inverse


def chosen(x: Tensor, edges: Tensor, right: bool, *columns: Tensor) -> list[Tensor]:
    """For each value the entry of every column at the number of edges below it (right: or equal to it)."""
    if not torch.compiler.is_compiling():
        index = torch.bucketize(x.contiguous(), edges, out_int32=True, right=right)
        return [column[index] for column in columns]
    # Few edges: a chain of comparisons stays in registers, a search or a gather does not vectorise.
    found = [column[0] for column in columns]
    for i in range(edges.shape[0]):
        above = x >= edges[i] if right else x > edges[i]
        found = [torch.where(above, column[i + 1], value) for column, value in zip(columns, found, strict=True)]
    return found


def looked_up(table: Tensor, codes: Tensor, bits: int) -> Tensor:
    """table[codes]"""
    if bits > SELECTED or not torch.compiler.is_compiling():
        return table[codes.int()]
    # A gather does not vectorise: bit by bit, half of the entries that are left is dropped.
    codes, left = codes.int(), [table[i] for i in range(2**bits)]
    for k in range(bits):
        there = (codes >> k) & 1 != 0
        left = [torch.where(there, left[i + 1], left[i]) for i in range(0, len(left), 2)]
    return left[0]
