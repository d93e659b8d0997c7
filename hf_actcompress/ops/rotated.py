"""Groups of elements rotated and coded by the levels of a Gaussian: to packed codes, back, and both at once.

    z = y - mean,  w = rotation of z over its deviation,  codes: the levels near w

    y = x, or (x - mean) / root of its feature

Groups lie as in groups.py, of a power of two of elements each; the last one is filled with its last value.  Mean and
deviation of a group are bf16, the deviation rounded up.  They are computed in units of a power of two near the largest
magnitude, so that squares neither overflow nor underflow.  The number of bits of a group depends on the deviations
(allocation.py).  A group in which NaN or Inf is found gets NaN as mean and deviation, and is decoded to NaN.

A plane holds one bit of the codes of a group: bit i of byte j is that of element 8 j + i.  Groups lie window by
window, each with its planes one after another, the lowest bit first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import gaussian, trellis
from .allocation import MOST, TOP, allocate, moves
from .cpu import rotated as cpu
from .groups import TILE, feature_values, group_count, rows
from .hadamard import butterflies, rotate, signs, sum_of_halves
from .library import operator
from .scales import ceil16, finite_scale, to_dtype

BOUND = 2.0**126  # a power of two whose inverse is a normal number


def codes_nbytes(n: int, cols: int, bits: int) -> int:
    """Bytes of the codes of n elements."""
    return group_count(n, cols) * bits * cols // 8


def _tiles(n: int, cols: int, device: torch.device) -> list[tuple[int, int]]:
    """(first group, groups)"""
    count = group_count(n, cols)
    step = max(1, TILE // cols) if device.type == "cpu" else count
    return [(first, min(step, count - first)) for first in range(0, count, step)]


def _equalized(
    flat: Tensor, features: Tensor | None, inner: int, cols: int, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """Values fp32 [R, cols] in units of a power of two of each row, and the inverse of that [R, 1]."""
    y = rows(flat, first, count, cols, cols).float()
    if features is not None:
        mean, root = feature_values(features, inner, flat.numel(), first, y, cols)
        y = (y - mean) * (1 / root)
    top = y.abs().amax(1, keepdim=True)
    unit = (top.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(1 / BOUND, BOUND)
    inverse = 1 / unit
    return y * inverse, inverse


def _scales(y: Tensor, inverse: Tensor) -> Tensor:
    """-> bf16 [R, 2]"""
    share, unit = 1 / y.shape[1], 1 / inverse[:, 0]
    center = (sum_of_halves(y) * share * unit).bfloat16().float()
    z = y - center[:, None] * inverse
    spread = ceil16(torch.sqrt(sum_of_halves(z * z) * share) * unit)
    return torch.stack(finite_scale(center, spread), 1).bfloat16()


def _all_scales(x: Tensor, features: Tensor | None, inner: int, cols: int, nonfinite: Tensor | None) -> Tensor:
    flat = x.reshape(-1)
    scales = x.new_empty(group_count(flat.numel(), cols), 2, dtype=torch.bfloat16)
    for first, count in _tiles(flat.numel(), cols, x.device):
        scales[first : first + count] = _scales(*_equalized(flat, features, inner, cols, first, count))
    if nonfinite is not None:
        nonfinite += scales[:, 1].isnan().sum()
    return scales


def _range(bits: int) -> tuple[int, int]:
    """The least and the most bits of a group."""
    change = min(MOST, bits, TOP - bits)
    return bits - change, bits + change


def _codes(y: Tensor, inverse: Tensor, scale: Tensor, given: Tensor, bits: int, paths: bool) -> Tensor:
    """uint8 [R, cols]; 0 in groups of NaN."""
    center, spread = scale.float().unsqueeze(-1).unbind(1)
    width = spread * inverse
    w = rotate(y - center * inverse) * torch.where(width > 0, 1 / width, 0.0)
    low, high = _range(bits)
    if paths:
        codes = trellis.quantize(w, given, low, high)
    else:
        codes = torch.zeros_like(w, dtype=torch.uint8)
        for b in range(max(low, 1), high + 1):
            codes = torch.where((given == b)[:, None], gaussian.quantize(w, b), codes)
    return codes.masked_fill_(spread.isnan() | (given == 0)[:, None], 0)


def _values(codes: Tensor, scale: Tensor, given: Tensor, bits: int, paths: bool) -> Tensor:
    """fp32 [R, cols]"""
    low, high = _range(bits)
    u = torch.zeros_like(codes, dtype=torch.float32)
    for b in range(max(low, 1), high + 1):
        u = torch.where((given == b)[:, None], (trellis if paths else gaussian).dequantize(codes, b), u)
    center, spread = scale.float().unsqueeze(-1).unbind(1)
    return butterflies(u) * signs(codes.shape[1], codes.device) * spread + center


def _unequalized(y: Tensor, features: Tensor | None, inner: int, n: int, first: int, dtype: torch.dtype) -> Tensor:
    if features is not None:
        mean, root = feature_values(features, inner, n, first, y, y.shape[1])
        y = y * root + mean
    return to_dtype(y, dtype).view(-1)


def _places(given: Tensor, before: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Where each plane of each group lies [R, most bits], and whether there is one."""
    plane = torch.arange(_range(bits)[1], device=given.device)
    return before[:, None] + plane, plane < given[:, None]


def _quantize(
    x: Tensor, features: Tensor | None, inner: int, cols: int, bits: int, paths: bool, nonfinite: Tensor | None
) -> tuple[Tensor, Tensor]:
    flat, scales = x.reshape(-1), _all_scales(x, features, inner, cols, nonfinite)
    given, before = allocate(scales[:, 1], bits, moves(bits, paths))
    total = len(scales) * bits
    planes = torch.empty(total + 1, cols // 8, dtype=torch.uint8, device=x.device)  # the last one is nobody's
    for first, count in _tiles(flat.numel(), cols, x.device):
        own = slice(first, first + count)
        y, inverse = _equalized(flat, features, inner, cols, first, count)
        codes = _codes(y, inverse, scales[own], given[own], bits, paths)
        place, there = _places(given[own], before[own], bits)
        bit = codes.view(count, 1, -1, 8) >> torch.arange(place.shape[1], device=x.device).view(-1, 1, 1) & 1
        packed = (bit << torch.arange(8, device=x.device)).sum(-1, dtype=torch.uint8)
        planes[torch.where(there, place, total)] = packed
    return planes[:total].reshape(-1), scales


def _quantize_fake(x, features, inner, cols, bits, paths, nonfinite):  # noqa: ANN001, ANN202
    return (x.new_empty(codes_nbytes(x.numel(), cols, bits), dtype=torch.uint8),
            x.new_empty(group_count(x.numel(), cols), 2, dtype=torch.bfloat16))  # fmt: skip


def _dequantize(
    codes: Tensor, scales: Tensor, features: Tensor | None, inner: int, shape: list[int], dtype: torch.dtype,
    cols: int, bits: int, paths: bool,
) -> Tensor:  # fmt: skip
    n, planes = math.prod(shape), codes.view(-1, cols // 8)
    given, before = allocate(scales[:, 1], bits, moves(bits, paths))
    out = codes.new_empty(n, dtype=dtype)
    for first, count in _tiles(n, cols, codes.device):
        own = slice(first, first + count)
        place, there = _places(given[own], before[own], bits)
        packed = planes[torch.where(there, place, 0)].masked_fill_(~there[..., None], 0)
        bit = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=codes.device) & 1
        weight = torch.arange(place.shape[1], device=codes.device).view(-1, 1, 1)
        y = _values((bit << weight).sum(1, dtype=torch.uint8).view(count, cols), scales[own], given[own], bits, paths)
        y = _unequalized(y, features, inner, n, first, dtype)
        out[first * cols : first * cols + y.numel()] = y[: n - first * cols]
    return out.view(shape)


def _dequantize_fake(codes, scales, features, inner, shape, dtype, cols, bits, paths):  # noqa: ANN001, ANN202
    return codes.new_empty(shape, dtype=dtype)


def _roundtrip(
    x: Tensor, features: Tensor | None, inner: int, cols: int, bits: int, paths: bool, nonfinite: Tensor | None
) -> Tensor:
    flat, scales = x.reshape(-1), _all_scales(x, features, inner, cols, nonfinite)
    given, _ = allocate(scales[:, 1], bits, moves(bits, paths))
    n, out = flat.numel(), torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    for first, count in _tiles(n, cols, x.device):
        own = slice(first, first + count)
        y, inverse = _equalized(flat, features, inner, cols, first, count)
        y = _values(_codes(y, inverse, scales[own], given[own], bits, paths), scales[own], given[own], bits, paths)
        y = _unequalized(y, features, inner, n, first, x.dtype)
        out[first * cols : first * cols + y.numel()] = y[: n - first * cols]
    return out.view(x.shape)


def _roundtrip_fake(x, features, inner, cols, bits, paths, nonfinite):  # noqa: ANN001, ANN202
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_ARGUMENTS = "Tensor x, Tensor? features, int inner, int cols, int bits, bool paths, Tensor(a!)? nonfinite"

# x (any shape, float, not empty) -> codes uint8 [bytes], scales bf16 [groups, 2] (mean, deviation).
# paths: trellis-coded (trellis.py).  features: bf16 [2, F] or None.  nonfinite: int64 [1], or None.
quantize_rotated = operator(f"quantize_rotated({_ARGUMENTS}) -> (Tensor, Tensor)", _quantize, _quantize_fake,
                            cpu=cpu.quantize_rotated, triton="rotated:quantize_rotated")  # fmt: skip
# The inverse.
dequantize_rotated = operator(
    "dequantize_rotated(Tensor codes, Tensor scales, Tensor? features, int inner, SymInt[] shape, ScalarType dtype, "
    "int cols, int bits, bool paths) -> Tensor",
    _dequantize, _dequantize_fake, cpu=cpu.dequantize_rotated, triton="rotated:dequantize_rotated",
)  # fmt: skip
# What the two make of x, without codes; contiguous.
roundtrip_rotated = operator(f"roundtrip_rotated({_ARGUMENTS}) -> Tensor", _roundtrip, _roundtrip_fake,
                             cpu=cpu.roundtrip_rotated, triton="rotated:roundtrip_rotated")  # fmt: skip
