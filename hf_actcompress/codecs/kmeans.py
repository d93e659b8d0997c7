"""K-means: an optimal one-dimensional codebook, warm-started from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.bitmaps import decode_table
from ..ops.codebooks import fit_codebook
from ..ops.packing import COLS, codes_nbytes
from ..ops.ranges import tensor_scale
from ..ops.tables import quantize_sorted, roundtrip_sorted, sorted_sample
from .base import Codec, CodecState, Payload, check_int
from .registry import register_codec

SAMPLE = 1 << 14


class CodebookState(CodecState):
    """The last codebook, relative to the mean and deviation of its tensor, so that it fits when the scale drifts.

    NaN where no tensor yet filled one.
    """

    def __init__(self) -> None:
        self.centroids: Tensor | None = None


@register_codec("kmeans")
@dataclass(frozen=True)
class KMeans(Codec):
    """Replaces each value by the nearest of 2**bits centroids that minimise the squared error.

    bits: 1 to 8.
    iters: Lloyd iterations from the warm start (a cold start runs 50 from a solution that dynamic programming found
        on the sample, or on 512 bins of it).

    Payload: bits / 8 bytes per element (rounded up to 8 elements) + 4 bytes per centroid.
    Sources: Lloyd, 1982; optimal 1-D clustering by dynamic programming: Wang and Song, Ckmeans.1d.dp, 2011.
    """

    counts_nonfinite: ClassVar[bool] = True
    bits: int = 4
    iters: int = 8

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, 8, "More bits than 8 are served better by block.")
        check_int(self.name, "iters", self.iters, 1, 1000)

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return CodebookState()

    def _encode(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Payload:
        table, edges = self._fit(x, state, nonfinite)
        codes = quantize_sorted(x, edges, table, self.bits, self.bits)
        return self._payload(x, {"codes": codes, "centroids": table})

    def _fit(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sorted fp32 centroids [2**bits], and the edges between them."""
        last = state.centroids if isinstance(state, CodebookState) else None
        last = None if last is None or last.numel() != 2**self.bits else last.to(x.device)
        scale = tensor_scale(x, 1.0, False, nonfinite)
        table, edges, kept = fit_codebook(sorted_sample(x, SAMPLE), scale, last, self.bits, self.iters)
        if isinstance(state, CodebookState):
            state.centroids = kept
        return table, edges

    def _decode(self, payload: Payload) -> Tensor:
        size = codes_nbytes(math.prod(payload.shape), COLS, self.bits)
        codes, table = self._sized(payload, codes=size, centroids=(2**self.bits, torch.float32))
        return decode_table(codes, table.to(payload.dtype), payload.shape, self.bits)

    def _roundtrip(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Tensor:
        table, edges = self._fit(x, state, nonfinite)
        return roundtrip_sorted(x, edges, table, self.bits, self.bits)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return codes_nbytes(math.prod(shape), COLS, self.bits) + 4 * 2**self.bits
