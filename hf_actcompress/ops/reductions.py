"""Samples of a tensor's values."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import elements


def sample_stride(n: int, size: int) -> int:
    """Of n values, one in so many makes a sample of about `size`.

    Odd, so that a period that is a power of two (features, groups) does not alias.
    """
    return 1 if n // size <= 1 else n // size | 1


def strided_values(x: Tensor, size: int) -> Tensor:
    """About `size` values of a tensor, flat and evenly spaced in the order of its shape; all of them if there are not
    many more.  Those of a tensor that is not contiguous are picked, and the others not moved."""
    every = sample_stride(x.numel(), size)
    if every == 1 or x.is_contiguous():
        return x.reshape(-1)[::every]
    return elements(x, torch.arange(0, x.numel(), every, device=x.device))


def strided_sample(x: Tensor, size: int) -> Tensor:
    """The same in fp32."""
    return strided_values(x, size).float()
