"""Per-tensor affine quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops.groups import dequantize_groups, quantize_groups, roundtrip_groups
from ..ops.packing import COLS, MAX_BITS, codes_nbytes
from ..ops.ranges import tensor_scale
from .base import Codec, CodecState, Payload, check_choice, check_int
from .registry import register_codec
from .rounding import RoundingState, key_of


@register_codec("uniform")
@dataclass(frozen=True)
class Uniform(Codec):
    """One minimum and one step for the whole tensor; x is rounded to min + code * step.

    bits: 1 to 16.
    round: "nearest" (error at most half a step), or "stochastic", which is unbiased.  None is "nearest".
    Payload: bits / 8 bytes per element (rounded up to 8 elements) + 8 bytes.
    Source: the affine scheme of Jacob et al., 2018, in the per-tensor form of the reference system.
    """

    counts_nonfinite: ClassVar[bool] = True
    bits: int = 8
    round: Literal["nearest", "stochastic"] | None = None

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, MAX_BITS, "To leave a tensor alone use identity.")
        check_choice(self.name, "round", self.round, (None, "nearest", "stochastic"))

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return RoundingState(site, seed) if self.round == "stochastic" else None

    def _encode(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Payload:
        scale = tensor_scale(x, 2**self.bits - 1, False, nonfinite)
        codes, _ = quantize_groups(x, None, 1, scale, COLS, self.bits, key_of(self, state), None)
        return self._payload(x, {"codes": codes, "scale": scale})

    def _decode(self, payload: Payload) -> Tensor:
        size = codes_nbytes(math.prod(payload.shape), COLS, self.bits)
        codes, scale = self._sized(payload, codes=size, scale=(2, torch.float32))
        return dequantize_groups(codes, scale, None, 1, payload.shape, payload.dtype, COLS, self.bits)

    def _roundtrip(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Tensor:
        scale = tensor_scale(x, 2**self.bits - 1, False, nonfinite)
        return roundtrip_groups(x, None, 1, scale, COLS, self.bits, key_of(self, state), None)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return codes_nbytes(math.prod(shape), COLS, self.bits) + 8
