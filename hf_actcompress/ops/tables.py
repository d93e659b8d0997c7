"""Values by groups whose limits are sorted numbers: quantiles (sort) and codebooks (kmeans).

    group = number of edges at or below x
    code = group << (bits - splits) | round((x - minimum) / step)

With splits == bits a group is one number, its centroid.  Codes are packed in rows of COLS elements, the last one
filled with its last value up to a multiple of 8.  Where scales are NaN, NaN is decoded; where the first one is, all
codes are 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cpu import tables as cpu
from .groups import rows, tiles
from .layout import memory_order
from .library import operator
from .packing import COLS, code_dtype, codes_nbytes, pack, unpack
from .reductions import sample_stride, strided_values
from .scales import finite_scale, flushed, to_dtype, usable


def _sorted_sample(x: Tensor, size: int) -> Tensor:
    return strided_values(x, size).sort().values


def _sorted_sample_fake(x: Tensor, size: int) -> Tensor:
    return x.new_empty(-(-x.numel() // sample_stride(x.numel(), size)))


def _quantile_scales(sample: Tensor, scale: Tensor, bits: int, splits: int) -> tuple[Tensor, Tensor]:
    count, top = 2**splits, 2 ** (bits - splits) - 1
    lo = sample[torch.arange(count, device=sample.device) * sample.numel() // count].float()
    edges = lo[1:].contiguous()
    most = (scale[1:] + scale[:1] / 4) / top * 4  # the maximum / top; 4 keeps both within fp32
    lo, ends = torch.cat([scale[:1], edges]), torch.cat([edges / top, most])
    lo, step = finite_scale(flushed(lo), usable(ends - lo / top))
    bad = scale[1].isnan()
    return edges, torch.stack([torch.where(bad, torch.nan, lo), torch.where(bad, torch.nan, step)], 1)


def _quantile_scales_fake(sample, scale, bits, splits):  # noqa: ANN001, ANN202
    return (sample.new_empty(2**splits - 1, dtype=torch.float32),
            sample.new_empty(2**splits, 2, dtype=torch.float32))  # fmt: skip


def _coded(y: Tensor, edges: Tensor, scales: Tensor, bits: int, splits: int) -> tuple[Tensor, Tensor]:
    """Groups (int32) and steps in them (fp32) of values y."""
    y = y.float().contiguous()
    group = torch.bucketize(y, edges, out_int32=True, right=True) * ~scales.view(-1)[0].isnan()
    if splits == bits:
        return group, torch.zeros_like(y)
    inner = torch.round((y - scales[:, 0][group]) * (1 / scales[:, 1])[group])
    return group, inner.clamp_(0, 2 ** (bits - splits) - 1).nan_to_num_(0.0)


def _values(group: Tensor, inner: Tensor, scales: Tensor, bits: int, splits: int) -> Tensor:
    return scales[group] if splits == bits else scales[:, 0][group] + inner * scales[:, 1][group]


def _quantize(x: Tensor, edges: Tensor, scales: Tensor, bits: int, splits: int) -> Tensor:
    flat, codes = x.reshape(-1), _quantize_fake(x, edges, scales, bits, splits)
    for first, count, width in tiles(flat.numel(), COLS, x.device):
        group, inner = _coded(rows(flat, first, count, width, COLS), edges, scales, bits, splits)
        code = (group << (bits - splits)) + inner.to(torch.int32)
        begin = first * COLS * bits // 8
        codes[begin : begin + count * width * bits // 8] = pack(code.to(code_dtype(bits)), bits).view(-1)
    return codes


def _quantize_fake(x, edges, scales, bits, splits):  # noqa: ANN001, ANN202
    return x.new_empty(codes_nbytes(x.numel(), COLS, bits), dtype=torch.uint8)


def _dequantize(
    codes: Tensor, scales: Tensor, shape: list[int], dtype: torch.dtype, bits: int, splits: int
) -> Tensor:  # fmt: skip
    n, inner = math.prod(shape), bits - splits
    out = codes.new_empty(n, dtype=dtype)
    for first, count, width in tiles(n, COLS, codes.device):
        begin = first * COLS * bits // 8
        code = unpack(codes[begin : begin + count * width * bits // 8].view(count, -1), bits, width).int()
        y = _values(code >> inner, (code & (2**inner - 1)).float(), scales, bits, splits)
        out[first * COLS : first * COLS + y.numel()] = to_dtype(y, dtype).view(-1)[: n - first * COLS]
    return out.view(shape)


def _dequantize_fake(codes, scales, shape, dtype, bits, splits):  # noqa: ANN001, ANN202
    return codes.new_empty(shape, dtype=dtype)


def _roundtrip(x: Tensor, edges: Tensor, scales: Tensor, bits: int, splits: int) -> Tensor:
    order = memory_order(x)
    flat, out = x.permute(order).reshape(-1), torch.empty_like(x)
    lying = out.permute(order)
    dense = lying.is_contiguous()
    whole = lying.reshape(-1) if dense else flat.new_empty(flat.numel())
    for first, count, width in tiles(flat.numel(), COLS, x.device):
        run = flat[first * COLS : first * COLS + count * width]
        y = _values(*_coded(run, edges, scales, bits, splits), scales, bits, splits)
        whole[first * COLS : first * COLS + run.numel()] = to_dtype(y, x.dtype)
    return out if dense else out.copy_(whole.view(x.shape))


def _roundtrip_fake(x, edges, scales, bits, splits):  # noqa: ANN001, ANN202
    return torch.empty_like(x)


# x (any shape, float) -> about `size` of its values, evenly spaced in the order of its shape, ascending (NaN last);
# all of them where there are not many more.
sorted_sample = operator("sorted_sample(Tensor x, int size) -> Tensor", _sorted_sample, _sorted_sample_fake,
                         cpu=cpu.sorted_sample)  # fmt: skip
# A sorted sample [n] and what `tensor_scale` with 4 levels says of the whole tensor (fp32 [2]) -> edges fp32
# [2**splits - 1] at equal counts, and scales fp32 [2**splits, 2] (minimum, step) from edge to edge.
quantile_scales = operator(
    "quantile_scales(Tensor sample, Tensor scale, int bits, int splits) -> (Tensor, Tensor)",
    _quantile_scales, _quantile_scales_fake, triton="tables:quantile_scales",
)  # fmt: skip
# x (any shape, float), edges fp32 ascending, scales [2**splits, 2], or centroids [2**bits] where splits == bits.
quantize_sorted = operator(
    "quantize_sorted(Tensor x, Tensor edges, Tensor scales, int bits, int splits) -> Tensor",
    _quantize, _quantize_fake, cpu=cpu.quantize_sorted, triton="tables:quantize_sorted",
)  # fmt: skip
dequantize_sorted = operator(
    "dequantize_sorted(Tensor codes, Tensor scales, SymInt[] shape, ScalarType dtype, int bits, int splits) -> Tensor",
    _dequantize, _dequantize_fake, cpu=cpu.dequantize_sorted, triton="tables:dequantize_sorted",
)  # fmt: skip
# What the two make of x, without codes; with the strides of x where they are dense.
roundtrip_sorted = operator(
    "roundtrip_sorted(Tensor x, Tensor edges, Tensor scales, int bits, int splits) -> Tensor",
    _roundtrip, _roundtrip_fake, cpu=cpu.roundtrip_sorted, triton="tables:roundtrip_sorted",
)  # fmt: skip
