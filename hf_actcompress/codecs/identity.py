"""The control: nothing is compressed, and training must not change by a bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, CodecState, Payload
from .payload import raw_nbytes
from .registry import register_codec


@register_codec("identity")
@dataclass(frozen=True)
class Identity(Codec):
    """Passes tensors on as they are.  Payload: the raw bytes.

    Proves that the sites are transparent, and bounds what any codec can gain.
    """

    leaves: ClassVar[tuple[str, ...]] = ("values",)

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        return self._payload(x, {"values": x.contiguous()})

    def _decode(self, payload: Payload) -> Tensor:
        return self._sized(payload, values=(*payload.shape, payload.dtype))[0].clone()

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        return x.clone()

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return raw_nbytes(shape, dtype)
