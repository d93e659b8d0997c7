"""Pruning: the largest magnitudes stay, the rest becomes zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.layout import in_memory_order, restored
from ..ops.quantize import keep_above, place
from ..ops.rows import decode_parts, encode_parts, join
from ..ops.selection import find_cut, ranks, runs_of_set_bits, set_bits
from .base import Codec, CodecState, LeafShapes, Payload
from .registry import register_codec


@register_codec("topk")
@dataclass(frozen=True)
class TopK(Codec):
    """Keeps the share `ratio` of largest magnitude (at least one value; of equal magnitudes the first).

    ratio: in (0, 1].
    Payload: the kept values in the tensor's dtype + their positions, as a bitmap (1 bit per element) or as 32-bit
    (64-bit from 2**31 elements) indices, whichever is smaller.
    Source: top-k sparsification of activations and gradients, as in Aji and Heafield, 2017.
    """

    ratio: float = 0.1
    leaves: ClassVar[tuple[str, ...]] = ("values",)

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, (int, float)) or isinstance(self.ratio, bool) or not 0 < self.ratio <= 1:
            raise ValueError(
                f"topk: ratio={self.ratio!r} is outside (0, 1]; it is the share of values that is kept, "
                "for example ratio=0.1 keeps 10 %."
            )
        object.__setattr__(self, "ratio", float(self.ratio))

    def kept(self, n: int) -> int:
        """How many of `n` values stay."""
        return max(1, min(n, round(self.ratio * n)))

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        payload = self._encode_checked(x, state)
        assert payload is not None, "a tensor that was said to be finite is not"
        return payload

    def _encode_checked(self, x: Tensor, state: CodecState | None) -> Payload | None:
        flat, n = x.reshape(-1), x.numel()
        k = self.kept(n)
        cut = find_cut(flat, k)
        if cut is None:
            return None
        if _bitmap_is_smaller(n, k):
            bits, values, at = cut.bitmap(), flat.new_empty(k), 0
            for start, index in runs_of_set_bits(bits, n):
                torch.index_select(flat[start:], 0, index, out=values[at : at + index.numel()])
                at += index.numel()
            return self._payload(x, {"values": values, "positions": bits})
        where = torch.cat([set_bits(cut.bits, n, sparse=True), cut.more]).sort().values
        return self._payload(x, {"values": flat[where], "positions": where.to(_index_dtype(n))})

    def _decode(self, payload: Payload) -> Tensor:
        n = math.prod(payload.shape)
        k = self.kept(n)
        bitmap = _bitmap_is_smaller(n, k)
        positions = (-(-n // 8), torch.uint8) if bitmap else (k, _index_dtype(n))
        values, where = self._sized(payload, values=(k, payload.dtype), positions=positions)
        self._check_positions(where, n, k, bitmap)
        if not bitmap:
            out = torch.zeros(n, dtype=payload.dtype, device=values.device)
            out[where.long()] = values
            return out.view(payload.shape)
        shared = [values.view(-1, 1)]
        return decode_parts(place, where, payload.shape, 1, shared, per_byte=[ranks(where)])

    def _check_positions(self, where: Tensor, n: int, k: int, bitmap: bool) -> None:
        """On a CPU; on a GPU it would wait for the device, which checks its own indices."""
        if where.device.type != "cpu":
            return
        if bitmap:
            bits = torch.arange(8)
            fits = int(((where[:, None] >> bits) & 1).sum()) == k
        else:
            fits = 0 <= int(where.min()) and int(where.max()) < n
        if not fits:
            raise ValueError(f"{self}: the positions of a payload do not fit {k} of {n} values: it is damaged.")

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        flat, cut = in_memory_order(x).reshape(-1), find_cut(x, self.kept(x.numel()))
        assert cut is not None
        out = join(encode_parts(keep_above, flat, [cut.hi]))[: x.numel()]
        out[cut.more] = flat[cut.more]
        return restored(out, x)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        n = math.prod(shape)
        k = self.kept(n)
        return k * dtype.itemsize + (-(-n // 8) if _bitmap_is_smaller(n, k) else k * _index_dtype(n).itemsize)

    def leaf_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> LeafShapes:
        return {"values": ((self.kept(math.prod(shape)),), dtype)}


def _index_dtype(n: int) -> torch.dtype:
    return torch.int32 if n < 2**31 else torch.int64


def _bitmap_is_smaller(n: int, k: int) -> bool:
    return -(-n // 8) <= k * _index_dtype(n).itemsize
