"""Groups of consecutive elements, each with a minimum and a step: to packed codes, back, and both at once.

    codes = round((y - minimum) / step),   y = x, or (x - mean) / root of its feature

The groups of a tensor are runs of `cols` elements in the order of its shape; the last one may be shorter and is filled
with its last value up to a multiple of 8.  Each group is packed for itself (packing.py), one after another.
A group in which NaN or Inf is found, or whose range is beyond fp32, gets NaN as minimum and step: NaN comes out where
NaN went in, and `nonfinite` counts the groups.

The element i of a tensor belongs to feature i // inner % F of `features` (bf16 [2, F]: mean and root).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu import forms
from .library import operator
from .packing import ceil8, code_dtype, codes_nbytes, pack, unpack
from .rounding import noise
from .scales import ceil16, finite_scale, floor16, flushed, to_dtype, usable

TILE = 1 << 17  # elements: what a chain of torch's operations makes of so many stays in the cache of a CPU core


def group_count(n: int, cols: int) -> int:
    return -(-n // cols)


def tiles(n: int, cols: int, device: torch.device) -> Iterator[tuple[int, int, int]]:
    """(first group, groups, columns) of runs that are best computed at once; the short group comes by itself."""
    full, rest = divmod(n, cols)
    step = max(1, TILE // cols) if device.type == "cpu" else max(1, full)
    for first in range(0, full, step):
        yield first, min(step, full - first), cols
    if rest:
        yield full, 1, ceil8(rest)


def rows(flat: Tensor, first: int, count: int, width: int, cols: int) -> Tensor:
    """Those groups [count, width]; a short one is filled with its last value."""
    run = flat[first * cols : first * cols + count * width]
    missing = count * width - run.numel()
    return (torch.cat([run, run[-1:].expand(missing)]) if missing else run).view(count, width)


def feature_values(features: Tensor, inner: int, n: int, first: int, y: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Mean and root, fp32, of the feature of each element; of the last one for what fills a short group."""
    index = torch.arange(first * cols, first * cols + y.numel(), device=y.device).clamp_(max=n - 1).view(y.shape)
    at = index // inner % features.shape[1]
    return features[0].float()[at], features[1].float()[at]


def counters(first: int, y: Tensor, cols: int) -> Tensor:
    """int32: the index of each element in the tensor, modulo 2**32."""
    index = torch.arange(first * cols, first * cols + y.numel(), device=y.device)
    return (index & 0xFFFFFFFF).to(torch.int32).view(y.shape)  # int64 -> int32 keeps the low bits


def group_scales(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """fp32 [R, C] -> minimum and step of each row [R], as bf16 holds them, in fp32."""
    top = 2**bits - 1
    lo, hi = y.amin(-1), y.amax(-1)
    lo = floor16(flushed(lo))
    # Not hi - lo, which could overflow; not a division, which takes longer than all the rest of a group.
    return finite_scale(lo, usable(ceil16(hi * (1 / top) - lo * (1 / top))), top)


def _coded(
    flat: Tensor, features: Tensor | None, inner: int, scale: Tensor | None, cols: int, bits: int, key: int | None,
    nonfinite: Tensor | None, tile: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """Codes fp32 [R, C], minimum and step [R], mean and root [R, C] of one tile."""
    first, count, width = tile
    y, own = rows(flat, first, count, width, cols).float(), None
    if features is not None:
        own = feature_values(features, inner, flat.numel(), first, y, cols)
        y = (y - own[0]) * (1 / own[1])
    if scale is None:
        lo, step = group_scales(y, bits)
        if nonfinite is not None:
            nonfinite += step.isnan().sum()
    else:
        lo, step = scale[:1], scale[1:]
    y = (y - lo[:, None]) * (1 / step)[:, None]
    y = torch.round(y) if key is None else torch.floor(y + noise(counters(first, y, cols), key))
    return y.clamp(0, 2**bits - 1).nan_to_num_(0.0), lo, step, own


def _quantize(
    x: Tensor, features: Tensor | None, inner: int, scale: Tensor | None, cols: int, bits: int, key: int | None,
    nonfinite: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    flat = x.reshape(-1)
    codes, scales = _quantize_fake(x, features, inner, scale, cols, bits, key, nonfinite)
    for tile in tiles(flat.numel(), cols, x.device):
        first, count, width = tile
        code, lo, step, _ = _coded(flat, features, inner, scale, cols, bits, key, nonfinite, tile)
        begin = first * cols * bits // 8
        codes[begin : begin + count * width * bits // 8] = pack(code.to(code_dtype(bits)), bits).view(-1)
        if scale is None:
            scales[first : first + count] = torch.stack([lo, step], -1)
    return codes, scales


def _quantize_fake(x, features, inner, scale, cols, bits, key, nonfinite):  # noqa: ANN001, ANN202
    groups = 0 if scale is not None else group_count(x.numel(), cols)
    return (x.new_empty(codes_nbytes(x.numel(), cols, bits), dtype=torch.uint8),
            x.new_empty(groups, 2, dtype=torch.bfloat16))  # fmt: skip


def _dequantize(
    codes: Tensor, scales: Tensor, features: Tensor | None, inner: int, shape: list[int], dtype: torch.dtype,
    cols: int, bits: int,
) -> Tensor:  # fmt: skip
    n = math.prod(shape)
    out = codes.new_empty(n, dtype=dtype)
    for first, count, width in tiles(n, cols, codes.device):
        begin = first * cols * bits // 8
        packed = codes[begin : begin + count * width * bits // 8].view(count, -1)
        lo, step = scales.float().view(-1, 2)[slice(None) if scales.numel() == 2 else slice(first, first + count)].T
        y = lo[:, None] + unpack(packed, bits, width).float() * step[:, None]
        if features is not None:
            mean, root = feature_values(features, inner, n, first, y, cols)
            y = y * root + mean
        out[first * cols : first * cols + y.numel()] = to_dtype(y, dtype).view(-1)[: n - first * cols]
    return out.view(shape)


def _dequantize_fake(codes, scales, features, inner, shape, dtype, cols, bits):  # noqa: ANN001, ANN202
    return codes.new_empty(shape, dtype=dtype)


def _roundtrip(
    x: Tensor, features: Tensor | None, inner: int, scale: Tensor | None, cols: int, bits: int, key: int | None,
    nonfinite: Tensor | None,
) -> Tensor:  # fmt: skip
    flat, out = x.reshape(-1), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for tile in tiles(flat.numel(), cols, x.device):
        code, lo, step, own = _coded(flat, features, inner, scale, cols, bits, key, nonfinite, tile)
        y = lo[:, None] + code * step[:, None]
        y = y if own is None else y * own[1] + own[0]
        begin = tile[0] * cols
        out.view(-1)[begin : begin + y.numel()] = to_dtype(y, x.dtype).view(-1)[: flat.numel() - begin]
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)


def _roundtrip_fake(x, features, inner, scale, cols, bits, key, nonfinite):  # noqa: ANN001, ANN202
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)


_ARGUMENTS = (
    "Tensor x, Tensor? features, int inner, Tensor? scale, int cols, int bits, int? key, Tensor(a!)? nonfinite"
)

# x (any shape, float) -> codes uint8 [bytes], scales bf16 [groups, 2] (minimum, step).
# scale: fp32 [2] for all groups instead of their own, then `scales` is [0, 2].
# key: signed 32 bits of stochastic rounding, None rounds to nearest.  nonfinite: int64 [1], or None.
quantize_groups = operator(f"quantize_groups({_ARGUMENTS}) -> (Tensor, Tensor)", _quantize, _quantize_fake,
                           cpu=forms.quantize_groups, triton="groups:quantize_groups")  # fmt: skip
# The inverse; scales bf16 [groups, 2], or [2] fp32 for all.
dequantize_groups = operator(
    "dequantize_groups(Tensor codes, Tensor scales, Tensor? features, int inner, SymInt[] shape, ScalarType dtype, "
    "int cols, int bits) -> Tensor",
    _dequantize, _dequantize_fake, cpu=forms.dequantize_groups, triton="groups:dequantize_groups",
)  # fmt: skip
# What the two make of x, without codes; with the strides of x where they are dense.
roundtrip_groups = operator(f"roundtrip_groups({_ARGUMENTS}) -> Tensor", _roundtrip, _roundtrip_fake,
                            cpu=forms.roundtrip_groups, triton="groups:roundtrip_groups")  # fmt: skip
