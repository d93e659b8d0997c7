"""The operators of ops/selection.py in C++."""

from __future__ import annotations

import math

import torch

from ..layout import in_memory_order
from .forms import FLOATS, KINDS, check, flat_tensor
from .library import library_for


def select_largest(x, k, bitmap):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or (library := library_for(x.numel())) is None:
        return NotImplemented
    x, n = x.contiguous(), x.numel()
    values, wide = x.new_empty(k), n >= 2**31
    where = torch.empty(-(-n // 8), dtype=torch.uint8) if bitmap else torch.empty(
        k, dtype=torch.int64 if wide else torch.int32)  # fmt: skip
    library.select_largest(x.data_ptr(), KINDS[x.dtype], n, k, values.data_ptr(), where.data_ptr(),
                           0 if bitmap else 2 if wide else 1)  # fmt: skip
    return values, where


def keep_largest(x, k):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or (library := library_for(x.numel())) is None:
        return NotImplemented
    out, n = flat_tensor(x.numel(), x.dtype), x.numel()
    moved = not x.is_contiguous() and in_memory_order(x).is_contiguous()
    if moved and library.keep_largest(x.data_ptr(), KINDS[x.dtype], n, k, True, out.data_ptr()):
        return out.as_strided(x.shape, x.stride())
    own = x.contiguous()
    library.keep_largest(own.data_ptr(), KINDS[x.dtype], n, k, False, out.data_ptr())
    return out.view(x.shape) if x.is_contiguous() else torch.empty_like(x).copy_(out.view(x.shape))


def place_values(values, bits, shape):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if (library := library_for(n)) is None:
        return NotImplemented
    check("positions", bits.nbytes, -(-n // 8))
    values, bits, out = values.contiguous(), bits.contiguous(), flat_tensor(n, values.dtype)
    library.place_values(values.data_ptr(), values.numel(), values.element_size(), bits.data_ptr(), n, out.data_ptr())
    return out.view(shape)
