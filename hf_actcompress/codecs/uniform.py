"""Per-tensor affine quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.compiled import Kernel
from ..ops.layout import in_memory_order, restored
from ..ops.packing import MAX_BITS
from ..ops.quantize import line_decode, line_encode, line_roundtrip
from ..ops.reductions import extremes
from ..ops.rounding import noise_source
from ..ops.rows import COLS, apply, codes_nbytes, counters, decode_parts, join, parts
from ..ops.scales import flushed, usable
from .base import Codec, CodecState, Payload, check_choice, check_int
from .registry import register_codec
from .rounding import RoundingState, key_of


@register_codec("uniform")
@dataclass(frozen=True)
class Uniform(Codec):
    """One minimum and one step for the whole tensor; x is rounded to min + code * step.

    bits: 1 to 16.
    round: "nearest" (error at most half a step), "stochastic" (unbiased), or None: what suits the site, which is
        stochastic for saved tensors and nearest elsewhere.
    Payload: bits / 8 bytes per element (rounded up to 8 elements) + 8 bytes.
    Source: the affine scheme of Jacob et al., 2018, in the per-tensor form of the reference system.
    """

    bits: int = 8
    round: Literal["nearest", "stochastic"] | None = None

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, MAX_BITS, "To leave a tensor alone use identity.")
        check_choice(self.name, "round", self.round, (None, "nearest", "stochastic"))

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return RoundingState(site, seed) if self.round == "stochastic" else None

    def _scale(self, x: Tensor) -> Tensor:
        """fp32 [2]: minimum and step."""
        lo, hi = extremes(x)
        top = 2**self.bits - 1
        return torch.stack([flushed(lo), usable(hi / top - lo / top)])  # hi - lo could overflow

    def _apply(self, kernel: Kernel, x: Tensor, scale: Tensor, state: CodecState | None) -> list[Tensor]:
        flat, results = x.reshape(-1), []
        lanes, key = noise_source(key_of(self, state), COLS, x.device)
        for part in parts(x.numel(), COLS):
            starts = None if key is None else counters(part, x.device)
            own = None if lanes is None else lanes[: part.shape[2]]
            results += apply(kernel, part.take(flat), shared=[scale, own, key], rows=[starts], bits=self.bits)
        return [result.view(-1) for result in results]

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        scale = self._scale(x)
        return self._payload(x, {"codes": join(self._apply(line_encode, x, scale, state)), "scale": scale})

    def _decode(self, payload: Payload) -> Tensor:
        nbytes = codes_nbytes(math.prod(payload.shape), self.bits)
        codes, scale = self._sized(payload, codes=nbytes, scale=(2, torch.float32))
        return decode_parts(line_decode, codes, payload.shape, self.bits, [scale], bits=self.bits, dtype=payload.dtype)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        # Noise counts the elements in the order of the shape.
        x = x.contiguous() if self.round == "stochastic" else x
        return restored(join(self._apply(line_roundtrip, in_memory_order(x), self._scale(x), state))[: x.numel()], x)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return codes_nbytes(math.prod(shape), self.bits) + 8
