"""The compressed form of tensors ("Theta" in the papers): counted bits, decompressed values, stored form.

All tensors lie on the CPU; values are fp32.  Decompression uses look-ups, single products and sums in a fixed order,
so that it gives the same bits on every machine (a codec's payload: as far as the codec does).  How a compressed form
is found is not known here.

What a file says is checked before anything is allocated: `restore` and `Reader` raise ValueError, which names the
field.
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
LARGEST_CODEBOOK = 2**16
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64, torch.complex128,
)}  # fmt: skip


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """The dtype that a file names."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown")
    return DTYPES[name]


def whole(value: Any, least: int, most: int, field: str) -> int:
    """A whole number from a file, if it lies between `least` and `most`."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{field}={value!r} is no whole number from {least} to {most}")
    return value


class Writer:
    """Collects the stored form: one stream of values a dtype; codes of few bits go to that of uint8."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Tensor]] = {}

    def put(self, x: Tensor) -> None:
        self.streams.setdefault(name_of(x.dtype), []).append(x.detach().cpu().reshape(-1))

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
        left = 0 if stream is None else stream.numel() - start
        whole(count, 0, left, f"number of {dtype} values")
        if stream is None:
            return torch.zeros(0, dtype=dtype_of(dtype))
        self.at[dtype] = start + count
        return stream[start : start + count].clone()

    def codes(self, count: int, width: int, below: int, field: str) -> Any:
        """`count` codes of `width` bits, all less than `below`."""
        found = unpack(self.take(nbytes(count, width), "uint8").numpy(), count, width)
        if len(found) and int(found.max()) >= below:
            raise ValueError(f"{field}: the file holds {int(found.max())}, and there are {below}")
        return found

    def finish(self) -> None:
        rest = {name: s.numel() - self.at[name] for name, s in self.streams.items() if self.at[name] != s.numel()}
        if rest:
            raise ValueError(f"the file holds more values than the manifest names: {rest}")


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


def restore(stored: Any, shapes: Shapes, source: Reader) -> CompressedForm:
    """The form that `store` wrote.

    Raises ValueError, which names the field, where manifest, shapes and file do not fit together.
    """
    if not isinstance(stored, list) or not stored:
        raise ValueError(f"{stored!r} describes no compression")
    kind, *rest = stored
    n = sum(math.prod(s) for s in shapes)
    if kind == "each":
        if len(rest) != len(shapes):
            raise ValueError(f"each: {len(rest)} tensors are described where there are {len(shapes)}")
        return Several(tuple(restore(part, [shape], source) for part, shape in zip(rest, shapes, strict=True)))
    if kind == "sum":
        if not rest:
            raise ValueError("sum: there are no parts")
        return Sum(tuple(restore(part, shapes, source) for part in rest))
    if kind in ("codebook", *LEVELS):
        size = whole(_only(rest), 1, LARGEST_CODEBOOK, "codebook: k") if kind == "codebook" else 1
        k = size if kind == "codebook" else len(LEVELS[kind])
        codes = source.codes(n, width_of(k), k, f"{kind}: code")
        return Codes(shapes, codes, source.take(size), kind)
    if kind == "sparse":
        if len(rest) not in (2, 3):
            raise ValueError(f"sparse: {rest} are not width, fields and perhaps k")
        width = whole(rest[0], 0, 32, "sparse: width")
        fields = whole(rest[1], 0, n, "sparse: fields")  # each moves on by one place or more
        positions = from_gaps(source.codes(fields, width, 2**width, "sparse: gap"), width)
        if len(positions) and int(positions[-1]) >= n:
            raise ValueError(f"sparse: the last position is {int(positions[-1])}, and there are {n} values")
        if len(rest) == 2:
            return Sparse(shapes, positions, source.take(len(positions)))
        k = whole(rest[2], 1, LARGEST_CODEBOOK, "sparse: k")
        codes = source.codes(len(positions), width_of(k), k, "sparse: code")
        return Sparse(shapes, positions, source.take(k), codes)
    if kind == "lowrank":
        if len(shapes) != 1 or len(shapes[0]) < 2:
            raise ValueError(f"lowrank: {list(shapes)} is not the shape of one matrix")
        rows = shapes[0][0]
        columns = n // max(rows, 1)
        rank = whole(_only(rest), 0, min(rows, columns), "lowrank: rank")
        return Factors(shapes, source.take(rows * rank).view(rows, rank),
                       source.take(columns * rank).view(columns, rank))  # fmt: skip
    if kind == "dense":
        return Dense(shapes, source.take(n))
    if kind == "codec":
        payload = _restore_payload(_only(rest), source)
        if [payload.shape] != [tuple(shape) for shape in shapes]:
            raise ValueError(f"codec: the payload's shape is {payload.shape}, the tensor's {list(shapes)}")
        _check_payload(payload)
        return Coded(shapes, payload)
    raise ValueError(f"{kind!r} is an unknown kind of compression; a newer version may have written it")


def _only(rest: list[Any]) -> Any:
    if len(rest) != 1:
        raise ValueError(f"{rest} is not one option")
    return rest[0]


def _shape(value: Any, field: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{field}={value!r} is no shape")
    return tuple(whole(size, 0, 2**48, field) for size in value)


def _store_payload(payload: Payload, out: Writer) -> dict[str, Any]:
    for tensor in payload.tensors.values():
        out.put(tensor)
    return {
        "codec": payload.codec, "shape": list(payload.shape), "dtype": name_of(payload.dtype), "raw": payload.raw,
        "tensors": {k: [name_of(t.dtype), *t.shape] for k, t in payload.tensors.items()},
        "parts": {k: _store_payload(part, out) for k, part in payload.parts.items()},
    }  # fmt: skip


def _check_payload(payload: Payload) -> None:
    """Decoders trust the sizes of what they decode, so these have to be the ones that the codec itself makes."""
    codec = parse_codec(payload.codec)
    example = torch.randn(payload.shape, generator=torch.Generator().manual_seed(0)).to(payload.dtype)
    expected = {"raw": (payload.shape, payload.dtype)} if payload.raw else _layout(codec.encode(example))
    if _layout(payload) != expected:
        raise ValueError(f"codec: the payload holds {_layout(payload)}, and {codec} makes {expected}")


def _layout(payload: Payload, path: str = "") -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    found = {path + name: (tuple(tensor.shape), tensor.dtype) for name, tensor in payload.tensors.items()}
    for name, part in payload.parts.items():
        found |= _layout(part, f"{path}{name}/")
    return found


def _restore_payload(stored: Any, source: Reader) -> Payload:
    if not isinstance(stored, dict) or set(stored) != {"codec", "shape", "dtype", "raw", "tensors", "parts"}:
        raise ValueError("codec: the payload's description is not complete")
    tensors = {}
    for name, (dtype, *sizes) in stored["tensors"].items():
        shape = _shape(sizes, f"codec: {name}")
        tensors[name] = source.take(math.prod(shape), dtype).view(shape)
    parts = {name: _restore_payload(part, source) for name, part in stored["parts"].items()}
    shape = _shape(stored["shape"], "codec: shape")
    return Payload(stored["codec"], shape, dtype_of(stored["dtype"]), tensors, parts, stored["raw"] is True)
