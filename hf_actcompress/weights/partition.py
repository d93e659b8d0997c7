"""Optimal codebooks of many values: one-dimensional k-means without a sort where there are many.

It knows arrays only.  fp64 throughout; every result is the same for the same values, whatever the number of threads.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
EXACT = 1 << 17  # (layers of the dynamic programme) x (distinct values) up to which no histogram is needed
BINS = 1 << 12
LLOYD = 20


def codebook(x: Array, k: int) -> Array:
    """Values [n] -> at most k ascending centroids of least squared error.

    Exact for k <= 2 or where k * (distinct values) is small; else optimal on a histogram of 4096 bins, half of them
    of equal counts and half of equal widths, and then improved on all values by Lloyd's iterations.
    """
    if x.size == 0:
        return np.zeros(1)
    if k > 2 and x.size * (k - 2) > 4 * EXACT:
        return _by_histogram(x, k)
    values, counts = np.unique(x, return_counts=True)
    if k > 2 and values.size * (k - 2) > EXACT:
        return _by_histogram(x, k)
    return partition(values, counts.astype(np.float64), k)


def partition(values: Array, weights: Array, k: int) -> Array:
    """Ascending values [n] with weights [n] -> the min(k, n) centroids of least weighted squared error, exactly.

    The dynamic programme over cut points: the best last cut moves to the right as the end does, so that halving finds
    all of a layer's in O(n log n); memory k * n.  Source: Wang and Song, Ckmeans.1d.dp, 2011; Groenlund et al., Fast
    exact k-means, 2017.
    """
    n = values.size
    if n <= k:
        return values.astype(np.float64)
    middle = np.average(values, weights=weights)  # keeps the prefix sums of squares accurate
    shifted = values - middle
    w, s, q = (np.concatenate([[0.0], np.cumsum(t)]) for t in (weights, weights * shifted, weights * shifted**2))

    def cost(i: NDArray, j: NDArray | int) -> Array:
        """Squared error of one centroid for the values i .. j - 1 (i < j)."""
        return np.maximum(q[j] - q[i] - (s[j] - s[i]) ** 2 / (w[j] - w[i]), 0.0)

    every = np.arange(1, n + 1)
    best, choices = np.concatenate([[0.0], cost(np.zeros_like(every), every)]), []
    for layer in range(2, k):
        best, choice = _layer(best, cost, layer, n)
        choices.append(choice)
    cuts = [n]
    if k > 1:
        starts = np.arange(k - 1, n)
        cuts.append(int(starts[np.argmin(best[starts] + cost(starts, n))]))
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    bounds = np.array([0, *reversed(cuts)])
    return np.diff(s[bounds]) / np.diff(w[bounds]) + middle


def _layer(before: Array, cost, layer: int, n: int) -> tuple[Array, NDArray[np.int64]]:
    """From the least errors with layer - 1 centroids for each end, those with one more, and where the last begins."""
    best, choice = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
    step = 1 << n.bit_length()
    low, high = np.full(n + 1, layer - 1), np.full(n + 1, n - 1)
    while step:
        ends = np.arange(step, n + 1, 2 * step)
        ends = ends[ends >= layer]
        if ends.size:
            first, last = low[ends], np.minimum(high[ends], ends - 1)
            count = last - first + 1
            begin = np.concatenate([[0], np.cumsum(count)[:-1]])
            start = np.arange(count.sum()) - np.repeat(begin - first, count)
            error = before[start] + cost(start, np.repeat(ends, count))
            best[ends] = np.minimum.reduceat(error, begin)
            hits = np.flatnonzero(error == np.repeat(best[ends], count))
            _, at = np.unique(np.searchsorted(begin, hits, side="right"), return_index=True)
            choice[ends] = start[hits[at]]
        half = step // 2
        if half:  # the next ends lie between two that are known
            new = np.arange(half, n + 1, step)
            left, right = new - half, new + half
            low[new] = np.maximum(np.where(left >= layer, choice[left], layer - 1), layer - 1)
            known = right <= n
            high[new] = np.where(known & (right >= layer), choice[np.minimum(right, n)], n - 1)
        step = half
    return best, choice


def assign(x: Array, table: Array) -> NDArray[np.int64]:
    """For each value the nearest of the ascending centroids; of two equally near the lower."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, x, side="left")


def _by_histogram(x: Array, k: int) -> Array:
    half = BINS // 2
    sample = np.sort(x[:: (x.size // (1 << 16)) | 1])
    by_count = sample[np.arange(half) * sample.size // half]
    edges = np.unique(np.concatenate([by_count, np.linspace(x.min(), x.max(), half)]))
    bins = np.searchsorted(edges, x)
    weights, sums = (np.bincount(bins, t, minlength=edges.size + 1) for t in (None, x))
    used = weights > 0
    table = partition(sums[used] / weights[used], weights[used].astype(np.float64), k)
    # Between the bins' edges a cut is exact; within a bin Lloyd moves it.
    for _ in range(LLOYD if x.size <= 1 << 20 else 2):
        code = assign(x, table)
        count, total = (np.bincount(code, t, minlength=table.size) for t in (None, x))
        new = np.sort(np.where(count > 0, total / np.maximum(count, 1), table))
        if np.array_equal(new, table):
            break
        table = new
    return table
