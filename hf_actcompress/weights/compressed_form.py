"""The compressed form of tensors ("Theta" in the papers): counted bits, decompressed values, stored form.

All tensors lie on the CPU; values are fp32.  Decompression uses look-ups, single products and sums in a fixed order,
so that it gives the same bits on every machine (a codec's payload: as far as the codec does).  How a compressed form
is found is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codecs import Payload, parse_codec
from .bitstream import gap_width, to_gaps, width_of
from .stream import Writer, name_of

Shapes = Sequence[tuple[int, ...]]
FLOAT = 32  # bits
LEVELS = {"binary": (-1.0, 1.0), "ternary": (-1.0, 0.0, 1.0)}


class CompressedForm:
    """Of the tensors of these `shapes`."""

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
class Codes(CompressedForm):
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
class Sparse(CompressedForm):
    """The values that are kept, 32 bits each or codes of a codebook; positions as gaps; all others are zero."""

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
class Factors(CompressedForm):
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
class Dense(CompressedForm):
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
class Coded(CompressedForm):
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
class Several(CompressedForm):
    """Each tensor by itself."""

    parts: tuple[CompressedForm, ...]

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
class Sum(CompressedForm):
    """Parts that are added, each of which stands for all of the tensors."""

    parts: tuple[CompressedForm, ...]

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


def _store_payload(payload: Payload, out: Writer) -> dict[str, Any]:
    for tensor in payload.tensors.values():
        out.put(tensor)
    return {
        "codec": payload.codec, "shape": list(payload.shape), "dtype": name_of(payload.dtype),
        "tensors": {k: [name_of(t.dtype), *t.shape] for k, t in payload.tensors.items()},
        "parts": {k: _store_payload(part, out) for k, part in payload.parts.items()},
    }  # fmt: skip
