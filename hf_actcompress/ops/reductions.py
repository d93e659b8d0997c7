"""Samples of a tensor's values."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import elements


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
