"""Pruning: by count, by share, by a penalty, within the l1 ball; optionally with a codebook for the kept values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .base import GAIN, SWEEPS, Compression, check, flatten, shapes_of
from .compressed_form import CompressedForm, Sparse
from .partition import assign, codebook


@dataclass(frozen=True)
class Prune(Compression):
    """Keeps few values; all others become zero.  Exactly one of:

    keep: how many (`keep=104`, of all tensors together) or which share (`keep=1%`); the largest magnitudes.
    l0: a penalty of l0 for each kept value: those above sqrt(2 l0 / mu).
    l1: a penalty of l1 times the magnitude: all shrink by l1 / mu.
    l1_norm: the magnitudes may sum up to that: the nearest point of the l1 ball.

    k: kept values become one of k shared values (with keep or l0).
    joint=false: each tensor by itself.
    Bits: 32 a kept value (with k: ceil(log2 k), and 32 k), and the gaps between positions in fields of the
    best width.
    """

    keep: int | str | None = None
    l0: float | None = None
    l1: float | None = None
    l1_norm: float | None = None
    k: int | None = None
    joint: bool = True
    name: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        given = [o for o in ("keep", "l0", "l1", "l1_norm") if getattr(self, o) is not None]
        if len(given) != 1:
            raise ValueError(
                f"prune: give exactly one of keep=, l0=, l1= and l1_norm=; got {given or 'none'}. "
                "Examples: prune:keep=104, prune:keep=1%, prune:l0=1e-6."
            )
        if isinstance(self.keep, str):
            share = re.fullmatch(r"(\d+(\.\d*)?|\.\d+)%", self.keep)
            check(self.name, "keep", self.keep, share and float(self.keep[:-1]) <= 100, _KEEP)
        elif self.keep is not None:
            check(self.name, "keep", self.keep, isinstance(self.keep, int) and self.keep >= 0, _KEEP)
        for option in ("l0", "l1", "l1_norm"):
            value = getattr(self, option)
            check(self.name, option, value, value is None or value >= 0, "a number of 0 or more")
        check(self.name, "k", self.k, self.k is None or (isinstance(self.k, int) and 1 <= self.k <= 2**16),
               "an integer from 1 to 65536")  # fmt: skip
        if self.k is not None and given[0] in ("l1", "l1_norm"):
            raise ValueError(f"prune: k={self.k} (a codebook for what stays) goes with keep= or l0=, not {given[0]}=.")

    @property
    def needs_mu(self) -> bool:  # type: ignore[override]
        return self.l0 is not None or self.l1 is not None

    def kept(self, n: int) -> int:
        if isinstance(self.keep, str):
            return round(float(self.keep[:-1]) / 100 * n)
        assert self.keep is not None
        return min(self.keep, n)

    def _compress(self, tensors: list[Tensor], mu: float | None, start: CompressedForm | None) -> CompressedForm:
        x, shapes = flatten(tensors), shapes_of(tensors)
        if self.k is not None:
            return self._shared(x, shapes, mu)
        if self.l1 is not None or self.l1_norm is not None:
            by = self.l1 / mu if self.l1 is not None else _ball_threshold(np.abs(x), self.l1_norm)  # type: ignore
            where = np.flatnonzero(np.abs(x) > by)
            values = x[where] - by * np.sign(x[where])
        else:
            where = self._select(x**2, mu)
            values = x[where]
        return Sparse(shapes, where, torch.from_numpy(values.astype(np.float32)))

    def _select(self, gain: Any, mu: float | None) -> Any:
        """Ascending positions of the values to keep, by how much each lowers the squared error."""
        if self.l0 is not None:
            return np.flatnonzero(gain > 2 * self.l0 / mu)  # type: ignore[operator]
        keep = self.kept(gain.size)
        if keep == 0:
            return np.zeros(0, np.int64)
        where = np.arange(gain.size) if keep == gain.size else np.argpartition(gain, gain.size - keep)[-keep:]
        return np.sort(where[gain[where] > 0])

    def _shared(self, x: Any, shapes: Any, mu: float | None) -> Sparse:
        """Alternates: the best codebook for the kept values, and the values to keep with that codebook."""
        assert self.k is not None
        best, least, where = None, math.inf, self._select(x**2, mu)
        for _ in range(SWEEPS):
            if not where.size:
                break
            table = codebook(x[where], self.k).astype(np.float32).astype(np.float64)
            # A value belongs to the nearest centroid; keeping it pays by x^2 - (x - centroid)^2.
            near = table[assign(x, table)]
            where = self._select(x**2 - (x - near) ** 2, mu)
            error = float(((x[where] - near[where]) ** 2).sum() + (x**2).sum() - (x[where] ** 2).sum())
            error += 0.0 if self.l0 is None else 2 * self.l0 / mu * where.size  # type: ignore[operator]
            if best is not None and error >= (1 - GAIN) * least:
                break
            best, least = (table, where, assign(x[where], table)), error
        if best is None:
            return Sparse(shapes, np.zeros(0, np.int64), torch.zeros(1), np.zeros(0, np.int64))
        table, where, codes = best
        return Sparse(shapes, where, torch.from_numpy(table.astype(np.float32)), codes)


_KEEP = "a count such as 104 or a share such as 1% (from 0% to 100%)"


def _ball_threshold(size: Any, radius: float) -> float:
    """By how much magnitudes must shrink for their sum to be `radius` (0: they are within).

    Source: Duchi et al., Efficient projections onto the l1-ball, 2008.
    """
    if size.sum() <= radius:
        return 0.0
    order = np.sort(size)[::-1]
    excess = (np.cumsum(order) - radius) / np.arange(1, size.size + 1)
    stay = np.flatnonzero(order > excess)  # the largest count of values above the threshold that they imply
    return float(excess[stay[-1]]) if stay.size else float(order[0])
