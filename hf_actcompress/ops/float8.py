"""8-bit floating point numbers with one scale for the tensor."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu import float8 as cpu
from .groups import tiles
from .library import operator
from .packing import COLS
from .scales import to_dtype

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _coded(x: Tensor, scale: Tensor, format: str) -> Tensor:
    top = torch.finfo(FORMATS[format]).max
    return (x.float() / scale[-1]).clamp(-top, top).to(FORMATS[format])


def _encode(x: Tensor, scale: Tensor, format: str) -> Tensor:
    flat, out = x.reshape(-1), _encode_fake(x, scale, format)
    for run in _runs(flat):
        out[run] = _coded(flat[run], scale, format).view(torch.uint8)
    return out


def _runs(flat: Tensor) -> Iterator[slice]:
    for first, count, width in tiles(flat.numel(), COLS, flat.device):
        yield slice(first * COLS, first * COLS + count * width)


def _encode_fake(x: Tensor, scale: Tensor, format: str) -> Tensor:
    return x.new_empty(x.numel(), dtype=torch.uint8)


def _decode(codes: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype, format: str) -> Tensor:
    out = codes.new_empty(codes.numel(), dtype=dtype)
    for run in _runs(codes):
        out[run] = to_dtype(codes[run].view(FORMATS[format]).float() * scale[-1], dtype)
    return out.view(shape)


def _decode_fake(codes: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype, format: str) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _roundtrip(x: Tensor, scale: Tensor, format: str) -> Tensor:
    flat, out = x.reshape(-1), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for run in _runs(flat):
        out.view(-1)[run] = to_dtype(_coded(flat[run], scale, format).float() * scale[-1], x.dtype)
    return out if x.is_contiguous() else torch.empty_like(x).copy_(out)


def _roundtrip_fake(x: Tensor, scale: Tensor, format: str) -> Tensor:
    return x.new_empty(x.shape) if x.is_contiguous() else torch.empty_like(x)


def _decode_cpu(codes: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype, format: str) -> Tensor:
    return cpu.decode(FORMATS[format], codes, scale, shape, dtype)


def _roundtrip_cpu(x: Tensor, scale: Tensor, format: str) -> Tensor:
    return cpu.roundtrip(FORMATS[format], functools.partial(_coded, format=format), x, scale)


# x (any shape), scale fp32 (the last number is what 1.0 stands for) -> bytes uint8 [n]; format: "e4m3" or "e5m2".
encode_float8 = operator("encode_float8(Tensor x, Tensor scale, str format) -> Tensor", _encode, _encode_fake,
                         triton="float8:encode")  # fmt: skip
decode_float8 = operator(
    "decode_float8(Tensor codes, Tensor scale, SymInt[] shape, ScalarType dtype, str format) -> Tensor",
    _decode, _decode_fake, cpu=_decode_cpu, triton="float8:decode",
)  # fmt: skip
roundtrip_float8 = operator("roundtrip_float8(Tensor x, Tensor scale, str format) -> Tensor",
                            _roundtrip, _roundtrip_fake, cpu=_roundtrip_cpu,
                            triton="float8:roundtrip")  # fmt: skip
