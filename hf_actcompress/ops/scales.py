"""Scales of groups in 16 bits, rounded outwards so that no value falls out of range."""

from __future__ import annotations

import torch
from torch import Tensor


def floor16(x: Tensor) -> Tensor:
    """fp32 -> the largest bf16 value that is not above, as fp32."""
    bits = x.view(torch.int32)
    # Away from zero for negative values, towards zero for positive ones.
    bits = torch.where(x < 0, bits + 0xFFFF, bits)
    return ((bits >> 16) << 16).view(torch.float32)


def ceil16(x: Tensor) -> Tensor:
    """fp32 -> the smallest bf16 value that is not below, as fp32."""
    return -floor16(-x)


def flushed(x: Tensor) -> Tensor:
    """Subnormal numbers become 0: a step could not tell a minimum among them from the other values.  NaN stays."""
    return torch.where(x.abs() < torch.finfo(torch.float32).tiny, torch.zeros_like(x), x)


def usable(step: Tensor) -> Tensor:
    """A step that has an inverse: at least the smallest normal number.  NaN stays."""
    return step.clamp_min(torch.finfo(torch.float32).tiny)


def finite_scale(lo: Tensor, step: Tensor, steps: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both NaN where one is NaN or Inf, or where so many steps reach beyond fp32: values could not be told apart."""
    most = torch.finfo(torch.float32).max
    good = (lo.abs() <= most) & (step * steps <= most)
    return torch.where(good, lo, torch.nan), torch.where(good, step, torch.nan)


def to_dtype(y: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values in another dtype.  Scales that are rounded outwards reach beyond the range of fp16: a finite input
    must not decode to Inf."""
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        y = y.clamp(-top, top)
    return y.to(dtype)
