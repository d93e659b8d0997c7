"""K-means: an optimal one-dimensional codebook, warm-started from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.quantize import decode_table, nearest_encode, nearest_roundtrip
from ..ops.reductions import ranked, strided_sample
from ..ops.rows import codes_nbytes, encode_parts, join, roundtrip_parts
from .base import Codec, CodecState, Payload, check_int
from .registry import register_codec

SAMPLE = 1 << 14
EXACT = 512  # up to this many weighted points the codebook is found by dynamic programming


class CodebookState(CodecState):
    """The last codebook, relative to the mean and deviation of its tensor, so that it fits when the scale drifts."""

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

    bits: int = 4
    iters: int = 8

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, 8, "More bits than 8 are served better by block.")
        check_int(self.name, "iters", self.iters, 1, 1000)

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return CodebookState()

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        table = self._fit(strided_sample(x, SAMPLE), state)
        ranks = torch.arange(table.numel(), dtype=torch.float32, device=x.device)
        static = {"bits": self.bits, "compilable": self.bits <= 6}
        codes = encode_parts(nearest_encode, x, [_edges(table), ranks], **static)
        return self._payload(x, {"codes": join(codes), "centroids": table})

    def _fit(self, sample: Tensor, state: CodecState | None) -> Tensor:
        """Sorted fp32 centroids [2**bits]."""
        points = ranked(sample).double()
        mean, std = points.mean(), points.std(correction=0)
        if not std > 0:
            return points[0].float().expand(2**self.bits).contiguous()
        warm = state.centroids if isinstance(state, CodebookState) else None
        table = None
        if warm is not None and warm.numel() == 2**self.bits:
            table = lloyd(points, warm.to(points.device).double() * std + mean, self.iters)
            # Lloyd never revives centroids without points: a codebook of few distinct values would stay small.
            if unused(points, table) > 2**self.bits // 8:
                table = None
        if table is None:
            table = lloyd(points, initial_codebook(points, 2**self.bits), 50)
        # Nor is a codebook that its own tensor did not fill a start for the next one.
        if isinstance(state, CodebookState) and unused(points, table) <= 2**self.bits // 8:
            state.centroids = ((table - mean) / std).float()
        return table.float().sort().values

    def _decode(self, payload: Payload) -> Tensor:
        size = codes_nbytes(math.prod(payload.shape), self.bits)
        codes, table = self._sized(payload, codes=size, centroids=(2**self.bits, torch.float32))
        return decode_table(codes, payload.shape, table.to(payload.dtype), self.bits)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        table = self._fit(strided_sample(x, SAMPLE), state)
        return roundtrip_parts(nearest_roundtrip, x, [_edges(table), table], compilable=self.bits <= 6)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return codes_nbytes(math.prod(shape), self.bits) + 4 * 2**self.bits


def _edges(table: Tensor) -> Tensor:
    """Halfway between neighbouring centroids."""
    return (table[1:] + table[:-1]) / 2


def initial_codebook(points: Tensor, k: int) -> Tensor:
    """fp64 sorted points [n] -> k centroids: optimal where the points (or 512 bins of them) are few enough."""
    values, counts = torch.unique_consecutive(points, return_counts=True)
    if values.numel() <= k:
        return torch.cat([values, values[-1:].expand(k - values.numel())])
    if k > 64 and values.numel() > EXACT:
        # Panter and Dite, 1951: the optimal density of centroids goes with the cube root of the density of points.
        spread = torch.linspace(0, 1, 4 * k + 1, dtype=points.dtype, device=points.device)
        knots = torch.quantile(points, spread) if points.numel() < 2**24 else values
        width = torch.diff(knots).clamp_min(1e-300) ** (2 / 3)
        mass = torch.cat([width.new_zeros(1), width.cumsum(0)])
        at = (torch.arange(k, dtype=points.dtype, device=points.device) + 0.5) / k * mass[-1]
        i = torch.searchsorted(mass, at).clamp(1, knots.numel() - 1)
        share = (at - mass[i - 1]) / (mass[i] - mass[i - 1])
        return knots[i - 1] + share * (knots[i] - knots[i - 1])
    if values.numel() <= EXACT:
        return optimal_codebook(values, counts.to(values.dtype), k)
    # Half of the bins by count, for the bulk; half by width, for the tails.
    half = EXACT // 2
    by_count = points[torch.arange(half, device=points.device) * points.numel() // half]
    by_width = torch.linspace(0, 1, half, dtype=points.dtype, device=points.device)
    edges = torch.cat([by_count, points[0] + by_width * (points[-1] - points[0])]).sort().values
    bins = torch.bucketize(points, edges)
    weight = torch.zeros(EXACT + 1, dtype=points.dtype, device=points.device).scatter_add(
        0, bins, torch.ones_like(points)
    )
    total = torch.zeros_like(weight).scatter_add(0, bins, points)
    used = weight > 0
    return optimal_codebook(total[used] / weight[used], weight[used], k)


def optimal_codebook(values: Tensor, weights: Tensor, k: int) -> Tensor:
    """Sorted fp64 values [n] with weights [n] -> the k centroids of least weighted squared error, exactly.

    Time k * n**2, memory n**2.
    """
    n = values.numel()
    if n <= k:
        return torch.cat([values, values[-1:].expand(k - n)])
    shifted = values - values.mean()  # keeps the prefix sums of squares accurate
    zero = values.new_zeros(1)
    w = torch.cat([zero, weights.cumsum(0)])
    s = torch.cat([zero, (weights * shifted).cumsum(0)])
    q = torch.cat([zero, (weights * shifted**2).cumsum(0)])
    # cost[i, j]: squared error of one centroid for the points i .. j - 1
    mass = w[None, :] - w[:, None]
    first = s[None, :] - s[:, None]
    cost = q[None, :] - q[:, None] - first**2 / mass.clamp_min(1e-300)
    cost = torch.where(mass > 0, cost.clamp_min(0), torch.inf)
    best, choices = cost[0], []
    for _ in range(k - 1):
        best, choice = (best[:, None] + cost).min(0)
        choices.append(choice)
    stop, centroids = n, []
    for choice in reversed([None, *choices]):
        start = 0 if choice is None else int(choice[stop])
        centroids.append((s[stop] - s[start]) / (w[stop] - w[start]))
        stop = start
    return torch.stack(centroids[::-1]) + values.mean()


def unused(points: Tensor, table: Tensor) -> int:
    """How many of the sorted centroids have none of the sorted points."""
    cuts = torch.searchsorted(points, (table[1:] + table[:-1]) / 2)
    bounds = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=points.numel())
    return int((torch.diff(bounds) == 0).sum())


def lloyd(points: Tensor, table: Tensor, iters: int) -> Tensor:
    """Lloyd iterations on sorted fp64 points [n]: each costs one binary search per centroid, by prefix sums."""
    sums = torch.cat([points.new_zeros(1), points.cumsum(0)])
    end = torch.tensor([points.numel()], device=points.device)
    table = table.sort().values
    for _ in range(iters):
        cuts = torch.searchsorted(points, (table[1:] + table[:-1]) / 2)
        bounds = torch.cat([torch.zeros_like(end), cuts, end])
        count = torch.diff(bounds)
        # A centroid without points stays where it is.
        new = torch.where(count > 0, torch.diff(sums[bounds]) / count.clamp_min(1), table).sort().values
        if torch.equal(new, table):
            break
        table = new
    return table
