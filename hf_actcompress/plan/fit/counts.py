"""What a step takes at any number of layers, rows and tokens, from a few steps that were counted.

The bytes that are alive at one operation are a polynomial in these numbers: affine in the rows and in the layers
(where all layers are alike), of second degree in the tokens.  So operations are compared one by one, and the peak, the
largest of them, is as exact as if the whole step were counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .step import Counted
from .tracker import BACKWARD, FORWARD

SHALLOW, DEEP = 3, 4  # layers that are counted in place of many
SCALARS = ("parameters", "trained", "gradients", "optimizer", "batch", "held", "flops", "moved", "codec")


class Unlike(ValueError):
    """Steps that do not have the same operations."""


@dataclass(frozen=True)
class Count:
    """Bytes at every operation that allocates, by where it is, and totals."""

    lives: dict[tuple, np.ndarray] = field(repr=False)
    parameters: float
    trained: float
    gradients: float
    optimizer: float
    batch: float
    held: float
    flops: float
    moved: float  # bytes that operations read and write
    codec: float  # bytes that codecs do

    @property
    def always(self) -> float:
        return self.parameters + self.optimizer + self.batch

    @property
    def peak(self) -> float:
        return max(float(values.max()) for values in self.lives.values())

    def peak_in(self) -> str:
        """The phase of the step in which it is."""
        return max(self.lives, key=lambda key: float(self.lives[key].max()))[0]


def count_of(counted: Counted, layers: str | None = None, depth: int | None = None) -> Count:
    """layers: the path of the list of layers, by which operations are grouped: the first two and the last two layers
    stand for all."""
    lives: dict[tuple, list[int]] = {}
    for phase in (FORWARD, BACKWARD):
        events = [event for event in counted.events if event.phase == phase]
        for event, layer in zip(events, _layers(events, layers), strict=True):
            for place in _places(layer, depth):
                lives.setdefault((phase, place), []).append(event.live)
    rest = [event.live for event in counted.events if event.phase not in (FORWARD, BACKWARD)]
    lives["optimizer", None] = [max(rest)]
    return Count(
        {key: np.array(values, dtype=np.float64) for key, values in lives.items()}, counted.parameters,
        counted.trained, counted.gradients, counted.optimizer, counted.batch, counted.held,
        float(sum(counted.flops.values())), counted.moved.get("dense", 0), counted.moved.get("codec", 0),
    )  # fmt: skip


def _layers(events: Sequence[Any], layers: str | None) -> list[int | None]:
    """The layer of each event; what is between two layers belongs to the one before."""
    if layers is None:
        return [None] * len(events)
    found: list[int | None] = []
    for event in events:
        head, _, rest = event.module.partition(f"{layers}.")
        number = rest.split(".")[0]
        found.append(int(number) if not head and number.isdecimal() else None)
    inside = [i for i, layer in enumerate(found) if layer is not None]
    if inside:
        for i in range(inside[0], inside[-1]):
            if found[i] is None:
                found[i] = found[i - 1]
    return found


def _places(layer: int | None, depth: int | None) -> list[Any]:
    if layer is None or depth is None:
        return [None]
    from_end = depth - 1 - layer
    return [("first", layer)] * (layer < 2) + [("last", from_end)] * (from_end < 2)


def combine(counts: Sequence[Count], weights: Sequence[float]) -> Count:
    """The weighted sum, operation by operation.  Raises Unlike where they do not have the same operations."""
    first = counts[0]
    shapes = [{key: len(values) for key, values in count.lives.items()} for count in counts]
    if any(shape != shapes[0] for shape in shapes):
        raise Unlike("the steps do not have the same operations")
    lives = {key: sum(w * count.lives[key] for w, count in zip(weights, counts, strict=True)) for key in first.lives}
    scalars = {name: sum(w * getattr(count, name) for w, count in zip(weights, counts, strict=True))
               for name in SCALARS}  # fmt: skip
    return replace(first, lives=lives, **scalars)


def through(points: Sequence[float], at: float) -> list[float]:
    """Weights of the values at `points` in the polynomial through them, at `at` (Lagrange)."""
    weights = []
    for i, own in enumerate(points):
        weight = 1.0
        for j, other in enumerate(points):
            if i != j:
                weight *= (at - other) / (own - other)
        weights.append(weight)
    return weights


def at(points: Sequence[float], counts: Sequence[Count], value: float) -> Count:
    return combine(counts, through(points, value))


def largest(points: Sequence[float], counts: Sequence[Count], limit: float, most: int) -> int:
    """The largest whole number up to `most` at which the peak stays within `limit` bytes; 0 where none does."""
    stacked = [np.concatenate([count.lives[key] for key in sorted(counts[0].lives, key=str)]) for count in counts]
    if len({len(values) for values in stacked}) > 1:
        stacked = [np.array([count.peak]) for count in counts]

    def fits(value: int) -> bool:
        weights = through(points, value)
        return float(sum(w * values for w, values in zip(weights, stacked, strict=True)).max()) <= limit

    low, high = 0, most
    if fits(most):
        return most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
