"""Compressed forms from a file.  What the file says is checked before anything is allocated."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..codecs import Payload, parse_codec
from .bitstream import from_gaps, width_of
from .compressed_form import LEVELS, Coded, Codes, CompressedForm, Dense, Factors, Several, Shapes, Sparse, Sum
from .stream import Reader, dtype_of, whole

LARGEST_CODEBOOK = 2**16


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


def _check_payload(payload: Payload) -> None:
    """Decoders trust the sizes of what they decode, so these have to be the ones that the codec itself makes."""
    codec = parse_codec(payload.codec)
    example = torch.randn(payload.shape, generator=torch.Generator().manual_seed(0)).to(payload.dtype)
    expected = _layout(codec.encode(example))
    if _layout(payload) != expected:
        raise ValueError(f"codec: the payload holds {_layout(payload)}, and {codec} makes {expected}")


def _layout(payload: Payload, path: str = "") -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    found = {path + name: (tuple(tensor.shape), tensor.dtype) for name, tensor in payload.tensors.items()}
    for name, part in payload.parts.items():
        found |= _layout(part, f"{path}{name}/")
    return found


def _restore_payload(stored: Any, source: Reader) -> Payload:
    fields = {"codec", "shape", "dtype", "tensors", "parts"}
    if not isinstance(stored, dict) or set(stored) - {"raw"} != fields:
        raise ValueError("codec: the payload's description is not complete")
    tensors = {}
    for name, (dtype, *sizes) in stored["tensors"].items():
        shape = _shape(sizes, f"codec: {name}")
        tensors[name] = source.take(math.prod(shape), dtype).view(shape)
    parts = {name: _restore_payload(part, source) for name, part in stored["parts"].items()}
    shape, codec = _shape(stored["shape"], "codec: shape"), stored["codec"]
    if stored.get("raw") is True:
        # Version 0.1 kept tensors that it could not code, and those of identity, as they were.
        codec, tensors = "identity", {"values" if name == "raw" else name: t for name, t in tensors.items()}
    return Payload(codec, shape, dtype_of(stored["dtype"]), tensors, parts)
