"""Per-tensor affine quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, CodecState, Payload, check_choice, check_int
from .levels import safe_inverse
from .packing import MAX_BITS, code_dtype, pack, packed_nbytes, unpack
from .rounding import RoundingState, hash_noise, next_key
from .rows import piece_shapes, row_pieces, tiles

COLS = 1024  # only a unit of packing: no scale depends on it


def round_codes(y: Tensor, top: int, key: int | None, index: int) -> Tensor:
    """y [R, C] in units of the step -> whole numbers 0 .. top as fp32; stochastic where a key is given.

    index: the flat index of y's first element, where its noise begins.
    """
    if key is None:
        return torch.round(y).clamp_(0, top)
    noise = hash_noise(y.shape[0], y.shape[1], key, index, y.device)
    return torch.floor(y + noise).clamp_(0, top)


@dataclass(frozen=True)
class Uniform(Codec):
    """One minimum and one step for the whole tensor; x is rounded to min + code * step.

    bits: 1 to 16.  round: "nearest" (error at most half a step) or "stochastic" (unbiased).
    Payload: bits / 8 bytes per element (rounded up to 8 elements) + 8 bytes.
    Source: the affine scheme of Jacob et al., 2018, in the per-tensor form of the reference system.
    """

    bits: int = 8
    round: str = "nearest"
    name: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, MAX_BITS, "To leave a tensor alone use identity.")
        check_choice(self.name, "round", self.round, ("nearest", "stochastic"))

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return RoundingState(site, seed) if self.round == "stochastic" else None

    def _scale(self, x: Tensor) -> Tensor:
        """fp32 [2]: minimum and step."""
        lo, hi = (v.float() for v in torch.aminmax(x))
        top = 2**self.bits - 1
        return torch.stack([lo, hi / top - lo / top])  # hi - lo could overflow

    def _codes(self, rows: Tensor, scale: Tensor, key: int | None, index: int) -> Tensor:
        y = (rows.float() - scale[0]) * safe_inverse(scale[1])
        return round_codes(y, 2**self.bits - 1, key, index)

    def _key(self, state: CodecState | None) -> int | None:
        return next_key(state) if self.round == "stochastic" else None

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        flat, key, scale = x.reshape(-1), self._key(state), self._scale(x)
        codes = torch.empty(packed_nbytes_of(x.numel(), self.bits), dtype=torch.uint8, device=x.device)
        at = index = 0
        for piece in row_pieces(flat, COLS):
            for start, stop in tiles(*piece.shape, x.device):
                q = self._codes(piece[start:stop], scale, key, index)
                packed = pack(q.to(code_dtype(self.bits)), self.bits).reshape(-1)
                codes[at : at + packed.numel()] = packed
                at, index = at + packed.numel(), index + q.numel()
        return self._payload(x, {"codes": codes, "scale": scale})

    def _decode(self, payload: Payload) -> Tensor:
        codes, scale = payload.tensors["codes"], payload.tensors["scale"]
        out = torch.empty(math.prod(payload.shape), dtype=payload.dtype, device=codes.device)
        at = done = 0
        for rows, cols in piece_shapes(out.numel(), COLS):
            width = cols * self.bits // 8
            for start, stop in tiles(rows, cols, out.device):
                packed = codes[at : at + (stop - start) * width].view(stop - start, width)
                y = scale[0] + unpack(packed, self.bits, cols).float() * scale[1]
                take = min(y.numel(), out.numel() - done)
                out[done : done + take] = y.view(-1)[:take]
                at, done = at + packed.numel(), done + take
        return out.view(payload.shape)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        flat, key, scale = x.reshape(-1), self._key(state), self._scale(x)
        out = torch.empty_like(flat)
        done = 0
        for piece in row_pieces(flat, COLS):
            for start, stop in tiles(*piece.shape, x.device):
                y = scale[0] + self._codes(piece[start:stop], scale, key, done) * scale[1]
                take = min(y.numel(), out.numel() - done)
                out[done : done + take] = y.view(-1)[:take]
                done += take
        return out.view(x.shape)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return packed_nbytes_of(math.prod(shape), self.bits) + 8


def packed_nbytes_of(n: int, bits: int) -> int:
    return sum(rows * packed_nbytes(cols, bits) for rows, cols in piece_shapes(n, COLS))
