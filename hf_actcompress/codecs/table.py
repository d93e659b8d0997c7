"""Codes by thresholds, values by table: what sort quantization and k-means share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .packing import code_dtype, pack, packed_nbytes, unpack
from .rows import piece_shapes, row_pieces, tiles

COLS = 1024


def table_nbytes(n: int, bits: int) -> int:
    """Bytes of `n` packed codes in rows of COLS."""
    return sum(rows * packed_nbytes(cols, bits) for rows, cols in piece_shapes(n, COLS))


def pack_codes(flat: Tensor, bits: int, assign) -> Tensor:
    """`assign` maps an fp32 tile [R, C] to integer codes; returns them packed, uint8 [table_nbytes(n, bits)]."""
    out = torch.empty(table_nbytes(flat.numel(), bits), dtype=torch.uint8, device=flat.device)
    at = 0
    for piece in row_pieces(flat, COLS):
        for start, stop in tiles(*piece.shape, flat.device):
            packed = pack(assign(piece[start:stop].float()).to(code_dtype(bits)), bits).reshape(-1)
            out[at : at + packed.numel()] = packed
            at += packed.numel()
    return out


def look_up(codes: Tensor, bits: int, table: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Packed codes and fp32 table [2**bits] -> tensor of `shape` and `dtype`."""
    out = torch.empty(math.prod(shape), dtype=dtype, device=codes.device)
    table = table.to(dtype)
    at = done = 0
    for rows, cols in piece_shapes(out.numel(), COLS):
        width = cols * bits // 8
        for start, stop in tiles(rows, cols, out.device):
            part = codes[at : at + (stop - start) * width].view(stop - start, width)
            y = table.index_select(0, unpack(part, bits, cols).view(-1).int())
            take = min(y.numel(), out.numel() - done)
            out[done : done + take] = y[:take]
            at, done = at + part.numel(), done + take
    return out.view(shape)
