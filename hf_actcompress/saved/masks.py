"""One bit per element: masks of dropout and of rectifiers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.bitmaps import decode_table, pack_flags
from ..ops.cpu.forms import two_valued

__all__ = ["pack_flags", "pack_two_values", "unpack_flags"]


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
    kind = torch.uint8 if dtype == torch.bool else dtype
    table = torch.tensor([low, high], dtype=kind, device=bits.device)
    found = decode_table(bits, table, shape, 1)
    return found.view(torch.bool) if dtype == torch.bool else found
