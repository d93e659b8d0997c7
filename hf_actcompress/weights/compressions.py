"""Codebooks, binary and ternary values, low rank, codecs, sums; and compressions by their specs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..codecs import Codec, codec_names, parse_codec
from ..codecs.spec import build, did_you_mean, split_spec
from .base import GAIN, SWEEPS, Compression, check, flatten, shapes_of
from .compressed_form import Coded, Codes, CompressedForm, Dense, Factors, Sum
from .partition import assign, codebook
from .pruning import Prune


@dataclass(frozen=True)
class Codebook(Compression):
    """Each value becomes one of k shared values of least squared error (see partition.py).

    Bits: ceil(log2 k) a value + 32 k.
    joint: one codebook for all tensors, not one for each.
    """

    k: int = 2
    joint: bool = False
    name: ClassVar[str] = "codebook"
    main: ClassVar[str] = "k"

    def __post_init__(self) -> None:
        check(self.name, "k", self.k, isinstance(self.k, int) and 1 <= self.k <= 2**16, "an integer from 1 to 65536")

    def _compress(self, tensors: list[Tensor], mu: float | None, start: CompressedForm | None) -> CompressedForm:
        x = flatten(tensors)
        table = codebook(x, self.k).astype(np.float32)
        return Codes(shapes_of(tensors), assign(x, table.astype(np.float64)), torch.from_numpy(table))


@dataclass(frozen=True)
class Binary(Compression):
    """-a or +a, the sign of each value, with the mean magnitude as a.  Bits: 1 a value + 32."""

    joint: bool = False
    name: ClassVar[str] = "binary"

    def _compress(self, tensors: list[Tensor], mu: float | None, start: CompressedForm | None) -> CompressedForm:
        x = flatten(tensors)
        scale = np.abs(x).mean() if x.size else 0.0
        return Codes(shapes_of(tensors), (x >= 0).astype(np.int64), torch.tensor([scale]).float(), "binary")


@dataclass(frozen=True)
class Ternary(Compression):
    """-a, 0 or +a of least squared error: the t largest magnitudes stay where (their sum)^2 / t is largest, with
    their mean as a.  Bits: 2 a value + 32."""

    joint: bool = False
    name: ClassVar[str] = "ternary"

    def _compress(self, tensors: list[Tensor], mu: float | None, start: CompressedForm | None) -> CompressedForm:
        x = flatten(tensors)
        size = np.sort(np.abs(x))[::-1]
        sums, count = np.cumsum(size), np.arange(1, x.size + 1)
        best = int(np.argmax(sums**2 / count)) if x.size else 0
        scale, least = (sums[best] / (best + 1), size[best]) if x.size else (0.0, 0.0)
        codes = np.where(np.abs(x) >= least, np.where(x < 0, 0, 2), 1)
        return Codes(shapes_of(tensors), codes, torch.tensor([scale]).float(), "ternary")


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
    main: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        if self.rank != "auto":
            check(self.name, "rank", self.rank, isinstance(self.rank, int) and self.rank >= 0,
                   "an integer of 0 or more, or auto")  # fmt: skip
        if (self.rank == "auto") != (self.alpha is not None):
            raise ValueError(
                f"lowrank: got rank={self.rank}, alpha={self.alpha}; rank=auto needs alpha= (the price of one stored "
                "number, such as 1e-8) and a fixed rank takes none."
            )
        if self.alpha is not None:
            check(self.name, "alpha", self.alpha, self.alpha >= 0, "a number of 0 or more")

    @property
    def needs_mu(self) -> bool:  # type: ignore[override]
        return self.rank == "auto"

    def _compress(self, tensors: list[Tensor], mu: float | None, start: CompressedForm | None) -> CompressedForm:
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
        form = Factors(shapes_of(tensors), (u[:, :rank] * root).cpu().contiguous(),
                        (vh[:rank].T * root).cpu().contiguous())  # fmt: skip
        return form if rank * (m + n) < m * n else Dense(form.shapes, form.values()[0].reshape(-1))


@dataclass(frozen=True)
class Encode(Compression):
    """A registered codec, each tensor by itself.  Bits: those of its payload."""

    codec: Codec
    name: ClassVar[str] = "codec"

    def __post_init__(self) -> None:
        if "weights" in self.codec.traits.unfit:
            raise ValueError(f"{self.codec} cannot compress weights: {self.codec.traits.unfit['weights']}")

    def _compress(self, tensors: list[Tensor], mu: float | None, start: CompressedForm | None) -> CompressedForm:
        lost = torch.zeros(1, dtype=torch.int64)
        payload = self.codec.encode(tensors[0].cpu().contiguous(), nonfinite=lost)
        if lost:
            raise ValueError(
                f"{self}: the codec cannot represent all values of a tensor of shape {tuple(tensors[0].shape)}, whose "
                f"largest magnitude is {float(tensors[0].abs().max()):.3g}. Leave it out of the scheme."
            )
        return Coded(shapes_of(tensors), payload)

    def __str__(self) -> str:
        text = str(self.codec)
        return f"codec:{text}" if text.partition(":")[0] in OWN else text


@dataclass(frozen=True)
class Additive(Compression):
    """A sum of compressions by alternating minimisation: each in turn compresses what the others leave over."""

    parts: tuple[Compression, ...]
    joint: ClassVar[bool] = True  # the parts decide by themselves

    @property
    def needs_mu(self) -> bool:  # type: ignore[override]
        return any(part.needs_mu for part in self.parts)

    def _compress(self, tensors: list[Tensor], mu: float | None, start: CompressedForm | None) -> CompressedForm:
        tensors = [t.cpu() for t in tensors]
        if isinstance(start, Sum):
            return self._alternate(tensors, mu, [part.values() for part in start.parts], reverse=False)[1]
        # The order decides which local minimum is found: a codebook fits the bulk of the values only after pruning
        # has taken the outliers.
        nothing = [[torch.zeros_like(t) for t in tensors] for _ in self.parts]
        both = [self._alternate(tensors, mu, nothing, reverse) for reverse in (False, True)]
        return min(both, key=lambda result: result[0])[1]

    def _alternate(
        self, tensors: list[Tensor], mu: float | None, values: list[list[Tensor]], reverse: bool
    ) -> tuple[float, Sum]:
        values, forms = list(values), [None] * len(self.parts)
        least, best = math.inf, None
        for sweep in range(SWEEPS):
            order = range(len(self.parts))
            for i in reversed(order) if reverse and sweep == 0 else order:
                others = [v for j, v in enumerate(values) if j != i]
                rest = [t - sum(v[at] for v in others) for at, t in enumerate(tensors)]
                forms[i] = self.parts[i].compress(rest, mu)
                values[i] = forms[i].values()
            error = _error(tensors, values)
            if best is not None and error >= (1 - GAIN) * least:
                break
            best, least = Sum(tuple(forms)), error
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
    if name in OWN:
        return build(OWN[name], name, split_spec(parts[0], "compression", "codebook:k=4")[1], spec)
    try:
        codec = parse_codec(tail if name == "codec" else parts[0])
    except ValueError as error:
        if name == "codec" or set(re.split(r"[|+]", name)) & set(codec_names()):
            raise
        raise ValueError(
            f"Unknown compression '{name}' in '{spec}'.{did_you_mean(name, [*OWN, *codec_names()])} Compressions: "
            f"{', '.join(OWN)}; codecs: {', '.join(codec_names())}; sums are written 'codebook:k=2 + prune:keep=1%'."
        ) from error
    return Encode(codec)
