"""Sort quantization: quantile groups of equal count, each with its own minimum and step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.packing import COLS, MAX_BITS, codes_nbytes
from ..ops.ranges import tensor_scale
from ..ops.scales import flushed, usable
from ..ops.tables import dequantize_sorted, quantile_scales, quantize_sorted, roundtrip_sorted, sorted_sample
from .base import Codec, CodecState, Payload, check_choice, check_int
from .registry import register_codec

SAMPLE = 1 << 15


@register_codec("sort")
@dataclass(frozen=True)
class Sort(Codec):
    """Cuts the values at quantiles into 2**splits groups of equal count and quantizes each with bits - splits bits.

    bits: total bits per element, 2 to 16 (8 with splits=2 means 6 + 2).
    splits: split bits, 1 to bits - 1; by default about a quarter of the bits, as in the reference tables
        (4 = 3+1, 8 = 6+2, 12 = 9+3, 16 = 12+4).
    quantiles: "sample" takes thresholds from an evenly spaced sample of about 32k values and groups reach from
        threshold to threshold; "exact" sorts everything and uses each group's own extremes.

    Payload: bits / 8 bytes per element (rounded up to 8 elements) + 8 bytes per group.
    Source: the sort quantization of the reference pipeline system ("Epipe").  There thresholds came from the first
    sample of a batch only, and code 0 of group 0 was never decoded.
    """

    counts_nonfinite: ClassVar[bool] = True
    bits: int = 8
    splits: int | None = None
    quantiles: str = "sample"

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 2, MAX_BITS, "To leave a tensor alone use identity.")
        check_choice(self.name, "quantiles", self.quantiles, ("sample", "exact"))
        if self.splits is None:
            object.__setattr__(self, "splits", max(1, self.bits // 4))
        check_int(self.name, "splits", self.splits, 1, MAX_BITS)
        if self.splits >= self.bits:
            raise ValueError(
                f"sort: splits={self.splits} leaves {self.bits - self.splits} of bits={self.bits} for the values in "
                f"a group; bits is the total per element. Use splits from 1 to {self.bits - 1}."
            )

    def _groups(self, x: Tensor, nonfinite: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inner thresholds fp32 [G - 1] and scales fp32 [G, 2] (minimum, step)."""
        scale = tensor_scale(x, 4.0, False, nonfinite)
        if self.quantiles == "sample":
            return quantile_scales(sorted_sample(x, SAMPLE), scale, self.bits, self.splits)
        count, top = 2**self.splits, 2 ** (self.bits - self.splits) - 1
        values = sorted_sample(x, x.numel()).float()
        lo = values[torch.arange(count, device=x.device) * values.numel() // count]
        # A group holds the values from its threshold up to below the next distinct threshold.
        stop = torch.searchsorted(values, lo[1:].contiguous()) - 1
        hi = torch.maximum(torch.cat([values[stop.clamp_min(0)], values[-1:]]), lo)
        scales = torch.stack([flushed(lo), usable(hi / top - lo / top)], 1)
        return lo[1:].contiguous(), torch.where(scale[1].isnan(), torch.nan, scales)

    def _encode(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Payload:
        edges, scales = self._groups(x, nonfinite)
        codes = quantize_sorted(x, edges, scales, self.bits, self.splits)
        return self._payload(x, {"codes": codes, "scales": scales})

    def _decode(self, payload: Payload) -> Tensor:
        size = codes_nbytes(math.prod(payload.shape), COLS, self.bits)
        codes, scales = self._sized(payload, codes=size, scales=(2**self.splits, 2, torch.float32))
        return dequantize_sorted(codes, scales, payload.shape, payload.dtype, self.bits, self.splits)

    def _roundtrip(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Tensor:
        return roundtrip_sorted(x, *self._groups(x, nonfinite), self.bits, self.splits)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return codes_nbytes(math.prod(shape), COLS, self.bits) + 8 * 2**self.splits
