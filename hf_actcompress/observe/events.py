"""What a site tells its listeners: one event for each tensor that it replaces.

A listener is any function of one event.  It may read the tensors, and must not change them or keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..codecs import Codec
from .nonfinite import Nonfinite


@dataclass(frozen=True, eq=False)
class Event:
    """A tensor and what a site made of it.

    site: "boundary" or "saved".
    name: of the layer, or of the place in the model where the tensor is saved.
    direction: "forward" or "backward" at a boundary; "saved" for saved tensors.
    raw_bytes, payload_bytes: without and with compression.
    codec: None for a tensor that is kept without one (a mask in bits, a tensor that no codec can take).
    x: the tensor; None for an event about no tensor.
    decode: returns what a receiver would decode, of the shape and strides of `x`.
    seconds: taken by encoding and decoding, where the site measures them.
    nonfinite: how many groups or tensors with NaN or Inf the site has found so far, counted on the device.
    calls: how many calls of the site the event stands for.  All tensors that are saved in one forward pass are one
        call: its first event, which has no tensor, counts 1 and the others 0.
    """

    site: str
    name: str
    direction: str
    raw_bytes: int = 0
    payload_bytes: int = 0
    codec: Codec | None = None
    x: Tensor | None = None
    decode: Callable[[], Tensor] | None = None
    seconds: float = 0.0
    nonfinite: Nonfinite | None = None
    calls: int = 1


Listener = Callable[[Event], None]
