"""Numbers that describe a tensor: extremes, and samples of its values."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .layout import elements, in_memory_order

# Beyond this magnitude sums of squares (norms, rotations) could overflow fp32: such tensors are treated like NaN and
# Inf and passed on as they are.
LARGEST = 2.0**48


def representable(x: Tensor) -> bool:
    """True if every value is finite and within +-2**48.  One read of `x`; on a GPU this synchronises."""
    # In fp16 the bound itself would be Inf, hence fp32.
    lo, hi = extremes(x)
    # A comparison with NaN is False, and NaN propagates through aminmax.
    return bool((lo >= -LARGEST) & (hi <= LARGEST))


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum in fp32, NaN if there is one."""
    # In the order of the shape a tensor with channels last would be copied first, which takes ten times as long.
    lo, hi = torch.aminmax(in_memory_order(x))
    return lo.float(), hi.float()


def strided_sample(x: Tensor, size: int) -> Tensor:
    """About `size` values of a tensor in fp32 [about size], evenly spaced in the order of its shape; all of them if
    there are not many more.

    The stride is made odd, so that a period that is a power of two (features, groups) does not alias.
    """
    stride = x.numel() // size
    if stride <= 1:
        return x.reshape(-1).float()
    if x.is_contiguous():
        return x.view(-1)[:: stride | 1].float()
    return elements(x, torch.arange(0, x.numel(), stride | 1, device=x.device)).float()


def ranked(sample: Tensor) -> Tensor:
    """An fp32 sample in ascending order."""
    if sample.device.type == "cpu" and sample.dtype == torch.float32:  # numpy takes a quarter of the time of torch
        return torch.from_numpy(np.sort(sample.numpy()))
    return sample.sort().values
