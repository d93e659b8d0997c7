"""Decoding of ops/float8.py in C++: a table of the 256 numbers times the scale.

Encoding in plain torch costs about as much as a copy, and stays.
"""

from __future__ import annotations

import math

import torch

from ..groups import tiles
from ..packing import COLS
from ..scales import to_dtype
from .forms import FLOATS, KINDS, check, flat_tensor
from .library import library_for


def _table(scale, kind):  # noqa: ANN001, ANN202
    return torch.arange(256, dtype=torch.uint8).view(kind).float() * scale[-1]


def _values(library, codes, table, out) -> None:  # noqa: ANN001
    """codes uint8 [n], contiguous -> out [n]; the library reads eight codes at a time."""
    most = codes.numel() // 8 * 8
    if most:
        library.table_values(codes.data_ptr(), 8, most, COLS, table.data_ptr(), KINDS[out.dtype], out.data_ptr())
    out[most:] = to_dtype(table[codes[most:].int()], out.dtype)


def decode(kind, codes, scale, shape, dtype):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if dtype not in FLOATS or not n or (library := library_for(n)) is None:
        return NotImplemented
    check("codes", codes.numel(), n)
    out = flat_tensor(n, dtype)
    _values(library, codes.contiguous().view(-1), _table(scale, kind), out)
    return out.view(shape)


def roundtrip(kind, coded, x, scale):  # noqa: ANN001, ANN201
    """coded: what encodes a piece of x, to float8."""
    n = x.numel()
    if x.dtype not in FLOATS or not n or (library := library_for(n)) is None:
        return NotImplemented
    flat, out, table = x.reshape(-1), flat_tensor(n, x.dtype), _table(scale, kind)
    for first, count, width in tiles(n, COLS, x.device):
        piece = slice(first * COLS, first * COLS + count * width)
        _values(library, coded(flat[piece], scale).view(torch.uint8), table, out[piece])
    out = out.view(x.shape)
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)
