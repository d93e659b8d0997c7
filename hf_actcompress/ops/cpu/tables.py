"""The operators of ops/tables.py in C++, and the sort of a sample by numpy."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..layout import in_memory_order
from ..packing import COLS, codes_nbytes
from ..reductions import strided_values
from .forms import FLOATS, KINDS, check, flat_tensor
from .library import library_for


def sorted_sample(x, size):  # noqa: ANN001, ANN201
    """numpy takes a quarter of the time of torch."""
    sample = strided_values(x, size)
    wide = sample if sample.dtype == torch.float64 else sample.float()
    return torch.from_numpy(np.sort(wide.numpy())).to(x.dtype)


def _scale(scales, bits, splits):  # noqa: ANN001, ANN202
    """Minimum and inverse step of each group, contiguous."""
    if splits == bits:
        return scales.float().contiguous(), torch.ones_like(scales)
    return scales[:, 0].contiguous(), scales[:, 1].contiguous()


def _run(x, edges, scales, bits, splits, codes, out) -> None:  # noqa: ANN001
    low, step = _scale(scales, bits, splits)
    inverse = 1 / step
    library_for(x.numel()).sorted_codes(
        x.data_ptr(), KINDS[x.dtype], x.numel(), edges.data_ptr(), low.data_ptr(), step.data_ptr(), inverse.data_ptr(),
        bits, splits, codes, out,
    )  # fmt: skip


def quantize_sorted(x, edges, scales, bits, splits):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel() or library_for(x.numel()) is None:
        return NotImplemented
    x, n = x.contiguous(), x.numel()
    codes = torch.empty(codes_nbytes(n, COLS, bits), dtype=torch.uint8)
    _run(x, edges.contiguous(), scales, bits, splits, codes.data_ptr(), None)
    return codes


def roundtrip_sorted(x, edges, scales, bits, splits):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel() or library_for(x.numel()) is None:
        return NotImplemented
    lying = in_memory_order(x)
    dense = lying.is_contiguous()
    lying, out = (lying if dense else x.contiguous()), flat_tensor(x.numel(), x.dtype)
    _run(lying, edges.contiguous(), scales, bits, splits, None, out.data_ptr())
    return out.as_strided(x.shape, x.stride()) if dense else torch.empty_like(x).copy_(out.view(x.shape))


def dequantize_sorted(codes, scales, shape, dtype, bits, splits):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if dtype not in FLOATS or not n or (library := library_for(n)) is None:
        return NotImplemented
    low, step = _scale(scales, bits, splits)
    inner = torch.arange(2 ** (bits - splits), dtype=torch.float32)
    table = low if splits == bits else (low[:, None] + inner * step[:, None]).view(-1)
    check("codes", codes.nbytes, codes_nbytes(n, COLS, bits))
    check("table", table.numel(), 2**bits)
    codes, out = codes.contiguous(), flat_tensor(n, dtype)
    library.table_values(codes.data_ptr(), bits, n, COLS, table.data_ptr(), KINDS[dtype], out.data_ptr())
    return out.view(shape)
