"""Scaled 8-bit floating point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.float8 import FORMATS, decode_float8, encode_float8, roundtrip_float8
from ..ops.ranges import tensor_scale
from .base import Codec, CodecState, Payload, check_choice
from .registry import register_codec


@register_codec("float8")
@dataclass(frozen=True)
class Float8(Codec):
    """x / scale in float8, with one fp32 scale per tensor that maps the largest magnitude to the largest number.

    format: "e4m3" (3 bits of mantissa, relative error 2**-4 at most in the normal range) or "e5m2".
    Payload: 1 byte per element + 4.
    Source: Micikevicius et al., "FP8 formats for deep learning", 2022.
    """

    counts_nonfinite: ClassVar[bool] = True
    format: str = "e4m3"

    def __post_init__(self) -> None:
        check_choice(self.name, "format", self.format, tuple(FORMATS))

    def _scale(self, x: Tensor, nonfinite: Tensor | None) -> Tensor:
        """fp32 [2], of which the second is the scale."""
        return tensor_scale(x, torch.finfo(FORMATS[self.format]).max, True, nonfinite)

    def _encode(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Payload:
        scale = self._scale(x, nonfinite)
        return self._payload(x, {"codes": encode_float8(x, scale, self.format), "scale": scale[1:]})

    def _decode(self, payload: Payload) -> Tensor:
        codes, scale = self._sized(payload, codes=math.prod(payload.shape), scale=(1, torch.float32))
        return decode_float8(codes, scale, payload.shape, payload.dtype, self.format)

    def _roundtrip(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Tensor:
        return roundtrip_float8(x, self._scale(x, nonfinite), self.format)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return math.prod(shape) + 4
