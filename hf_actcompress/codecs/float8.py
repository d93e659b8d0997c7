"""Scaled 8-bit floating point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, CodecState, Payload, check_choice

_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Float8(Codec):
    """x / scale in float8, with one fp32 scale per tensor that maps the largest magnitude to the largest number.

    format: "e4m3" (3 bits of mantissa, relative error 2**-4 at most in the normal range) or "e5m2".
    Payload: 1 byte per element + 4.
    Source: Micikevicius et al., "FP8 formats for deep learning", 2022.
    """

    format: str = "e4m3"
    name: ClassVar[str] = "float8"

    def __post_init__(self) -> None:
        check_choice(self.name, "format", self.format, tuple(_FORMATS))

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        dtype = _FORMATS[self.format]
        top = torch.finfo(dtype).max
        lo, hi = torch.aminmax(x)
        largest = torch.maximum(-lo, hi).float()
        # Below the smallest normal number of fp32 a division would overflow: such tensors become zero.
        tiny = torch.finfo(torch.float32).tiny
        scale = torch.where(largest > top * tiny, largest / top, torch.ones_like(largest))
        codes = (x.reshape(-1).float() / scale).clamp_(-top, top).to(dtype)
        return self._payload(x, {"codes": codes.view(torch.uint8), "scale": scale.view(1)})

    def _decode(self, payload: Payload) -> Tensor:
        values = payload.tensors["codes"].view(_FORMATS[self.format]).float() * payload.tensors["scale"]
        return values.to(payload.dtype).view(payload.shape)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return math.prod(shape) + 4
