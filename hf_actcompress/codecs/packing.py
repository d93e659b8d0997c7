"""Bit packing: 3-bit codes take 3 bits.

Codes of `bits` bits are cut into planes whose widths are powers of two (3 = 2 + 1, 12 = 8 + 4).  In a plane the row
is cut into 8 / width equal runs, and byte j joins element j of every run.  So all loads and stores are contiguous,
which vectorises on a CPU and coalesces on a GPU; neighbouring elements never share a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 16


def planes(bits: int) -> list[tuple[int, int]]:
    """(width, shift) of each plane, widest first: 12 -> [(8, 4), (4, 0)]."""
    result, left = [], bits
    for width in (8, 8, 4, 2, 1):
        if left >= width:
            left -= width
            result.append((width, left))
    return result


def ceil8(n: int) -> int:
    return -(-n // 8) * 8


def packed_nbytes(n: int, bits: int) -> int:
    """Bytes of `n` packed codes; `n` is rounded up to a multiple of 8."""
    return ceil8(n) * bits // 8


def code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [R, C] of uint8 or int32 with values below 2**bits, C a multiple of 8 -> uint8 [R, C * bits / 8]."""
    rows, cols = codes.shape
    out = []
    for width, shift in planes(bits):
        field = codes >> shift if shift else codes
        if width + shift < bits:
            field = field & ((1 << width) - 1)
        field = field.to(torch.uint8)
        runs = 8 // width
        if runs > 1:
            run = field.view(rows, runs, cols // runs)
            field = run[:, 0]
            for k in range(1, runs):
                field = field | (run[:, k] << (k * width))
        out.append(field)
    return out[0].contiguous() if len(out) == 1 else torch.cat(out, dim=1)


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """uint8 [R, cols * bits / 8] -> codes [R, cols], uint8 up to 8 bits and int32 above."""
    rows = packed.shape[0]
    codes = None
    start = 0
    for width, shift in planes(bits):
        nbytes = cols * width // 8
        part = packed[:, start : start + nbytes]
        start += nbytes
        runs = 8 // width
        if runs > 1:
            mask = (1 << width) - 1
            part = torch.stack([(part >> (k * width)) & mask for k in range(runs)], dim=1).view(rows, cols)
        part = part.to(code_dtype(bits))
        part = part << shift if shift else part
        codes = part if codes is None else codes | part
    return codes
