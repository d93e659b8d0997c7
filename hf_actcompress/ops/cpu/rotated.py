"""The operators of ops/rotated.py in C++."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from .. import gaussian, trellis
from ..allocation import moves
from ..hadamard import signs
from .forms import FLOATS, KINDS, LARGEST, FeatureTables, check, flat_tensor, pointer, raise_counter
from .library import library_for

CPU = torch.device("cpu")


def _takes(cols: int, n: int, dtype: torch.dtype) -> bool:
    return dtype in FLOATS and 16 <= cols <= LARGEST and library_for(n) is not None


def _levels(paths: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Edges, levels, decoded levels."""
    if paths:
        return trellis.tables(CPU)
    edges, levels = gaussian.tables(CPU)
    return edges, levels, levels


def _moves(bits: int, paths: bool) -> tuple[int, ctypes.Array]:
    found = [value for pair in moves(bits, paths) for value in pair]
    return len(found) // 2, (ctypes.c_float * len(found))(*found)


def _encode(x: Tensor, features, inner, cols, bits, paths, nonfinite, codes, out) -> Tensor:  # noqa: ANN001
    tables, n = FeatureTables(features, inner, x.numel(), cols), x.numel()
    inverse, levels, (steps, limits) = tables.inverse, _levels(paths), _moves(bits, paths)
    scales = torch.empty(-(-n // cols), 2, dtype=torch.bfloat16)
    count = library_for(n).rotated_codes(
        x.data_ptr(), KINDS[x.dtype], pointer(tables.mean), pointer(inverse), pointer(tables.root), tables.period,
        n, cols, bits, steps, paths, signs(cols, CPU).data_ptr(), *map(pointer, levels), limits, scales.data_ptr(),
        pointer(codes), pointer(out),
    )  # fmt: skip
    raise_counter(nonfinite, count)
    return scales


def quantize_rotated(x, features, inner, cols, bits, paths, nonfinite):  # noqa: ANN001, ANN201
    if not _takes(cols, x.numel(), x.dtype):
        return NotImplemented
    codes = torch.empty(-(-x.numel() // cols) * bits * cols // 8, dtype=torch.uint8)
    return codes, _encode(x.contiguous(), features, inner, cols, bits, paths, nonfinite, codes, None)


def roundtrip_rotated(x, features, inner, cols, bits, paths, nonfinite):  # noqa: ANN001, ANN201
    if not _takes(cols, x.numel(), x.dtype):
        return NotImplemented
    out = flat_tensor(x.numel(), x.dtype)
    _encode(x.contiguous(), features, inner, cols, bits, paths, nonfinite, None, out)
    return out.view(x.shape)


def dequantize_rotated(codes, scales, features, inner, shape, dtype, cols, bits, paths):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if not _takes(cols, n, dtype):
        return NotImplemented
    check("codes", codes.nbytes, -(-n // cols) * bits * cols // 8)
    check("scales", scales.nbytes, 4 * -(-n // cols))
    codes, scales, out = codes.contiguous(), scales.contiguous(), flat_tensor(n, dtype)
    tables, (steps, limits) = FeatureTables(features, inner, n, cols), _moves(bits, paths)
    library_for(n).rotated_values(
        codes.data_ptr(), scales.data_ptr(), pointer(tables.mean), pointer(tables.root), tables.period, n, cols,
        bits, steps, paths, signs(cols, CPU).data_ptr(), _levels(paths)[2].data_ptr(), limits, KINDS[dtype],
        out.data_ptr(),
    )  # fmt: skip
    return out.view(shape)
