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


def pack_two_values(x: Tensor, look: int = 1024) -> tuple[Tensor, float] | None:
    """(bitmap, c) if every value of `x` (contiguous) is 0 or c, as in dropout's mask, else None.

    A sample of about `look` values decides most cases.  On a GPU nothing is looked at: None.
    """
    if x.device.type != "cpu":
        return None
    flat = x.reshape(-1)
    some = flat[:: max(1, flat.numel() // look)]
    lo, hi = (float(v) for v in torch.aminmax(some))
    value = hi if hi > 0 else lo
    if not (value and math.isfinite(value) and bool(((some == 0) | (some == value)).all())):
        return None
    bits = two_valued(flat, value)
    return None if bits is None else (bits, value)


def unpack_flags(bits: Tensor, shape: tuple[int, ...], low: float, high: float, dtype: torch.dtype) -> Tensor:
    """`high` where a bit is set and `low` elsewhere, in `dtype` (bool: True and False)."""
    if dtype == torch.bool:
        return decode_levels(bits, [low, high], shape, torch.uint8, 1).view(torch.bool)
    return decode_levels(bits, [low, high], shape, dtype, 1)
