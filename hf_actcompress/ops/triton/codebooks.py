"""Codebooks of a sorted sample (ops/codebooks.py) in one kernel of one program: all of it is a few thousand numbers.

Sums are in another order than in the definition, in fp64: the last bit of a centroid may differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import FLOATS, launch

CHUNK = 1024  # points that are summed at a time
BINS = 512
LANES = 1024  # for BINS + 2 prefix sums
COLD = 50


@triton.jit
def _point(points, i):  # noqa: ANN001, ANN202
    return tl.load(points + i).to(tl.float64)


@triton.jit
def _below(points, n, value, STRICT: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """How many of the sorted points are below (STRICT), or not above, each of the values."""
    low = tl.where(value == value, 0, 0)
    high = low + n
    for _ in range(17):  # at least log2 of the size of a sample
        middle = tl.minimum((low + high) // 2, n - 1)
        own = _point(points, middle)
        right = (own < value) if STRICT else (own <= value)
        right = right & (low < high)
        high = tl.where(right | (low >= high), high, middle)
        low = tl.where(right, middle + 1, low)
    return low


@triton.jit
def _cells(points, table, n, K: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """First and last (exclusive) point of each centroid."""
    j = tl.arange(0, K)
    own = tl.load(table + j)
    before, after = tl.load(table + tl.maximum(j - 1, 0)), tl.load(table + tl.minimum(j + 1, K - 1))
    start = tl.where(j == 0, 0, _below(points, n, (own + before) / 2, True))
    stop = tl.where(j == K - 1, n, _below(points, n, (after + own) / 2, True))
    return own, start, stop


@triton.jit
def _lloyd(points, sums, table, n, iters, K: tl.constexpr):  # noqa: ANN001, ANN202, N803
    for _ in range(iters):
        own, start, stop = _cells(points, table, n, K)
        mean = (tl.load(sums + stop) - tl.load(sums + start)) / tl.maximum(stop - start, 1).to(tl.float64)
        new = tl.where(stop > start, mean, own)
        tl.debug_barrier()
        tl.store(table + tl.arange(0, K), new)
        tl.debug_barrier()


@triton.jit
def _is_poor(points, table, n, K: tl.constexpr):  # noqa: ANN001, ANN202, N803
    own, start, stop = _cells(points, table, n, K)
    unused = tl.sum((stop <= start).to(tl.int32), 0)
    return (unused > K // 8) | (tl.sum((own != own).to(tl.int32), 0) > 0)


@triton.jit
def _density(points, table, work, n, K: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """As `_by_density`: knots at work, the mass below them at work + 8 K."""
    i = tl.arange(0, 8 * K)
    place = tl.minimum(i, 4 * K).to(tl.float64) * ((n - 1) / (4.0 * K))
    at = tl.minimum(place.to(tl.int32), n - 1)
    low, high = _point(points, at), _point(points, tl.minimum(at + 1, n - 1))
    tl.store(work + i, low + (high - low) * (place - at.to(tl.float64)))
    tl.debug_barrier()
    width = tl.load(work + i) - tl.load(work + tl.maximum(i - 1, 0))
    width = tl.exp(tl.log(tl.maximum(width, 1e-300)) * (2.0 / 3.0))
    tl.store(work + 8 * K + i, tl.cumsum(tl.where((i > 0) & (i <= 4 * K), width, 0.0), 0))
    tl.debug_barrier()
    j = tl.arange(0, K)
    wanted = (j.to(tl.float64) + 0.5) / K * tl.load(work + 8 * K + 4 * K)
    k = tl.minimum(tl.maximum(_below(work + 8 * K, 4 * K + 1, wanted, True), 1), 4 * K)
    before, after = tl.load(work + 8 * K + k - 1), tl.load(work + 8 * K + k)
    low, high = tl.load(work + k - 1), tl.load(work + k)
    tl.store(table + j, low + (wanted - before) / (after - before) * (high - low))


@triton.jit
def _optimal(points, sums, ranks, table, work, choices, n, distinct, K: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """As `optimal_codebook`, of bins that are distinct values, or 512 of them: half by count, half by width."""
    lane, half = tl.arange(0, 1024), tl.arange(0, 256)
    first, last = _point(points, 0), _point(points, n - 1)
    if distinct <= 512:
        bound = _below(ranks, n, lane.to(tl.float64), True)
    else:
        by_count = _point(points, (half.to(tl.int64) * n // 256).to(tl.int32))
        by_width = tl.where(half < 128, half.to(tl.float64) / 255.0, 1.0 - (255 - half).to(tl.float64) / 255.0)
        by_width = first + by_width * (last - first)
        tl.store(work + 1024 + half, by_count)
        tl.store(work + 1280 + half, by_width)
        tl.debug_barrier()
        tl.store(work + half + _below(work + 1280, 256, by_count, True), by_count)
        tl.store(work + half + _below(work + 1024, 256, by_width, False), by_width)
        tl.debug_barrier()
        edge = tl.load(work + tl.minimum(tl.maximum(lane - 1, 0), 511))
        bound = tl.where(lane == 0, 0, _below(points, n, edge, False))
    bound = tl.where(lane > 512, n, bound)  # the points of bin b are those from bound b to bound b + 1
    tl.debug_barrier()
    tl.store(work + lane, bound.to(tl.float64))
    tl.debug_barrier()
    end = tl.load(work + tl.minimum(lane + 1, 513)).to(tl.int32)
    weight = (end - bound).to(tl.float64)
    mean = tl.load(sums + n) / n
    value = (tl.load(sums + end) - tl.load(sums + bound)) / tl.maximum(weight, 1.0) - mean
    value = tl.where(weight > 0, value, 0.0)
    tl.debug_barrier()
    # Prefix sums before lane j: of weights, of values, of squares.
    tl.store(work + lane, bound.to(tl.float64))
    tl.store(work + 1024 + lane, tl.cumsum(weight * value, 0) - weight * value)
    tl.store(work + 2048 + lane, tl.cumsum(weight * value * value, 0) - weight * value * value)
    tl.debug_barrier()
    w, s, q = tl.load(work + lane), tl.load(work + 1024 + lane), tl.load(work + 2048 + lane)
    cost = tl.where(w > 0, tl.maximum(q - s * s / tl.maximum(w, 1e-300), 0.0), 0.0)
    tl.store(work + 3072 + lane, cost)
    for stage in range(K - 1):
        tl.debug_barrier()
        best = tl.zeros((1024,), tl.float64) + float("inf")
        choice = tl.zeros((1024,), tl.int32)
        for i in range(514):
            mass, moment = w - tl.load(work + i), s - tl.load(work + 1024 + i)
            own = tl.maximum(q - tl.load(work + 2048 + i) - moment * moment / tl.maximum(mass, 1e-300), 0.0)
            own = tl.where(mass > 0, own, tl.where(lane >= i, 0.0, float("inf"))) + tl.load(work + 3072 + i)
            choice = tl.where(own < best, i, choice)
            best = tl.minimum(own, best)
        tl.debug_barrier()
        tl.store(work + 3072 + lane, best)
        tl.store(choices + stage * 1024 + lane, choice)
    tl.debug_barrier()
    stop = tl.sum(tl.zeros((16,), tl.int32), 0) + 513
    for stage in range(K):
        start = tl.load(choices + tl.maximum(K - 2 - stage, 0) * 1024 + stop)
        start = tl.where(stage == K - 1, 0, start)
        count = tl.load(work + stop) - tl.load(work + start)
        total = tl.load(work + 1024 + stop) - tl.load(work + 1024 + start)
        centroid = tl.where(count > 0, total / tl.maximum(count, 1.0) + mean, -float("inf"))
        tl.store(table + K - 1 - stage, centroid)
        stop = start
    tl.debug_barrier()
    highest = first  # a centroid without points goes where the one before it is
    for j in range(K):
        highest = tl.maximum(highest, tl.load(table + j))
        tl.store(table + j, highest)


@triton.jit
def _fit(  # noqa: ANN202
    points, scale, last, centroids, edges, kept, sums, ranks, table, work, choices, n, iters,  # noqa: ANN001
    K: tl.constexpr, WARM: tl.constexpr, CHUNK: tl.constexpr, COLD: tl.constexpr,  # noqa: N803
):  # fmt: skip
    lane = tl.arange(0, CHUNK)
    total = tl.sum(lane.to(tl.float64), 0) * 0.0
    rank = tl.sum(lane, 0) * 0
    tl.store(sums, total)
    for chunk in range(0, n, CHUNK):
        at = chunk + lane
        own = tl.load(points + at, mask=at < n, other=0.0).to(tl.float64)
        before = tl.load(points + tl.maximum(at - 1, 0), mask=at < n, other=0.0).to(tl.float64)
        new = ((own != before) & (at < n)).to(tl.int32)
        tl.store(sums + 1 + at, total + tl.cumsum(own, 0), mask=at < n)
        tl.store(ranks + at, (rank + tl.cumsum(new, 0)).to(tl.float64), mask=at < n)
        total += tl.sum(own, 0)
        rank += tl.sum(new, 0)
    mean = total / n
    squares = total * 0.0
    for chunk in range(0, n, CHUNK):
        at = chunk + lane
        own = tl.load(points + at, mask=at < n, other=0.0).to(tl.float64) - mean
        squares += tl.sum(tl.where(at < n, own * own, 0.0), 0)
    std = tl.sqrt(squares / n)
    tl.debug_barrier()
    j = tl.arange(0, K)
    cold = n > 0
    if WARM:
        tl.store(table + j, tl.load(last + j).to(tl.float64) * std + mean)
        tl.debug_barrier()
        _lloyd(points, sums, table, n, iters, K)
        cold = _is_poor(points, table, n, K)
    if cold:
        distinct = rank + 1
        if distinct <= K:
            tl.store(table + j, _point(points, tl.minimum(_below(ranks, n, j.to(tl.float64), True), n - 1)))
        else:
            if (K > 64) & (distinct > 512):
                _density(points, table, work, n, K)
            else:
                _optimal(points, sums, ranks, table, work, choices, n, distinct, K)
        tl.debug_barrier()
        _lloyd(points, sums, table, n, COLD, K)
    poor = _is_poor(points, table, n, K)
    step = tl.load(scale + 1)
    good = tl.abs(step) <= 3.4028234663852886e38
    own = tl.load(table + j)
    before = tl.zeros((K,), tl.float32) + float("nan")
    if WARM:
        before = tl.load(last + j)
    tl.store(kept + j, tl.where(good & (poor == 0), ((own - mean) / std).to(tl.float32), before))
    found = tl.where(std > 0, own, _point(points, 0)).to(tl.float32)
    tl.store(centroids + j, tl.where(good, found, float("nan")))
    tl.debug_barrier()
    after = tl.load(centroids + tl.minimum(j + 1, K - 1))
    tl.store(edges + j, after * 0.5 + tl.load(centroids + j) * 0.5, mask=j < K - 1)


def fit_codebook(sample, scale, last, bits, iters):  # noqa: ANN001, ANN201
    n, k = sample.numel(), 2**bits
    if sample.dtype not in FLOATS or n >= 2**16:
        return NotImplemented
    own = {"dtype": torch.float64, "device": sample.device}
    centroids, kept = (torch.empty(k, dtype=torch.float32, device=sample.device) for _ in range(2))
    edges = torch.empty(k - 1, dtype=torch.float32, device=sample.device)
    sums, ranks, table, work = (torch.empty(size, **own) for size in (n + 1, n, k, max(4 * LANES, 16 * k)))
    choices = torch.empty(k * LANES, dtype=torch.int32, device=sample.device)
    launch(_fit, 1, sample.device, sample, scale, last, centroids, edges, kept, sums, ranks, table, work, choices, n,
           iters, K=k, WARM=last is not None, CHUNK=CHUNK, COLD=COLD)  # fmt: skip
    return centroids, edges, kept
