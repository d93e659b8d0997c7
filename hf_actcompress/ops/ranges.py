"""Numbers that describe a tensor: one scale for all of it, scales of its features."""

from __future__ import annotations

import torch
from torch import Tensor

from .cpu import forms
from .layout import in_memory_order
from .library import operator
from .scales import finite_scale, flushed, usable

SAMPLE = 1024  # rows from which scales of features are estimated
FLOOR = 2.0**-8


def _of_range(lo: Tensor, hi: Tensor, levels: float, symmetric: bool, nonfinite: Tensor | None) -> Tensor:
    if symmetric:
        least, step = torch.zeros_like(lo), usable(torch.maximum(-lo, hi) / levels)
    else:
        least, step = flushed(lo), usable(hi / levels - lo / levels)  # hi - lo could overflow
    scale = torch.stack(finite_scale(least, step, levels))
    if nonfinite is not None:
        nonfinite += scale[1].isnan()
    return scale


def _tensor_scale(x: Tensor, levels: float, symmetric: bool, nonfinite: Tensor | None) -> Tensor:
    # In the order of the shape a tensor with channels last would be copied first, which takes ten times as long.
    lo, hi = torch.aminmax(in_memory_order(x))
    return _of_range(lo.float(), hi.float(), levels, symmetric, nonfinite)


def _tensor_scale_cpu(x: Tensor, levels: float, symmetric: bool, nonfinite: Tensor | None) -> Tensor | None:
    found = forms.extremes(x)
    return NotImplemented if found is NotImplemented else _of_range(found[0], found[1], levels, symmetric, nonfinite)


def _tensor_scale_fake(x: Tensor, levels: float, symmetric: bool, nonfinite: Tensor | None) -> Tensor:
    return x.new_empty(2, dtype=torch.float32)


def _feature_scales(x: Tensor) -> Tensor:
    # [B, C, H, W] -> [B, C, H*W], else [rows, F]; the stride is odd so that no period of the rows aliases
    x = x.flatten(2) if x.dim() == 4 else x.reshape(-1, x.shape[-1])
    stride = x.numel() // x.shape[1] // SAMPLE | 1
    x = (x[..., ::stride] if x.dim() == 3 else x[::stride]).float().contiguous()  # one order of sums
    x = x.nan_to_num(0.0, 0.0, 0.0)  # only the groups in which they are found are lost
    others = [d for d in range(x.dim()) if d != 1]
    # Squares of large or tiny values would leave the range of fp32; a power of two changes no digit.
    unit = torch.exp2(torch.floor(torch.log2(torch.maximum(x.amax(), -x.amin()).clamp_min(2.0**-120))))
    x = x / unit
    mean = x.mean(others, keepdim=True)
    var = (x - mean).square_().mean(others)  # torch.var_mean is slow along columns
    mean = mean.view(-1)
    stored = mean.bfloat16()
    # What the stored mean leaves of a constant feature has to be coded as well.
    root = (var + (mean - stored.float()) ** 2) ** 0.25
    # The floor keeps features that look constant in the sample from being lost, or from being divided by nothing.
    top = root.max()
    root = torch.where(top > 0, root.clamp_min(top * FLOOR), torch.ones_like(root))
    return torch.stack([stored * unit.bfloat16(), (root * torch.sqrt(unit)).bfloat16()])


def _feature_scales_fake(x: Tensor) -> Tensor:
    return x.new_empty(2, x.shape[1] if x.dim() == 4 else x.shape[-1], dtype=torch.bfloat16)


def _count_nonfinite(x: Tensor, nonfinite: Tensor) -> None:
    nonfinite += (~torch.isfinite(in_memory_order(x))).any()


def _nothing(x: Tensor, nonfinite: Tensor) -> None:
    return None


# Adds 1 to `nonfinite` (int64 [1]) if NaN or Inf is in x.
count_nonfinite = operator("count_nonfinite(Tensor x, Tensor(a!) nonfinite) -> ()", _count_nonfinite, _nothing,
                           cpu=forms.count_nonfinite, triton="ranges:count_nonfinite")  # fmt: skip
# x (any shape) -> fp32 [2]: minimum and (maximum - minimum) / levels; symmetric: 0 and the largest magnitude / levels.
# Both are NaN, and `nonfinite` (int64 [1], or None) is raised, where NaN or Inf is in x.
tensor_scale = operator(
    "tensor_scale(Tensor x, float levels, bool symmetric, Tensor(a!)? nonfinite) -> Tensor",
    _tensor_scale, _tensor_scale_fake, cpu=_tensor_scale_cpu, triton="ranges:tensor_scale",
)  # fmt: skip
# x ([B, F, H, W] or [..., F]) -> bf16 [2, F]: mean and square root of the deviation of each feature, from
# about SAMPLE evenly spaced rows.  An inexact scale costs a little error: the same numbers are applied and undone.
feature_scales = operator("feature_scales(Tensor x) -> Tensor", _feature_scales, _feature_scales_fake,
                          triton="ranges:feature_scales")  # fmt: skip
