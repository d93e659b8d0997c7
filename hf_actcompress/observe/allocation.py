"""Which option each place gets, so that all together keep to a limit: numbers only.

Errors are squared; those of different places are nearly independent, so they add up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .target import Target

WIDEST = 4096  # combinations that are kept while places are added one by one; fewer than that are all compared


@dataclass(frozen=True)
class Option:
    """A codec at one place: bytes left of `raw`, and the squared error of the gradient."""

    spec: str
    raw: int
    nbytes: int
    error: float


def best_combination(places: Sequence[Sequence[Option]], target: Target) -> list[int] | None:
    """For each place the number of its option, so that the target is kept: the least sum of errors under a ratio, the
    fewest bytes under an error.  None where no combination keeps it.

    Combinations that cost more than another one and are no better are dropped as places are added, which loses
    nothing; beyond WIDEST of them, neighbours are thinned out.
    """
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for options in places:
        grown = sorted(
            (nbytes + option.nbytes, error + option.error, (*chosen, i))
            for nbytes, error, chosen in front for i, option in enumerate(options) if math.isfinite(option.error)
        )  # fmt: skip
        front, least = [], math.inf
        for entry in grown:
            if entry[1] < least:
                front.append(entry)
                least = entry[1]
        if len(front) > WIDEST:
            step = (len(front) - 1) / (WIDEST - 1)
            front = [front[round(i * step)] for i in range(WIDEST)]
    if target.ratio is not None:
        allowed = sum(options[0].raw for options in places) / target.ratio
        kept = [entry for entry in front if entry[0] <= allowed]
        return list(kept[-1][2]) if kept else None
    kept = [entry for entry in front if math.sqrt(entry[1]) <= float(target.error or 0)]
    return list(kept[0][2]) if kept else None


def greedy(places: Sequence[Sequence[Option]], spare: float) -> list[int]:
    """For each place the number of its option, in ascending order of bytes: from the first ones on, always the step
    that saves most error a byte, while `spare` bytes last.

    That is optimal where every further step of a place saves less than the one before, but for the last few bytes.
    """
    chosen = [0] * len(places)

    def price(i: int) -> int:
        return places[i][chosen[i] + 1].nbytes - places[i][chosen[i]].nbytes

    def entry(i: int) -> tuple[float, int]:
        return -(places[i][chosen[i]].error - places[i][chosen[i] + 1].error) / max(1, price(i)), i

    heap = [entry(i) for i, options in enumerate(places) if len(options) > 1]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        if price(i) > spare:
            continue
        spare -= price(i)
        chosen[i] += 1
        if chosen[i] + 1 < len(places[i]):
            heapq.heappush(heap, entry(i))
    return chosen
