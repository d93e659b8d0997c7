"""The payload: what a codec makes of a tensor, and what one has to be wherever it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Payload:
    """The compressed form of a tensor.

    `tensors` hold everything that is sent or stored (codes, scales, positions, codebooks; an empty tensor alone where
    there are no values); `parts` hold the payloads of a chain's second codec.
    """

    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    parts: dict[str, "Payload"] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the payload."""
        return sum(t.numel() * t.element_size() for t in all_tensors(self))

    @property
    def ratio(self) -> float:
        """Bytes of the original tensor over `nbytes` (1.0 for an empty tensor)."""
        return raw_nbytes(self.shape, self.dtype) / self.nbytes if self.nbytes else 1.0


def flaw_of(payload: Payload) -> str | None:
    """What no payload of any codec has, or None."""
    if not isinstance(payload, Payload):
        return f"{type(payload).__name__} is not a Payload"
    shape, dtype = payload.shape, payload.dtype
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        return f"the shape {shape!r} of a payload is not a tuple of whole numbers of 0 or more"
    if dtype not in FLOAT_DTYPES:
        return f"the dtype {dtype!r} of a payload is none of {', '.join(map(str, FLOAT_DTYPES))}"
    for name, kind in (("tensors", Tensor), ("parts", Payload)):
        entries = getattr(payload, name)
        if not isinstance(entries, dict):
            return f"{name}={entries!r} of a payload is not a dict"
        for key, value in entries.items():
            if not isinstance(value, kind):
                return f"{name}[{key!r}] of a payload is {value!r}, and has to be a {kind.__name__}"
            if kind is Payload and (flaw := flaw_of(value)):
                return f"{key}: {flaw}"
    devices = {str(tensor.device) for tensor in all_tensors(payload)}
    if len(devices) != 1:
        return f"the tensors of a payload are on {' and '.join(sorted(devices)) or 'no device'}, and need one"
    return None


def all_tensors(payload: Payload) -> list[Tensor]:
    """The tensors of a payload and of its parts."""
    return [*payload.tensors.values(), *(t for part in payload.parts.values() for t in all_tensors(part))]


def raw_nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of an uncompressed tensor."""
    return math.prod(shape) * dtype.itemsize
