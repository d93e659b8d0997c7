"""Compressions of weights: the nearest tensor of a kind (a projection), as a Theta with its counted bits.

A compression is a frozen dataclass whose fields are its options.  It takes one or several tensors; `joint` ones see
them as one long vector.  Models, training and files are not known here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..codecs import Codec, codec_names, parse_codec
from .partition import assign, codebook
from .theta import Coded, Codes, Dense, Factors, Several, Sparse, Sum, Theta

SWEEPS = 30  # of an alternating minimisation, at most
GAIN = 1e-3  # relative gain below which it ends


class Compression:
    """Subclasses set `name` and implement `_compress` for tensors that belong together."""

    name: ClassVar[str] = ""
    joint: bool = False
    needs_mu: bool = False  # whether it weighs a penalty against mu / 2 times the squared error

    def compress(self, tensors: Sequence[Tensor], mu: float | None = None, start: Theta | None = None) -> Theta:
        """The Theta nearest to the tensors (any floating dtype).

        mu: with a penalty C(Theta), the minimum of C + mu / 2 * squared error is found.
        start: an earlier result, from which alternating minimisations go on if it is the better start.
        """
        if self.needs_mu and not mu:
            raise ValueError(f"{self} weighs a penalty against mu/2 times the squared error: give mu > 0.")
        tensors = [t.detach().float() for t in tensors]
        if not all(torch.isfinite(t).all() for t in tensors):
            raise ValueError(f"{self}: the weights hold NaN or Inf. Lower the learning rate or mu.")
        if self.joint or len(tensors) == 1:
            return self._compress(tensors, mu, start)
        return Several(tuple(self._compress([t], mu, None) for t in tensors))

    def _compress(self, tensors: list[Tensor], mu: float | None, start: Theta | None) -> Theta:
        raise NotImplementedError

    def __str__(self) -> str:
        always = {"codebook": "k", "lowrank": "rank"}.get(self.name)
        options = [f"{f.name}={_text(getattr(self, f.name))}" for f in dataclasses.fields(self)  # type: ignore
                   if getattr(self, f.name) != f.default or f.name == always]  # fmt: skip
        return f"{self.name}:{','.join(options)}" if options else self.name


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _flat(tensors: Sequence[Tensor]) -> Any:
    """fp64 numpy [N]"""
    return torch.cat([t.reshape(-1) for t in tensors]).double().cpu().numpy()


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


@dataclass(frozen=True)
class Codebook(Compression):
    """Each value becomes one of k shared values, chosen for the least squared error (see partition.py).

    Bits: ceil(log2 k) a value + 32 k.
    joint: one codebook for all tensors, not one for each.
    """

    k: int = 2
    joint: bool = False
    name: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        _check(self.name, "k", self.k, isinstance(self.k, int) and 1 <= self.k <= 2**16, "an integer from 1 to 65536")

    def _compress(self, tensors: list[Tensor], mu: float | None, start: Theta | None) -> Theta:
        x = _flat(tensors)
        table = codebook(x, self.k).astype(np.float32)
        return Codes(_shapes(tensors), assign(x, table.astype(np.float64)), torch.from_numpy(table))


@dataclass(frozen=True)
class Binary(Compression):
    """-a or +a, the sign of each value, with the mean magnitude as a.  Bits: 1 a value + 32."""

    joint: bool = False
    name: ClassVar[str] = "binary"

    def _compress(self, tensors: list[Tensor], mu: float | None, start: Theta | None) -> Theta:
        x = _flat(tensors)
        scale = np.abs(x).mean() if x.size else 0.0
        return Codes(_shapes(tensors), (x >= 0).astype(np.int64), torch.tensor([scale]).float(), "binary")


@dataclass(frozen=True)
class Ternary(Compression):
    """-a, 0 or +a of least squared error: the t largest magnitudes stay where (their sum)^2 / t is largest, with
    their mean as a.  Bits: 2 a value + 32."""

    joint: bool = False
    name: ClassVar[str] = "ternary"

    def _compress(self, tensors: list[Tensor], mu: float | None, start: Theta | None) -> Theta:
        x = _flat(tensors)
        size = np.sort(np.abs(x))[::-1]
        sums, count = np.cumsum(size), np.arange(1, x.size + 1)
        best = int(np.argmax(sums**2 / count)) if x.size else 0
        scale, least = (sums[best] / (best + 1), size[best]) if x.size else (0.0, 0.0)
        codes = np.where(np.abs(x) >= least, np.where(x < 0, 0, 2), 1)
        return Codes(_shapes(tensors), codes, torch.tensor([scale]).float(), "ternary")


@dataclass(frozen=True)
class Prune(Compression):
    """Few values stay, the rest becomes zero.  Exactly one of:

    keep: how many (`keep=104`, of all tensors together) or which share (`keep=1%`); the largest magnitudes.
    l0: a penalty of l0 for each value that stays: those above sqrt(2 l0 / mu).
    l1: a penalty of l1 times the magnitude: all shrink by l1 / mu.
    l1_norm: the magnitudes may sum up to that: the nearest point of the l1 ball.

    k: what stays takes one of k shared values (with keep or l0).
    joint=false: each tensor by itself.
    Bits: 32 a value that stays (with k: ceil(log2 k), and 32 k), and the gaps between positions in fields of the
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
            _check(self.name, "keep", self.keep, share and float(self.keep[:-1]) <= 100, _KEEP)
        elif self.keep is not None:
            _check(self.name, "keep", self.keep, isinstance(self.keep, int) and self.keep >= 0, _KEEP)
        for option in ("l0", "l1", "l1_norm"):
            value = getattr(self, option)
            _check(self.name, option, value, value is None or value >= 0, "a number of 0 or more")
        _check(self.name, "k", self.k, self.k is None or (isinstance(self.k, int) and 1 <= self.k <= 2**16),
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

    def _compress(self, tensors: list[Tensor], mu: float | None, start: Theta | None) -> Theta:
        x, shapes = _flat(tensors), _shapes(tensors)
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
        """Ascending positions of what is worth keeping, by how much the squared error falls."""
        if self.l0 is not None:
            return np.flatnonzero(gain > 2 * self.l0 / mu)  # type: ignore[operator]
        keep = self.kept(gain.size)
        if keep == 0:
            return np.zeros(0, np.int64)
        where = np.arange(gain.size) if keep == gain.size else np.argpartition(gain, gain.size - keep)[-keep:]
        return np.sort(where[gain[where] > 0])

    def _shared(self, x: Any, shapes: Any, mu: float | None) -> Sparse:
        """In turn: the best codebook for what stays, and what to keep with that codebook."""
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


@dataclass(frozen=True)
class LowRank(Compression):
    """Each tensor as a matrix (first dimension by all others) of rank r, stored as factors or, where those would
    take more, as it is.

    rank: fixed, or "auto": the r that minimises alpha * (entries stored) + mu / 2 * squared error.
    Bits: 32 * r * (rows + columns), at most 32 * rows * columns.
    Source: Idelbayev and Carreira-Perpinan, Low-rank compression of neural nets: learning the rank, 2020.
    """

    rank: int | str = "auto"
    alpha: float | None = None
    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        if self.rank != "auto":
            _check(self.name, "rank", self.rank, isinstance(self.rank, int) and self.rank >= 0,
                   "an integer of 0 or more, or auto")  # fmt: skip
        if (self.rank == "auto") != (self.alpha is not None):
            raise ValueError(
                f"lowrank: got rank={self.rank}, alpha={self.alpha}; rank=auto needs alpha= (the price of one stored "
                "number, such as 1e-8) and a fixed rank takes none."
            )
        if self.alpha is not None:
            _check(self.name, "alpha", self.alpha, self.alpha >= 0, "a number of 0 or more")

    @property
    def needs_mu(self) -> bool:  # type: ignore[override]
        return self.rank == "auto"

    def _compress(self, tensors: list[Tensor], mu: float | None, start: Theta | None) -> Theta:
        (x,) = tensors
        if x.dim() < 2:
            raise ValueError(f"lowrank: a tensor of shape {tuple(x.shape)} is no matrix; leave it out of the pattern.")
        matrix = x.reshape(x.shape[0], -1)
        m, n = matrix.shape
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        ranks = torch.arange(len(s) + 1)
        entries = (ranks * (m + n)).clamp_max(m * n)
        if self.rank == "auto":
            energy = s.double().cpu().square()
            left = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
            rank = int((self.alpha * entries + mu / 2 * left).argmin())  # type: ignore[operator]
        elif self.rank > len(s):
            raise ValueError(
                f"lowrank: rank={self.rank} is above {len(s)}, the largest of a tensor of shape {tuple(x.shape)}, "
                f"seen as [{m}, {n}]. Factors take less than the tensor up to rank {(m * n - 1) // (m + n)}."
            )
        else:
            rank = int(self.rank)
        root = s[:rank].sqrt()
        theta = Factors(_shapes(tensors), (u[:, :rank] * root).cpu().contiguous(),
                        (vh[:rank].T * root).cpu().contiguous())  # fmt: skip
        return theta if rank * (m + n) < m * n else Dense(theta.shapes, theta.values()[0].reshape(-1))


@dataclass(frozen=True)
class Encode(Compression):
    """A registered codec, each tensor by itself.  Bits: those of its payload."""

    codec: Codec
    name: ClassVar[str] = "codec"

    def _compress(self, tensors: list[Tensor], mu: float | None, start: Theta | None) -> Theta:
        return Coded(_shapes(tensors), self.codec.encode(tensors[0].cpu().contiguous()))

    def __str__(self) -> str:
        text = str(self.codec)
        return f"codec:{text}" if text.partition(":")[0] in OWN else text


@dataclass(frozen=True)
class Additive(Compression):
    """A sum of compressions, found by alternating minimisation: each in turn takes what the others leave."""

    parts: tuple[Compression, ...]
    joint: ClassVar[bool] = True  # the parts decide by themselves

    @property
    def needs_mu(self) -> bool:  # type: ignore[override]
        return any(part.needs_mu for part in self.parts)

    def _compress(self, tensors: list[Tensor], mu: float | None, start: Theta | None) -> Theta:
        tensors = [t.cpu() for t in tensors]
        if isinstance(start, Sum):
            return self._alternate(tensors, mu, [part.values() for part in start.parts], reverse=False)[1]
        # Who comes first decides which local minimum is found: with outliers a codebook fits the bulk only after
        # pruning has taken them.
        nothing = [[torch.zeros_like(t) for t in tensors] for _ in self.parts]
        both = [self._alternate(tensors, mu, nothing, reverse) for reverse in (False, True)]
        return min(both, key=lambda result: result[0])[1]

    def _alternate(
        self, tensors: list[Tensor], mu: float | None, values: list[list[Tensor]], reverse: bool
    ) -> tuple[float, Sum]:
        values, thetas = list(values), [None] * len(self.parts)
        least, best = math.inf, None
        for sweep in range(SWEEPS):
            order = range(len(self.parts))
            for i in reversed(order) if reverse and sweep == 0 else order:
                others = [v for j, v in enumerate(values) if j != i]
                rest = [t - sum(v[at] for v in others) for at, t in enumerate(tensors)]
                thetas[i] = self.parts[i].compress(rest, mu)
                values[i] = thetas[i].values()
            error = _error(tensors, values)
            if best is not None and error >= (1 - GAIN) * least:
                break
            best, least = Sum(tuple(thetas)), error
        assert best is not None
        return least, best

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))


def _error(tensors: list[Tensor], values: list[list[Tensor]]) -> float:
    return sum(float((t - sum(v[at] for v in values)).double().square().sum()) for at, t in enumerate(tensors))


OWN: dict[str, type[Compression]] = {c.name: c for c in (Codebook, Binary, Ternary, Prune, LowRank)}


def parse_compression(spec: str | Compression) -> Compression:
    """A compression from its spec: `codebook:k=4`, `binary`, `ternary`, `prune:keep=1%`, `lowrank:rank=8`,
    `lowrank:rank=auto,alpha=1e-8`, any codec's (`block:bits=4`; a codec named like one of the former is written
    `codec:lowrank:rank=8`), or a sum of them: `codebook:k=2 + prune:keep=1%`.

    Raises ValueError with the names and options that exist.
    """
    if isinstance(spec, Compression):
        return spec
    if not isinstance(spec, str) or not spec.strip():
        raise ValueError(f"A compression is a spec such as 'codebook:k=2' or 'prune:keep=1%'; got {spec!r}.")
    parts = [part.strip() for part in re.split(r"\s\+\s", spec.strip())]
    if len(parts) > 1:
        return Additive(tuple(parse_compression(part) for part in parts))
    name, _, tail = parts[0].partition(":")
    if name == "codec":
        return Encode(parse_codec(tail))
    if name not in OWN:
        try:
            return Encode(parse_codec(parts[0]))
        except ValueError as error:
            if name.split("|")[0].removeprefix("ef+") in codec_names():
                raise
            raise ValueError(
                f"Unknown compression '{name}' in '{spec}'. Compressions: {', '.join(OWN)}; codecs: "
                f"{', '.join(codec_names())}; sums are written 'codebook:k=2 + prune:keep=1%'."
            ) from error
    options = {}
    known = [f.name for f in dataclasses.fields(OWN[name])]  # type: ignore[arg-type]
    for item in filter(None, (t.strip() for t in tail.split(","))):
        key, equals, value = (t.strip() for t in item.partition("="))
        if not equals or not value:
            raise ValueError(f"'{item}' in '{spec}' is not option=value. Example: codebook:k=4.")
        if key not in known or key in options:
            reason = "is given twice" if key in options else f"is unknown to {name}"
            raise ValueError(f"The option '{key}' in '{spec}' {reason}. Options: {', '.join(known)}.")
        options[key] = _value(value)
    try:
        return OWN[name](**options)
    except TypeError as error:
        raise ValueError(f"'{spec}' is not understood ({error}). Options of {name}: {', '.join(known)}.") from error


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _check(name: str, option: str, value: Any, good: Any, allowed: str) -> None:
    if not good or isinstance(value, bool):
        raise ValueError(f"{name}: {option}={value!r} is not {allowed}.")
