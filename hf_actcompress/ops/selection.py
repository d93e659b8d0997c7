"""The k largest magnitudes of a tensor: their values and where they are, and back.

    key = magnitude as an integer (all NaN are one, above Inf);   kept: the k largest keys, of equal ones the first

in the order of the shape.  Positions are indices, ascending, or a bitmap in rows of COLS, packed like all codes: bit f
of byte j of a row of 8 w elements is element f w + j.  With a bitmap the values lie byte by byte, from bit 0 on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cpu import selection as cpu
from .library import operator
from .packing import COLS

MAGNITUDES = {  # integers of that size; all bits but the sign; those of Inf
    torch.float64: (torch.int64, 2**63 - 1, 0x7FF << 52), torch.float32: (torch.int32, 2**31 - 1, 0xFF << 23),
    torch.bfloat16: (torch.int16, 2**15 - 1, 0xFF << 7), torch.float16: (torch.int16, 2**15 - 1, 0x1F << 10),
}  # fmt: skip


def index_dtype(n: int) -> torch.dtype:
    return torch.int32 if n < 2**31 else torch.int64


def bitmap_nbytes(n: int) -> int:
    return -(-n // 8)


def _kept(flat: Tensor, k: int) -> Tensor:
    """bool [n]"""
    integer, mask, inf = MAGNITUDES[flat.dtype]
    keys = (flat.view(integer) & mask).clamp_max(inf + 1)
    least = keys.kthvalue(flat.numel() - k + 1).values
    above, ties = keys > least, keys == least
    return above | ties & (ties.cumsum(0) <= k - above.sum())


def _byte_by_byte(flat: Tensor) -> Tensor:
    """[n] -> [8 * bytes of its bitmap], in the order of their bits; zeros fill a short row."""
    whole = flat.numel() // COLS * COLS
    rows, tail = flat[:whole].view(-1, 8, COLS // 8), flat[whole:]
    tail = torch.nn.functional.pad(tail, (0, -tail.numel() % 8)).view(8, -1)
    return torch.cat([rows.transpose(1, 2).reshape(-1), tail.T.reshape(-1)])


def _in_order(bits: Tensor, n: int) -> Tensor:
    """The inverse."""
    whole = n // COLS * COLS
    rows, tail = bits[:whole].view(-1, COLS // 8, 8), bits[whole:].view(-1, 8)
    return torch.cat([rows.transpose(1, 2).reshape(-1), tail.T.reshape(-1)[: n - whole]])


def _compact(flat: Tensor, kept: Tensor, k: int) -> Tensor:
    """The k elements that are kept."""
    at = torch.where(kept, kept.cumsum(0) - 1, k)
    return flat.new_empty(k + 1).scatter_(0, at, flat)[:k]


def _select(x: Tensor, k: int, bitmap: bool) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1)
    kept = _kept(flat, k)
    if not bitmap:
        index = torch.arange(flat.numel(), device=x.device, dtype=index_dtype(flat.numel()))
        return _compact(flat, kept, k), _compact(index, kept, k)
    kept, weights = _byte_by_byte(kept), 1 << torch.arange(8, device=x.device)
    return _compact(_byte_by_byte(flat), kept, k), (kept.view(-1, 8) * weights).sum(1).to(torch.uint8)


def _select_fake(x, k, bitmap):  # noqa: ANN001, ANN202
    n = x.numel()
    where = x.new_empty(bitmap_nbytes(n), dtype=torch.uint8) if bitmap else x.new_empty(k, dtype=index_dtype(n))
    return x.new_empty(k), where


def _keep(x: Tensor, k: int) -> Tensor:
    flat = x.reshape(-1)
    return torch.empty_like(x).copy_(torch.where(_kept(flat, k), flat, torch.zeros_like(flat)).view(x.shape))


def _keep_fake(x, k):  # noqa: ANN001, ANN202
    return torch.empty_like(x)


def _place(values: Tensor, bits: Tensor, shape: list[int]) -> Tensor:
    n = math.prod(shape)
    kept = ((bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1).view(-1)
    at = (kept.cumsum(0) - 1).clamp_(0, values.numel() - 1)  # whatever the bits are, nothing is read beyond the values
    return _in_order(torch.where(kept != 0, values[at], torch.zeros_like(values[:1])), n).view(shape)


def _place_fake(values, bits, shape):  # noqa: ANN001, ANN202
    return values.new_empty(shape)


# x (any shape, float) -> values [k], and a bitmap uint8 [ceil(n / 8)] or indices [k].
select_largest = operator("select_largest(Tensor x, SymInt k, bool bitmap) -> (Tensor, Tensor)", _select, _select_fake,
                          cpu=cpu.select_largest, triton="selection:select_largest")  # fmt: skip
# x with zeros for all others; with the strides of x where they are dense.
keep_largest = operator("keep_largest(Tensor x, SymInt k) -> Tensor", _keep, _keep_fake,
                        cpu=cpu.keep_largest, triton="selection:keep_largest")  # fmt: skip
# values [k] where the bitmap has a bit, zeros elsewhere.
place_values = operator("place_values(Tensor values, Tensor bits, SymInt[] shape) -> Tensor", _place, _place_fake,
                        cpu=cpu.place_values, triton="selection:place_values")  # fmt: skip
