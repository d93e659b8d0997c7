"""Pruning: the largest magnitudes stay, the rest becomes zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, CodecState, LeafShapes, Payload
from .packing import pack, unpack


@dataclass(frozen=True)
class TopK(Codec):
    """Keeps the share `ratio` of largest magnitude (at least one value; of equal magnitudes the first).

    ratio: in (0, 1].
    Payload: the kept values in the tensor's dtype + their positions, as a bitmap (1 bit per element) or as 32-bit
    (64-bit from 2**31 elements) indices, whichever is smaller.
    Source: top-k sparsification of activations and gradients, as in Aji and Heafield, 2017.
    """

    ratio: float = 0.1
    name: ClassVar[str] = "topk"
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

    def _mask(self, flat: Tensor) -> Tensor:
        """bool [n] with exactly `kept(n)` ones."""
        n, k = flat.numel(), self.kept(flat.numel())
        size = flat.abs()
        if k == n:
            return torch.ones_like(size, dtype=torch.bool)
        threshold = size.kthvalue(n - k + 1).values
        mask = size > threshold
        missing = k - int(mask.sum())
        ties = (size == threshold).nonzero().view(-1)[:missing]
        mask[ties] = True
        return mask

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        flat = x.reshape(-1)
        mask = self._mask(flat)
        n = flat.numel()
        if _bitmap_is_smaller(n, self.kept(n)):
            pad = torch.nn.functional.pad(mask.to(torch.uint8), (0, -n % 8))
            where = pack(pad.view(1, -1), 1).view(-1)
        else:
            where = mask.nonzero().view(-1).to(_index_dtype(n))
        return self._payload(x, {"values": flat[mask], "positions": where})

    def _decode(self, payload: Payload) -> Tensor:
        return self._place(payload, payload.tensors["values"])

    def _place(self, payload: Payload, values: Tensor) -> Tensor:
        n, where = math.prod(payload.shape), payload.tensors["positions"]
        out = torch.zeros(n, dtype=payload.dtype, device=values.device)
        if _bitmap_is_smaller(n, self.kept(n)):
            mask = unpack(where.view(1, -1), 1, where.numel() * 8).view(-1)[:n].bool()
            out[mask] = values
        else:
            out[where.long()] = values
        return out.view(payload.shape)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        flat = x.reshape(-1)
        return torch.where(self._mask(flat), flat, torch.zeros_like(flat)).view(x.shape)

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
