"""Pruning: the largest magnitudes stay, the rest becomes zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.selection import bitmap_nbytes, index_dtype, keep_largest, place_values, select_largest
from .base import Codec, CodecState, LeafShapes, Payload
from .registry import register_codec


@register_codec("topk")
@dataclass(frozen=True)
class TopK(Codec):
    """Keeps the share `ratio` of largest magnitude (at least one value; of equal magnitudes the first).

    ratio: in (0, 1].
    NaN and Inf count as the largest and come out as they went in, as far as the ratio has room for them.
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
        n = x.numel()
        k = self.kept(n)
        values, positions = select_largest(x, k, _bitmap_is_smaller(n, k))
        return self._payload(x, {"values": values, "positions": positions})

    def _decode(self, payload: Payload) -> Tensor:
        n = math.prod(payload.shape)
        k = self.kept(n)
        bitmap = _bitmap_is_smaller(n, k)
        positions = (bitmap_nbytes(n), torch.uint8) if bitmap else (k, index_dtype(n))
        values, where = self._sized(payload, values=(k, payload.dtype), positions=positions)
        readable = where.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and not _fit(where, n, k):
            raise ValueError(f"{self}: the positions of a payload do not fit {k} of {n} values: it is damaged.")
        if bitmap:
            return place_values(values, where, payload.shape)
        # A GPU checks its indices by itself.
        out = torch.zeros(n, dtype=payload.dtype, device=values.device)
        return out.scatter_(0, where.long(), values).view(payload.shape)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        return keep_largest(x, self.kept(x.numel()))

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        n = math.prod(shape)
        k = self.kept(n)
        return k * dtype.itemsize + (bitmap_nbytes(n) if _bitmap_is_smaller(n, k) else k * index_dtype(n).itemsize)

    def leaf_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> LeafShapes:
        return {"values": ((self.kept(math.prod(shape)),), dtype)}


def _fit(where: Tensor, n: int, k: int) -> bool:
    """Whether positions, a bitmap or indices, on a CPU, are those of k out of n values."""
    if where.dtype != torch.uint8:
        return 0 <= int(where.min()) and int(where.max()) < n
    v = torch.nn.functional.pad(where, (0, -len(where) % 8)).view(torch.int64)  # eight bytes at a time
    v = v - ((v >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    return int(v.view(torch.uint8).sum()) == k


def _bitmap_is_smaller(n: int, k: int) -> bool:
    return bitmap_nbytes(n) <= k * index_dtype(n).itemsize
