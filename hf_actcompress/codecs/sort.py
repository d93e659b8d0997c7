"""Sort quantization: quantile groups of equal count, each with its own minimum and step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.packing import MAX_BITS
from ..ops.quantize import decode_table, sort_decode, sort_encode, sort_roundtrip
from ..ops.reductions import extremes, ranked, strided_sample
from ..ops.rows import codes_nbytes, decode_parts, encode_parts, join, roundtrip_parts
from ..ops.scales import flushed, usable
from .base import Codec, CodecState, Payload, check_choice, check_int
from .registry import register_codec

SAMPLE = 1 << 15
FEW_SPLITS = 3  # up to here a chain of choices takes less time than a table


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

    def _groups(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inner thresholds fp32 [G - 1] and scales fp32 [G, 2] (minimum, step)."""
        count, top = 2**self.splits, 2 ** (self.bits - self.splits) - 1
        exact = self.quantiles == "exact"
        values = x.float().reshape(-1).sort().values if exact else ranked(strided_sample(x, SAMPLE))
        first = torch.arange(count, device=x.device) * values.numel() // count
        lo = values[first]
        if exact:
            # A group holds the values from its threshold up to below the next distinct threshold.
            stop = torch.searchsorted(values, lo[1:]) - 1
            hi = torch.cat([values[stop.clamp_min(0)], values[-1:]])
            hi = torch.maximum(hi, lo)
        else:
            least, most = extremes(x)
            lo = torch.cat([least[None], lo[1:]])
            hi = torch.cat([lo[1:], most[None]])
        return lo[1:].contiguous(), torch.stack([flushed(lo), usable(hi / top - lo / top)], 1)

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        edges, scales = self._groups(x)
        offsets = torch.arange(scales.shape[0], device=x.device).float() * 2 ** (self.bits - self.splits)
        shared = [edges, scales, 1 / scales[:, 1], offsets]
        codes = encode_parts(sort_encode, x, shared, **self._static())
        return self._payload(x, {"codes": join(codes), "scales": scales})

    def _decode(self, payload: Payload) -> Tensor:
        n, dtype = math.prod(payload.shape), payload.dtype
        forms = {"codes": codes_nbytes(n, self.bits), "scales": (2**self.splits, 2, torch.float32)}
        codes, scales = self._sized(payload, **forms)
        if self.splits <= FEW_SPLITS:
            static = {"bits": self.bits, "splits": self.splits, "dtype": dtype}
            return decode_parts(sort_decode, codes, payload.shape, self.bits, [scales], **static)
        q = torch.arange(2 ** (self.bits - self.splits), device=scales.device)
        table = (scales[:, :1] + q * scales[:, 1:]).view(-1).to(dtype)
        return decode_table(codes, payload.shape, table, self.bits)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        edges, scales = self._groups(x)
        return roundtrip_parts(sort_roundtrip, x, [edges, scales, 1 / scales[:, 1]], **self._static())

    def _static(self) -> dict[str, int | bool]:
        # A chain of comparisons is as long as there are groups.
        return {"bits": self.bits, "splits": self.splits, "compilable": self.splits <= 5}

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return codes_nbytes(math.prod(shape), self.bits) + 8 * 2**self.splits
