"""Values to packed codes and back: by groups, by one scale, by quantiles, by a table, as 8-bit floats.

Pure functions of tensors, for `compiled.Kernel`.

Shapes: a tensor is a grid x [N, K, C] of groups of C elements.  What belongs to a group is [N, K, ...]; tables that
repeat over N (the features of a period of the tensor) are [K, C].  Only elementwise operations, minima and maxima:
they give the same bits compiled and eager.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import Kernel
from .packing import code_dtype, pack, unpack_parts
from .rounding import noise
from .rows import decode_parts

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


def _sort_encode(
    x: Tensor, edges: Tensor, scales: Tensor, inverse: Tensor, offsets: Tensor, *, bits: int, splits: int
) -> tuple[Tensor]:
    """Values to groups by edges fp32 [G - 1], then in steps of scales fp32 [G, 2]; offsets: fp32 code of each group's
    first value."""
    y = x.float()
    lo, inv, offset = chosen(y, edges, True, scales[:, 0], inverse, offsets)
    inner = torch.round((y - lo) * inv).clamp(0, 2 ** (bits - splits) - 1)
    return (pack((inner + offset).to(code_dtype(bits)), bits),)


def _sort_roundtrip(
    x: Tensor, edges: Tensor, scales: Tensor, inverse: Tensor, *, bits: int, splits: int
) -> tuple[Tensor]:
    y = x.float()
    lo, step, inv = chosen(y, edges, True, scales[:, 0], scales[:, 1], inverse)
    inner = torch.round((y - lo) * inv).clamp(0, 2 ** (bits - splits) - 1)
    return ((lo + inner * step).to(x.dtype),)


def _sort_decode(codes: Tensor, scales: Tensor, *, bits: int, splits: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Codes of a group (high bits) and of a step in it, by scales fp32 [G, 2] (minimum, step)."""
    inner, out = bits - splits, []
    for _, run in unpack_parts(codes, bits, codes.shape[-1] * 8 // bits):
        group, step = run.int() >> inner, (run.int() & (2**inner - 1)).float()
        lo, width = scales[0, 0], scales[0, 1]
        for g in range(1, 2**splits):
            above = group >= g
            lo, width = torch.where(above, scales[g, 0], lo), torch.where(above, scales[g, 1], width)
        out.append((lo + step * width).to(dtype))
    return (joined(out),)


def _nearest_encode(x: Tensor, edges: Tensor, ranks: Tensor, *, bits: int) -> tuple[Tensor]:
    """Codes by edges fp32 [k - 1] between neighbouring centroids; ranks: 0, 1, ... as fp32 [k]."""
    return (pack(chosen(x.float(), edges, False, ranks)[0].to(code_dtype(bits)), bits),)


def _nearest_roundtrip(x: Tensor, edges: Tensor, table: Tensor) -> tuple[Tensor]:
    return (chosen(x.float(), edges, False, table)[0].to(x.dtype),)


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


def _table_decode(codes: Tensor, table: Tensor, *, bits: int) -> tuple[Tensor]:
    """table [2**bits] in the dtype of the result."""
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (joined([looked_up(table, run, bits) for _, run in runs]),)


sort_encode, sort_decode, sort_roundtrip = Kernel(_sort_encode), Kernel(_sort_decode), Kernel(_sort_roundtrip)
nearest_encode, nearest_roundtrip = Kernel(_nearest_encode), Kernel(_nearest_roundtrip)
table_decode = Kernel(_table_decode)


def decode_table(codes: Tensor, shape: tuple[int, ...], table: Tensor, bits: int) -> Tensor:
    """table[codes] as a tensor of that shape; codes in rows of COLS, table [2**bits] in the dtype of the result."""
    return decode_parts(table_decode, codes, shape, bits, [table], bits=bits)
