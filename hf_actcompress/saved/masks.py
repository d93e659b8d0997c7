"""One bit per element: masks of dropout and of rectifiers, packed and unpacked in one pass over the tensor."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..ops.bitmaps import flags, two_flags, unflag
from ..ops.cpu import native
from ..ops.rows import COLS, apply, decode_parts, encode_parts, join, parts


def pack_flags(x: Tensor, low: float = 0.0, high: float | None = None) -> Tensor:
    """Bitmap uint8 of where `x` (contiguous; bool or floating point) lies above `low` and, if given, below `high`.

    Without `high` NaN counts as above, as in the gradient of a ReLU.
    """
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    native_form = partial(native.flags, low=low, high=high)
    return join(encode_parts(flags, x, [], native_form=native_form, low=low, high=high))


def pack_two_values(x: Tensor, look: int = 1024) -> tuple[Tensor, float] | None:
    """(bitmap, c) if every value of `x` (contiguous) is 0 or c, as in dropout's mask, else None.

    A sample of about `look` values decides most cases.
    """
    flat = x.reshape(-1)
    some = flat[:: max(1, flat.numel() // look)]
    lo, hi = (float(v) for v in torch.aminmax(some))
    value = hi if hi > 0 else lo
    if not (value and math.isfinite(value) and bool(((some == 0) | (some == value)).all())):
        return None
    shared, pieces = [torch.full((), value, dtype=x.dtype, device=x.device)], []
    for part in parts(flat.numel(), COLS):
        run = part.take(flat)
        found = native.two_flags(run, value)
        if found is None:
            bits, others = apply(two_flags, run, shared=shared)
            found = bits, not bool(others.any())
        if not found[1]:
            return None
        pieces.append(found[0].view(-1))
    return join(pieces), value


def unpack_flags(bits: Tensor, shape: tuple[int, ...], low: float, high: float, dtype: torch.dtype) -> Tensor:
    """`high` where a bit is set and `low` elsewhere, in `dtype` (bool: True and False)."""
    kind = torch.uint8 if dtype == torch.bool else dtype
    shared = [torch.tensor([low, high], dtype=kind, device=bits.device)]
    native_form = partial(native.table_decode, table=shared[0], bits=1)
    found = decode_parts(unflag, bits, shape, 1, shared, native_form=native_form)
    return found.view(torch.bool) if dtype == torch.bool else found
