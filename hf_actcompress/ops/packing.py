"""Bit packing: 3-bit codes take 3 bits.

Codes of `bits` bits are cut into planes whose widths are powers of two (3 = 2 + 1, 12 = 8 + 4).  In a plane the row
is cut into 8 / width equal runs, and byte j joins element j of every run.  So all loads and stores are contiguous,
which vectorises on a CPU and coalesces on a GPU; neighbouring elements never share a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_BITS = 16
COLS = 128  # elements that are packed together where they share no scale of their own


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


def codes_nbytes(n: int, cols: int, bits: int) -> int:
    """Bytes of n codes in rows of `cols`, each packed for itself, the last one up to a multiple of 8."""
    full, rest = n // cols, n % cols  # not divmod, which torch.compile does not know for symbolic sizes
    return (full * cols + ceil8(rest)) * bits // 8


def packed_nbytes(n: int, bits: int) -> int:
    """Bytes of `n` packed codes; `n` is rounded up to a multiple of 8."""
    return ceil8(n) * bits // 8


def code_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.int32


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [..., C] of uint8 or int32 with values below 2**bits, C a multiple of 8 -> uint8 [..., C * bits / 8]."""
    cols = codes.shape[-1]
    out = []
    for width, shift in planes(bits):
        field = codes >> shift if shift else codes
        if width + shift < bits:
            field = field & ((1 << width) - 1)
        field = field.to(torch.uint8)
        run = cols * width // 8
        if width < 8:
            parts = [field[..., k * run : (k + 1) * run] for k in range(8 // width)]
            field = parts[0]
            for k in range(1, len(parts)):
                field = field | (parts[k] << (k * width))
        out.append(field)
    return out[0].contiguous() if len(out) == 1 else torch.cat(out, dim=-1)


def unpack(packed: Tensor, bits: int, cols: int) -> Tensor:
    """uint8 [..., cols * bits / 8] -> codes [..., cols], uint8 up to 8 bits and int32 above."""
    codes = None
    start = 0
    for width, shift in planes(bits):
        nbytes = cols * width // 8
        part = packed[..., start : start + nbytes]
        start += nbytes
        if width < 8:
            mask = (1 << width) - 1
            part = torch.cat([(part >> (k * width)) & mask for k in range(8 // width)], dim=-1)
        part = part.to(code_dtype(bits))
        part = part << shift if shift else part
        codes = part if codes is None else codes | part
    return codes
