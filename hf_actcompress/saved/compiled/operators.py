"""What a compiled graph calls: a saved tensor to one uint8 tensor and back, and counts of bytes.

    encode_saved(x [*lead, *tail])  ->  payload [*lead, bytes of a row]        row: the elements of `tail`

The leading sizes of the payload are those of the tensor, so that the backward graph knows them where they are
symbolic.  Codes come first and scales behind them.  Only groups that divide a row have this form; the payload of any
other codec is [bytes], and its shape has to be known when the graph is compiled.

The noise of stochastic rounding has a key that the operator draws when it runs, so no graph is compiled again for it
and nothing waits for the device.  A CUDA graph (mode="reduce-overhead") records one key and repeats it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...codecs.base import Codec, CodecState
from ...codecs.block import Block
from ...codecs.parse import parse_codec
from ...codecs.payload import Payload
from ...codecs.rounding import key_of
from ...ops.bitmaps import decode_table, pack_flags
from ...ops.groups import dequantize_groups, quantize_groups
from ...ops.library import operator
from ...ops.packing import COLS, codes_nbytes


@dataclass
class Totals:
    """Of all calls of the graphs compiled for a codec: bytes that would have been held, and bytes that are."""

    tensors: int = 0
    raw: int = 0
    held: int = 0


TOTALS: dict[str, Totals] = {}
STATES: dict[str, CodecState | None] = {}  # by codec: of the site whose pass runs: which noise comes next
codec_of = functools.lru_cache(64)(parse_codec)


def _count(codec: str, x: Tensor, payload: Tensor, again: float, exact: float) -> None:
    total, raw = TOTALS.setdefault(codec, Totals()), x.nbytes
    total.tensors += 1
    total.raw += raw + round(raw * (again + exact))
    total.held += payload.nbytes + round(raw * exact)


def row_nbytes(codec: Block, group: int, row: int) -> int:
    return row * codec.bits // 8 + 4 * (row // group)


def _encode(x: Tensor, codec: str, group: int, tail: int, again: float, exact: float) -> Tensor:
    form, x = codec_of(codec), x.contiguous()
    if group:
        out = _encode_fake(x, codec, group, tail, again, exact)
        key = key_of(form, STATES.get(codec))
        parts = quantize_groups(x, None, 1, None, group, form.bits, key, None)
    else:
        parts = list(form.encode(x, STATES.get(codec)).tensors.values())
        out = x.new_empty(sum(part.nbytes for part in parts), dtype=torch.uint8)
    flat, begin = out.view(-1), 0
    for part in parts:
        flat[begin : begin + part.nbytes].copy_(part.view(-1).view(torch.uint8))
        begin += part.nbytes
    _count(codec, x, out, again, exact)
    return out


def _encode_fake(x, codec, group, tail, again, exact):  # noqa: ANN001, ANN202
    form = codec_of(codec)
    if not group:
        return x.new_empty(form.payload_nbytes(tuple(x.shape), x.dtype), dtype=torch.uint8)
    lead = list(x.shape[: x.dim() - tail])
    return x.new_empty([*lead, row_nbytes(form, group, math.prod(x.shape[x.dim() - tail :]))], dtype=torch.uint8)


def _decode(payload: Tensor, codec: str, group: int, tail: list[int], dtype: torch.dtype) -> Tensor:
    form, flat = codec_of(codec), payload.contiguous().view(-1)
    if not group:
        return form.decode(_as_payload(form, flat, tuple(tail), dtype))
    shape = [*payload.shape[:-1], *tail]
    begin = math.prod(shape) * form.bits // 8
    scales = flat[begin:].view(torch.bfloat16).view(-1, 2)
    return dequantize_groups(flat[:begin], scales, None, 1, shape, dtype, group, form.bits)


def _decode_fake(payload, codec, group, tail, dtype):  # noqa: ANN001, ANN202
    return payload.new_empty([*payload.shape[:-1], *tail] if group else tail, dtype=dtype)


@functools.lru_cache(1024)
def _entries(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[str, tuple, torch.dtype, int]]:
    """Name, shape, dtype and bytes of the tensors of a payload."""
    found = codec.encode(torch.zeros(shape, dtype=dtype), codec.init_state())
    return [(name, tuple(part.shape), part.dtype, part.nbytes) for name, part in found.tensors.items()]


def _as_payload(codec: Codec, flat: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Payload:
    tensors, begin = {}, 0
    for name, size, kind, nbytes in _entries(codec, shape, dtype):
        tensors[name] = flat[begin : begin + nbytes].clone().view(kind).view(size)
        begin += nbytes
    return Payload(str(codec), shape, dtype, tensors)


def _bits(x: Tensor, codec: str, tail: int, itemsize: int) -> Tensor:
    out, packed = _bits_fake(x, codec, tail, itemsize), pack_flags(x.contiguous(), 0.0, None)
    out.view(-1)[: packed.numel()].copy_(packed)
    _count(codec, x, out, itemsize - 1, 0.0)
    return out


def _bits_fake(x, codec, tail, itemsize):  # noqa: ANN001, ANN202
    lead, row = list(x.shape[: x.dim() - tail]), math.prod(x.shape[x.dim() - tail :])
    return x.new_empty([*lead, -(-row // 8)], dtype=torch.uint8)


@functools.lru_cache(8)
def _zero_one(device: torch.device) -> Tensor:
    return torch.arange(2, dtype=torch.uint8, device=device)


def _flags(payload: Tensor, tail: list[int]) -> Tensor:
    shape = [*payload.shape[:-1], *tail]
    packed = payload.contiguous().view(-1)[: codes_nbytes(math.prod(shape), COLS, 1)]
    return decode_table(packed, _zero_one(payload.device), shape, 1).view(torch.bool)


def _flags_fake(payload, tail):  # noqa: ANN001, ANN202
    return payload.new_empty([*payload.shape[:-1], *tail], dtype=torch.bool)


# x [*lead, *tail], whose last `tail` dimensions are a row.  group: elements, a divisor of the row; 0: any other codec.
# again, exact: bytes that this graph makes again and keeps exactly, over those of x: they are counted with it.
encode_saved = operator(
    "encode_saved(Tensor x, str codec, int group, int tail, float again, float exact) -> Tensor", _encode, _encode_fake
)
decode_saved = operator(
    "decode_saved(Tensor payload, str codec, int group, int[] tail, ScalarType dtype) -> Tensor",
    _decode, _decode_fake,
)  # fmt: skip
# bool [*lead, *tail] -> uint8 [*lead, row / 8 rounded up], and back.
# itemsize: of the tensor that it stands for, bytes; 0 where that is counted elsewhere.
bits_saved = operator("bits_saved(Tensor x, str codec, int tail, int itemsize) -> Tensor", _bits, _bits_fake)
flags_saved = operator("flags_saved(Tensor payload, int[] tail) -> Tensor", _flags, _flags_fake)
