"""Scaled 8-bit floating point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.quantize import float8_decode, float8_encode, float8_roundtrip
from ..ops.reductions import extremes
from ..ops.rows import codes_nbytes, decode_parts, encode_parts, join, roundtrip_parts
from .base import Codec, CodecState, Payload, check_choice
from .registry import register_codec

_FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@register_codec("float8")
@dataclass(frozen=True)
class Float8(Codec):
    """x / scale in float8, with one fp32 scale per tensor that maps the largest magnitude to the largest number.

    format: "e4m3" (3 bits of mantissa, relative error 2**-4 at most in the normal range) or "e5m2".
    Payload: 1 byte per element + 4.
    Source: Micikevicius et al., "FP8 formats for deep learning", 2022.
    """

    format: str = "e4m3"

    def __post_init__(self) -> None:
        check_choice(self.name, "format", self.format, tuple(_FORMATS))

    def _scale(self, x: Tensor) -> Tensor:
        """fp32 []"""
        top = torch.finfo(_FORMATS[self.format]).max
        lo, hi = extremes(x)
        largest = torch.maximum(-lo, hi)
        # A division by less than the smallest normal number of fp32 would overflow.
        return (largest / top).clamp_min(torch.finfo(torch.float32).tiny)

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        scale, n = self._scale(x), x.numel()
        codes = join(encode_parts(float8_encode, x, [scale], format=_FORMATS[self.format]))
        return self._payload(x, {"codes": codes[:n], "scale": scale.view(1)})

    def _decode(self, payload: Payload) -> Tensor:
        codes, scale = self._sized(payload, codes=math.prod(payload.shape), scale=(1, torch.float32))
        shared = [scale.view(())]
        pad = codes_nbytes(codes.numel(), 8) - codes.numel()
        codes = torch.nn.functional.pad(codes, (0, pad)) if pad else codes
        return decode_parts(
            float8_decode, codes, payload.shape, 8, shared, format=_FORMATS[self.format], dtype=payload.dtype
        )

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        return roundtrip_parts(float8_roundtrip, x, [self._scale(x)], format=_FORMATS[self.format])

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return math.prod(shape) + 4
