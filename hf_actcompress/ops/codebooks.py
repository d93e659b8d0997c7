"""Centroids of a sorted sample that minimise the squared error: Lloyd iterations from the last codebook, or afresh.

Sources: Lloyd, 1982; optimal 1-D clustering by dynamic programming: Wang and Song, Ckmeans.1d.dp, 2011; the density of
centroids: Panter and Dite, 1951.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .library import operator

BINS = 512  # up to this many weighted points the codebook is found by dynamic programming
COLD = 50  # Lloyd iterations after it


def _halfway(table: Tensor) -> Tensor:
    return (table[1:] + table[:-1]) / 2


def _bounds(points: Tensor, table: Tensor) -> Tensor:
    """int64 [k + 1]: the points of the centroid i begin at the i-th."""
    return pad(pad(torch.searchsorted(points, _halfway(table)), (1, 0)), (0, 1), value=points.numel())


def lloyd(points: Tensor, table: Tensor, iters: int, look: bool = False) -> Tensor:
    """Lloyd iterations on sorted fp64 points [n]: each costs one binary search per centroid, by prefix sums.

    A centroid without points stays where it is.  look: stops where nothing changes any more, which waits for values.
    """
    sums = pad(points.cumsum(0), (1, 0))
    for _ in range(iters):
        bounds = _bounds(points, table)
        count = torch.diff(bounds)
        new = torch.where(count > 0, torch.diff(sums[bounds]) / count.clamp_min(1), table)
        if look and torch.equal(new, table):
            break
        table = new
    return table


def _poor(points: Tensor, table: Tensor) -> Tensor:
    """bool []: NaN, or too many centroids have no points.

    Lloyd never revives those: a codebook of few distinct values would stay small.
    """
    unused = (torch.diff(_bounds(points, table)) == 0).sum()
    return (unused > table.numel() // 8) | table.isnan().any()


def optimal_codebook(values: Tensor, weights: Tensor, k: int) -> Tensor:
    """Sorted fp64 values [n] with weights [n], 0 where there is none -> the k centroids of least weighted squared
    error, exactly.  Time k * n**2, memory n**2."""
    n = values.numel()
    weight = weights.sum()
    mean = (weights * values).sum() / weight
    shifted = torch.where(weights > 0, values - mean, 0)  # keeps the prefix sums of squares accurate
    w, s, q = (pad(v.cumsum(0), (1, 0)) for v in (weights, weights * shifted, weights * shifted**2))
    # cost[i, j]: squared error of one centroid for the points i .. j - 1
    mass, first = w[None, :] - w[:, None], s[None, :] - s[:, None]
    cost = (q[None, :] - q[:, None] - first**2 / mass.clamp_min(1e-300)).clamp_min(0)
    index = torch.arange(n + 1, device=values.device)
    cost = torch.where(mass > 0, cost, torch.where(index[:, None] <= index, 0.0, torch.inf))
    best, choices = cost[0], []
    for _ in range(k - 1):
        best, choice = (best[:, None] + cost).min(0)
        choices.append(choice)
    stop, centroids = index[n:], []
    for choice in reversed(choices):
        start = choice[stop]
        centroids.append((s[stop] - s[start]) / (w[stop] - w[start]))
        stop = start
    table = torch.cat([s[stop] / w[stop], *centroids[::-1]]) + mean
    # One without points goes where the one before it is.
    table = torch.where(table.isnan(), -torch.inf, table).cummax(0).values
    return table.clamp_min(torch.where(weights > 0, values, torch.inf).amin())


def _by_density(points: Tensor, k: int) -> Tensor:
    """The optimal density of centroids goes with the cube root of the density of points."""
    place = torch.linspace(0, points.numel() - 1, 4 * k + 1, dtype=points.dtype, device=points.device)
    below = place.long()
    knots = torch.lerp(points[below], points[(below + 1).clamp_max(points.numel() - 1)], place - below)
    width = torch.diff(knots).clamp_min(1e-300) ** (2 / 3)
    mass = pad(width.cumsum(0), (1, 0))
    at = (torch.arange(k, dtype=points.dtype, device=points.device) + 0.5) / k * mass[-1]
    i = torch.searchsorted(mass, at).clamp(1, knots.numel() - 1)
    share = (at - mass[i - 1]) / (mass[i] - mass[i - 1])
    return knots[i - 1] + share * (knots[i] - knots[i - 1])


def _first_codebook(points: Tensor, k: int, look: bool) -> Tensor:
    """Sorted fp64 points [n] -> k centroids: optimal where the points (or 512 bins of them) are few enough."""
    rank = pad((points[1:] != points[:-1]).cumsum(0), (1, 0))
    distinct = rank[-1] + 1
    places = torch.searchsorted(rank, torch.arange(k, device=points.device)).clamp_max(points.numel() - 1)
    direct = points[places]
    if look and int(distinct) <= k:
        return direct
    dense = k > 64
    if dense and look and int(distinct) > BINS:
        return _by_density(points, k)
    # Half of the bins by count, for the bulk; half by width, for the tails.
    half = BINS // 2
    by_count = points[torch.arange(half, device=points.device) * points.numel() // half]
    by_width = torch.linspace(0, 1, half, dtype=points.dtype, device=points.device)
    edges = torch.cat([by_count, points[0] + by_width * (points[-1] - points[0])]).sort().values
    bins = torch.where(distinct <= BINS, rank, torch.searchsorted(edges, points)).clamp_max(BINS)
    weight = points.new_zeros(BINS + 1).scatter_add_(0, bins, torch.ones_like(points))
    total = points.new_zeros(BINS + 1).scatter_add_(0, bins, points)
    table = optimal_codebook(total / weight.clamp_min(1), weight, k)
    if dense:
        table = torch.where(distinct > BINS, _by_density(points, k), table)
    return torch.where(distinct <= k, direct, table)


def _fit(
    sample: Tensor, scale: Tensor, last: Tensor | None, bits: int, iters: int, look: bool = False
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    k, points = 2**bits, sample.double()
    good = scale[1].isfinite()
    mean, std = points.mean(), points.std(correction=0)
    table = None
    if last is not None:
        table = lloyd(points, last.double() * std + mean, iters, look)
    if table is None or not look or bool(_poor(points, table)):
        fresh = lloyd(points, _first_codebook(points, k, look), COLD, look)
        table = fresh if table is None or look else torch.where(_poor(points, table), fresh, table)
    # Nor is a codebook that its own tensor did not fill a start for the next one.
    before = torch.full_like(table, torch.nan) if last is None else last
    kept = torch.where(good & ~_poor(points, table), ((table - mean) / std), before).float()
    table = torch.where(good, torch.where(std > 0, table, points[0]).float(), torch.nan).sort().values
    return table, table[1:] / 2 + table[:-1] / 2, kept


def _fit_cpu(sample, scale, last, bits, iters):  # noqa: ANN001, ANN202
    """Stops early, and does only what is needed."""
    if not bool(scale[1].isfinite()):
        table = torch.full((2**bits,), torch.nan, dtype=torch.float32, device=sample.device)
        return table, table[1:].clone(), table.clone() if last is None else last.clone()
    return _fit(sample, scale, last, bits, iters, look=True)


def _fit_fake(sample, scale, last, bits, iters):  # noqa: ANN001, ANN202
    return tuple(sample.new_empty(2**bits - i, dtype=torch.float32) for i in (0, 1, 0))


# A sorted sample [n]; what `tensor_scale` says of the whole tensor, NaN where that is not finite; the last codebook
# relative to mean and deviation of its sample, fp32 [2**bits], or None -> centroids fp32 [2**bits], ascending, the
# edges between them [2**bits - 1], and the codebook to keep: NaN where there is none yet.
fit_codebook = operator(
    "fit_codebook(Tensor sample, Tensor scale, Tensor? last, int bits, int iters) -> (Tensor, Tensor, Tensor)",
    _fit, _fit_fake, cpu=_fit_cpu, triton="codebooks:fit_codebook",
)  # fmt: skip
