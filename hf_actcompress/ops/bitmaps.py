"""Flags in one bit a value, and values by a table of codes.

All are packed in rows of COLS elements (packing.py), the last row up to a multiple of 8.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .cpu import forms
from .groups import tiles
from .library import operator
from .packing import COLS, codes_nbytes, pack, unpack


def _flags(x: Tensor, low: float, high: float | None) -> Tensor:
    flat, out = x.reshape(-1), x.new_empty(codes_nbytes(x.numel(), COLS, 1), dtype=torch.uint8)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    for first, count, width in tiles(flat.numel(), COLS, x.device):
        run = flat[first * COLS : first * COLS + count * width]
        above = ~(run <= low)  # NaN counts, as in torch's gradient of ReLU
        if high is not None:
            above &= run < high
        padded = torch.nn.functional.pad(above.to(torch.uint8), (0, count * width - run.numel()))
        begin = first * COLS // 8
        out[begin : begin + count * width // 8] = pack(padded.view(count, width), 1).view(-1)
    return out


def _flags_fake(x: Tensor, low: float, high: float | None) -> Tensor:
    return x.new_empty(codes_nbytes(x.numel(), COLS, 1), dtype=torch.uint8)


def _decode_table(codes: Tensor, table: Tensor, shape: list[int], bits: int) -> Tensor:
    n = math.prod(shape)
    out = table.new_empty(n)
    for first, count, width in tiles(n, COLS, codes.device):
        begin = first * COLS * bits // 8
        packed = codes[begin : begin + count * width * bits // 8].view(count, -1)
        run = table[unpack(packed, bits, width).int()].view(-1)
        out[first * COLS : first * COLS + run.numel()] = run[: n - first * COLS]
    return out.view(shape)


def _decode_table_fake(codes: Tensor, table: Tensor, shape: list[int], bits: int) -> Tensor:
    return table.new_empty(shape)


@functools.lru_cache(256)
def _table(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept: making it anew would copy from the host, and so wait for the device."""
    return torch.tensor(levels, dtype=dtype, device=device)


def _decode_levels(codes: Tensor, levels: list[float], shape: list[int], dtype: torch.dtype, bits: int) -> Tensor:
    return decode_table(codes, _table(tuple(levels), dtype, codes.device), shape, bits)


def _decode_levels_fake(codes, levels, shape, dtype, bits):  # noqa: ANN001, ANN202
    return codes.new_empty(shape, dtype=dtype)


# x (any shape; float, bool or uint8) -> uint8: a bit for each value above `low` (and below `high`).  NaN counts as
# above `low`, as in torch's gradient of ReLU.
pack_flags = operator("pack_flags(Tensor x, float low, float? high) -> Tensor", _flags, _flags_fake,
                      cpu=forms.pack_flags, triton="bitmaps:pack_flags")  # fmt: skip
# table[codes] of that shape; table [2**bits] in the dtype of the result.
decode_table = operator(
    "decode_table(Tensor codes, Tensor table, SymInt[] shape, int bits) -> Tensor",
    _decode_table, _decode_table_fake, cpu=forms.decode_table, triton="bitmaps:decode_table",
)  # fmt: skip
# The same with the entries of the table as numbers, which are the same in every call.
decode_levels = operator(
    "decode_levels(Tensor codes, float[] levels, SymInt[] shape, ScalarType dtype, int bits) -> Tensor",
    _decode_levels, _decode_levels_fake,
)  # fmt: skip
