"""One bit per element: masks of dropout and of rectifiers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import bitmaps
from ..ops.bitmaps import decode_levels
from ..ops.cpu.forms import two_valued


def pack_flags(x: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    """Bitmap uint8 of where `x` (bool or floating point) lies above `low` and, if given, below `high`.

    Without `high` NaN counts as above, as in the gradient of a ReLU.
    """
    return bitmaps.pack_flags(x, low, high)


def pack_two_values(x: Tensor, look: int = 1024) -> tuple[Tensor, float, float] | None:
    """(bitmap, low, high) if every value of `x` (contiguous) is one of two, as in dropout's mask (0 and c) or a mask
    of attention (-inf and 0), else None.

    A sample of about `look` values decides most cases.  On a GPU nothing is looked at: None.
    """
    if x.device.type != "cpu" or not x.numel():
        return None
    flat = x.reshape(-1)
    some = flat[:: max(1, flat.numel() // look)]
    low, high = torch.aminmax(some)
    if not bool(((some == low) | (some == high)).all()):
        return None
    if low == high:  # the other value is rare
        low, high = torch.aminmax(flat)
    if low == 0 or high == 0:
        value = float(low + high)
        bits = two_valued(flat, value) if value and math.isfinite(value) else None
        if bits is not None:
            return (bits, 0.0, value)
    if not bool(((flat == low) | (flat == high)).all()):
        return None
    return pack_flags(flat, float(low)), float(low), float(high)


def unpack_flags(bits: Tensor, shape: tuple[int, ...], low: float, high: float, dtype: torch.dtype) -> Tensor:
    """`high` where a bit is set and `low` elsewhere, in `dtype` (bool: True and False)."""
    if dtype == torch.bool:
        return decode_levels(bits, [low, high], shape, torch.uint8, 1).view(torch.bool)
    if math.isinf(low) or math.isinf(high):  # which decoded values never are
        above = decode_levels(bits, [0, 1], shape, torch.uint8, 1).view(torch.bool)
        return torch.full_like(above, low, dtype=dtype).masked_fill_(above, high)
    return decode_levels(bits, [low, high], shape, dtype, 1)
