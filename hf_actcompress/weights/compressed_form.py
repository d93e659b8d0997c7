"""What compression leaves of one or several tensors: Theta.  Counted bits, decompressed values, stored form.

All tensors lie on the CPU; values are fp32.  Decompression uses only look-ups, single products and sums in a fixed
order, so that it gives the same bits everywhere (codecs: as far as the codec does).  How Theta is found is not known
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..codecs import Payload, parse_codec
from .bitstream import from_gaps, gap_width, nbytes, pack, to_gaps, unpack, width_of

Shapes = Sequence[tuple[int, ...]]
FLOAT = 32  # bits
LEVELS = {"binary": (-1.0, 1.0), "ternary": (-1.0, 0.0, 1.0)}


class Writer:
    """Collects the stored form: packed fields, then to be joined by dtype."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Tensor]] = {}

    def put(self, x: Tensor) -> None:
        self.streams.setdefault(str(x.dtype).removeprefix("torch."), []).append(x.detach().cpu().reshape(-1))

    def codes(self, codes: Any, width: int) -> None:
        self.put(torch.from_numpy(pack(np.asarray(codes, np.int64), width)))

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.streams.items()}


class Reader:
    """Hands out again, in order, what a Writer collected.  Raises ValueError beyond the end."""

    def __init__(self, streams: dict[str, Tensor]) -> None:
        self.streams, self.at = streams, dict.fromkeys(streams, 0)

    def take(self, count: int, dtype: str = "float32") -> Tensor:
        stream, start = self.streams.get(dtype), self.at.get(dtype, 0)
        if count == 0:
            return torch.zeros(0, dtype=getattr(torch, dtype))
        if stream is None or count < 0 or start + count > stream.numel():
            raise ValueError(f"the manifest asks for {count} values of {dtype} more than the file holds")
        self.at[dtype] = start + count
        return stream[start : start + count].clone()

    def codes(self, count: int, width: int) -> Any:
        if not 0 <= width <= 32:
            raise ValueError(f"the manifest asks for codes of {width} bits")
        return unpack(self.take(nbytes(count, width), "uint8").numpy(), count, width)

    def finish(self) -> None:
        rest = {name: s.numel() - self.at[name] for name, s in self.streams.items() if self.at[name] != s.numel()}
        if rest:
            raise ValueError(f"the file holds more values than the manifest names: {rest}")


class Theta:
    """`shapes` are those of the tensors it stands for."""

    kind = ""
    shapes: Shapes

    @property
    def bits(self) -> int:
        raise NotImplementedError

    def values(self) -> list[Tensor]:
        """fp32, one for each of `shapes`."""
        return split(self._flat(), self.shapes)

    def _flat(self) -> Tensor:
        raise NotImplementedError

    def store(self, out: Writer) -> list[Any]:
        """Put the tensors; returns what else is needed (JSON), beginning with the kind."""
        raise NotImplementedError


def split(flat: Tensor, shapes: Shapes) -> list[Tensor]:
    return [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]


@dataclass(frozen=True)
class Codes(Theta):
    """ceil(log2 k) bits a value and k floats; `levels` "binary" or "ternary": one float, the scale."""

    shapes: Shapes
    codes: Any  # integers [N]
    floats: Tensor  # the codebook, or the scale
    levels: str = "codebook"

    @property
    def table(self) -> Tensor:
        return torch.tensor(LEVELS[self.levels]) * self.floats if self.levels in LEVELS else self.floats

    @property
    def bits(self) -> int:
        return width_of(self.table.numel()) * len(self.codes) + FLOAT * self.floats.numel()

    def _flat(self) -> Tensor:
        return self.table[torch.from_numpy(self.codes)]

    def store(self, out: Writer) -> list[Any]:
        out.codes(self.codes, width_of(self.table.numel()))
        out.put(self.floats)
        return [self.levels, self.floats.numel()] if self.levels == "codebook" else [self.levels]


@dataclass(frozen=True)
class Sparse(Theta):
    """The values that stay, 32 bits each, or of a codebook; positions as gaps; the rest is zero."""

    shapes: Shapes
    positions: Any  # integers, ascending
    values_: Tensor  # fp32 [kept], or the codebook [k]
    codes: Any = None  # integers [kept] with a codebook

    @property
    def bits(self) -> int:
        width, fields = gap_width(self.positions)
        return width * fields + FLOAT * self.values_.numel() + (
            0 if self.codes is None else width_of(self.values_.numel()) * len(self.codes)
        )  # fmt: skip

    def _flat(self) -> Tensor:
        out = torch.zeros(sum(math.prod(s) for s in self.shapes))
        kept = self.values_ if self.codes is None else self.values_[torch.from_numpy(self.codes)]
        out[torch.from_numpy(self.positions)] = kept
        return out

    def store(self, out: Writer) -> list[Any]:
        width, fields = gap_width(self.positions)
        out.codes(to_gaps(self.positions, width), width)
        if self.codes is not None:
            out.codes(self.codes, width_of(self.values_.numel()))
        out.put(self.values_)
        return ["sparse", width, fields, *([] if self.codes is None else [self.values_.numel()])]


@dataclass(frozen=True)
class Factors(Theta):
    """left [m, r] times right [n, r] transposed; the matrix has the tensor's first dimension as rows."""

    shapes: Shapes
    left: Tensor
    right: Tensor

    @property
    def bits(self) -> int:
        return FLOAT * (self.left.numel() + self.right.numel())

    def _flat(self) -> Tensor:
        # Not a matrix product, whose order of summation depends on the machine.
        out = torch.zeros(self.left.shape[0], self.right.shape[0])
        for u, v in zip(self.left.T, self.right.T, strict=True):
            out += u[:, None] * v
        return out.view(-1)

    def store(self, out: Writer) -> list[Any]:
        out.put(self.left)
        out.put(self.right)
        return ["lowrank", self.left.shape[1]]


@dataclass(frozen=True)
class Dense(Theta):
    """All values, 32 bits each: where factors would take more."""

    shapes: Shapes
    flat: Tensor

    @property
    def bits(self) -> int:
        return FLOAT * self.flat.numel()

    def _flat(self) -> Tensor:
        return self.flat

    def store(self, out: Writer) -> list[Any]:
        out.put(self.flat)
        return ["dense"]


@dataclass(frozen=True)
class Coded(Theta):
    """The payload of a codec."""

    shapes: Shapes
    payload: Payload

    @property
    def bits(self) -> int:
        return 8 * self.payload.nbytes

    def _flat(self) -> Tensor:
        return parse_codec(self.payload.codec).decode(self.payload).reshape(-1)

    def store(self, out: Writer) -> list[Any]:
        return ["codec", _store_payload(self.payload, out)]


@dataclass(frozen=True)
class Several(Theta):
    """Each tensor by itself."""

    parts: tuple[Theta, ...]

    @property
    def shapes(self) -> Shapes:
        return [shape for part in self.parts for shape in part.shapes]

    @property
    def bits(self) -> int:
        return sum(part.bits for part in self.parts)

    def values(self) -> list[Tensor]:
        return [value for part in self.parts for value in part.values()]

    def store(self, out: Writer) -> list[Any]:
        return ["each", *(part.store(out) for part in self.parts)]


@dataclass(frozen=True)
class Sum(Theta):
    """Parts that are added, each of which stands for all of the tensors."""

    parts: tuple[Theta, ...]

    @property
    def shapes(self) -> Shapes:
        return self.parts[0].shapes

    @property
    def bits(self) -> int:
        return sum(part.bits for part in self.parts)

    def values(self) -> list[Tensor]:
        total = [value.clone() for value in self.parts[0].values()]
        for part in self.parts[1:]:
            total = [a + b for a, b in zip(total, part.values(), strict=True)]
        return total

    def store(self, out: Writer) -> list[Any]:
        return ["sum", *(part.store(out) for part in self.parts)]


def restore(stored: Sequence[Any], shapes: Shapes, source: Reader) -> Theta:
    """The Theta that `store` put; ValueError where manifest, shapes and file do not fit together."""
    kind, *rest = stored
    n = sum(math.prod(s) for s in shapes)
    if kind == "each":
        if len(rest) != len(shapes):
            raise ValueError(f"the manifest describes {len(rest)} tensors where there are {len(shapes)}")
        return Several(tuple(restore(part, [shape], source) for part, shape in zip(rest, shapes, strict=True)))
    if kind == "sum":
        return Sum(tuple(restore(part, shapes, source) for part in rest))
    if kind in ("codebook", *LEVELS):
        count = rest[0] if kind == "codebook" else 1
        k = count if kind == "codebook" else len(LEVELS[kind])
        codes = source.codes(n, width_of(k))
        _below(codes, k, "code")
        return Codes(shapes, codes, source.take(count), kind)
    if kind == "sparse":
        width, fields = rest[:2]
        positions = from_gaps(source.codes(fields, width), width)
        _below(positions, n, "position")
        if len(rest) == 2:
            return Sparse(shapes, positions, source.take(len(positions)))
        codes = source.codes(len(positions), width_of(rest[2]))
        _below(codes, rest[2], "code")
        return Sparse(shapes, positions, source.take(rest[2]), codes)
    if kind == "lowrank":
        (rank,), rows = rest, shapes[0][0]
        return Factors(shapes, source.take(rows * rank).view(rows, rank),
                       source.take(n // max(rows, 1) * rank).view(n // max(rows, 1), rank))  # fmt: skip
    if kind == "dense":
        return Dense(shapes, source.take(n))
    if kind == "codec":
        return Coded(shapes, _restore_payload(rest[0], source))
    raise ValueError(f"the manifest names an unknown kind of compression, {kind!r}; a newer version wrote it")


def _below(codes: Any, limit: int, what: str) -> None:
    if len(codes) and int(codes.max()) >= limit:
        raise ValueError(f"the file holds the {what} {int(codes.max())}, and there are {limit}")


def _store_payload(payload: Payload, out: Writer) -> dict[str, Any]:
    for tensor in payload.tensors.values():
        out.put(tensor)
    return {
        "codec": payload.codec, "shape": payload.shape, "dtype": str(payload.dtype).removeprefix("torch."),
        "raw": payload.raw,
        "tensors": {k: [str(t.dtype).removeprefix("torch."), *t.shape] for k, t in payload.tensors.items()},
        "parts": {k: _store_payload(part, out) for k, part in payload.parts.items()},
    }  # fmt: skip


def _restore_payload(stored: dict[str, Any], source: Reader) -> Payload:
    tensors = {name: source.take(math.prod(shape), dtype).view(shape)
               for name, (dtype, *shape) in stored["tensors"].items()}  # fmt: skip
    return Payload(
        stored["codec"], tuple(stored["shape"]), getattr(torch, stored["dtype"]), tensors,
        {name: _restore_payload(part, source) for name, part in stored["parts"].items()}, stored["raw"],
    )  # fmt: skip
