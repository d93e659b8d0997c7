"""Block quantization: every group of elements has its own scale.  The default codec of the package."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .allocation import Regions, allocate
from .base import Codec, CodecState, Payload, check_choice, check_int
from .equalize import applies, equalize, feature_dim, feature_scales, restore
from .hadamard import rotate, rotate_back
from .levels import bucket, ceil16, floor16, gauss_distortion, level_table, safe_inverse
from .packing import MAX_BITS, ceil8, code_dtype, pack, unpack
from .rounding import RoundingState, next_key
from .rows import piece_shapes, row_pieces, tiles
from .uniform import round_codes

DEFAULT_GROUP = 128


@dataclass(frozen=True)
class Block(Codec):
    """Affine quantization with two scales per group.

    bits: 1 to 16.
    group: elements per group (a multiple of 8; default 128), or splits: number of equal parts of the tensor, or
        dim="channel": one group per channel (dimension 1 of [B, C, H, W], else the last;
        tensors of fewer than two dimensions fall back to groups of 128).
    round: "nearest" or "stochastic" (unbiased; equal levels only).
    rotate: None or "hadamard": the group's mean is taken out and kept, the rest is turned by a randomised
        Walsh-Hadamard transform, which spreads outliers.  The group must be a power of two.
    levels: "uniform" (equal steps) or "gauss" (Lloyd-Max levels of a Gaussian of the group's variance).
    fit: what gauss levels are best for: "unbiased" (a decoded value is on average the original; default after a
        rotation) or "error" (least squares; default without one, where a spiky group would be blown up).  Least
        squares shrinks 2-bit values by an eighth, which a network sees as a shift of all its inputs.
    allocate: None or "energy": groups of large deviation get up to two bits more and small ones less, at the same
        average and with nothing more to send (rotate and levels=gauss only).
    clip: the share of the range that equal steps cover (nearest only); below 1 the tails are cut for a finer step.
    equalize: "feature": each feature's mean is taken out and each is divided by the square root of its deviation
        first, and both are kept (4 bytes per feature); tensors of fewer than 256 rows stay as they are.  On the
        hidden states of a BERT this divides the error of 4 bits by five.  None leaves features alone.
    scale: 16 (bf16, rounded outwards, so that no value falls out of range) or 32 bits per scale.

    Payload: bits / 8 bytes per element, rounded up to 8 elements in the last group (to the whole group when
    rotated), + 2 scales per group.
    With `equalize`, 4 bytes per feature more.
    Sources: per-group quantization as in ActNN (Chen et al., 2021); rotation as in QuaRot (Ashkboos et al., 2024);
    the unbiased scale as in EDEN (Vargaftik et al., 2022).
    """

    bits: int = 4
    group: int | None = None
    splits: int | None = None
    dim: str | None = None
    round: str = "nearest"
    rotate: str | None = None
    levels: str = "uniform"
    fit: str | None = None
    allocate: str | None = None
    clip: float = 1.0
    equalize: str | None = "feature"
    scale: int = 16
    name: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, MAX_BITS, "To leave a tensor alone use identity.")
        check_choice(self.name, "round", self.round, ("nearest", "stochastic"))
        check_choice(self.name, "rotate", self.rotate, (None, "hadamard"))
        check_choice(self.name, "levels", self.levels, ("uniform", "gauss"))
        check_choice(self.name, "fit", self.fit, (None, "unbiased", "error"))
        check_choice(self.name, "allocate", self.allocate, (None, "energy"))
        check_choice(self.name, "dim", self.dim, (None, "channel"))
        check_choice(self.name, "equalize", self.equalize, (None, "feature"))
        check_choice(self.name, "scale", self.scale, (16, 32))
        if sum(v is not None for v in (self.group, self.splits, self.dim)) > 1:
            raise ValueError(
                f"block: group={self.group}, splits={self.splits} and dim={self.dim} exclude each other; give one."
            )
        if self.group is not None:
            check_int(self.name, "group", self.group, 8, 2**20)
            if self.group % 8:
                raise ValueError(f"block: group={self.group} is not a multiple of 8, so its codes would not pack.")
        if self.splits is not None:
            check_int(self.name, "splits", self.splits, 1, 2**20)
        if self.rotate and (self.dim or self.splits or (self.group or DEFAULT_GROUP).bit_count() != 1):
            raise ValueError(
                f"block: rotate={self.rotate} needs groups whose size is a power of two; got group={self.group}, "
                f"splits={self.splits}, dim={self.dim}. Use for example group=128."
            )
        if not 0 < self.clip <= 1:
            raise ValueError(f"block: clip={self.clip} is outside (0, 1].")
        if self.round == "stochastic" and (self.clip != 1 or self.levels != "uniform"):
            raise ValueError(
                "block: round=stochastic is unbiased only with clip=1 and levels=uniform; got "
                f"clip={self.clip:g}, levels={self.levels}. Use round=nearest or drop those options."
            )
        if self.fit is not None and self.levels != "gauss":
            raise ValueError(f"block: fit={self.fit} belongs to levels=gauss; got levels={self.levels}. Drop one.")
        if self.allocate and not (self.rotate and self.levels == "gauss"):
            raise ValueError(
                f"block: allocate={self.allocate} needs rotate=hadamard and levels=gauss; got rotate="
                f"{str(self.rotate).lower()}, levels={self.levels}."
            )
        if self.levels == "gauss" and self.bits > 8:
            raise ValueError(f"block: levels=gauss goes up to 8 bits; got bits={self.bits}. Use levels=uniform.")

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return RoundingState(site, seed) if self.round == "stochastic" else None

    # -- groups -----------------------------------------------------------------------------------------------
    def _cols(self, shape: tuple[int, ...]) -> int:
        n = math.prod(shape)
        if self.dim == "channel" and len(shape) > 1:
            return n // shape[feature_dim(shape)]
        if self.splits is not None:
            return ceil8(-(-n // self.splits))
        return self.group or DEFAULT_GROUP

    def _pieces(self, x: Tensor) -> list[Tensor]:
        cols = self._cols(tuple(x.shape))
        if self.dim == "channel" and x.dim() > 1:
            rows = x.movedim(feature_dim(x.shape), 0).reshape(-1, cols)
            pad = ceil8(cols) - cols
            return [torch.cat([rows, rows[:, -1:].expand(-1, pad)], 1) if pad else rows]
        return row_pieces(x.reshape(-1), cols, cols if self.rotate else 0)

    def _piece_shapes(self, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        n, cols = math.prod(shape), self._cols(shape)
        if self.dim == "channel" and len(shape) > 1:
            return [(n // cols, ceil8(cols))]
        return piece_shapes(n, cols, cols if self.rotate else 0)

    def _unite(self, pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Inverse of `_pieces`."""
        if self.dim == "channel" and len(shape) > 1:
            dim = feature_dim(shape)
            moved = [shape[dim], *shape[:dim], *shape[dim + 1 :]]
            return pieces[0][:, : self._cols(shape)].reshape(moved).movedim(0, dim).contiguous()
        n = math.prod(shape)
        if len(pieces) == 1:
            return pieces[0].view(-1)[:n].view(shape)
        return torch.cat([p.view(-1) for p in pieces])[:n].view(shape)

    # -- one tile of groups -----------------------------------------------------------------------------------
    def _quantize(self, rows: Tensor, key: int | None, index: int) -> tuple[Tensor, Tensor]:
        """rows [R, C] -> codes as fp32 [R, C], scales fp32 [R, 2] (already rounded to their stored precision)."""
        top = 2**self.bits - 1
        x = rows.float()
        low, high = (floor16, ceil16) if self.scale == 16 else (_same, _same)
        if self.levels == "gauss":
            scales = self._gauss_scales(x)
            return bucket(self._gauss_units(x, scales), self.bits).float(), scales
        if self.rotate:
            center = x.mean(1)
            center = center.bfloat16().float() if self.scale == 16 else center
            x = rotate(x - center[:, None])
            step = high(torch.linalg.vector_norm(x, torch.inf, dim=1) * (2 * self.clip / top))
            y = x * safe_inverse(step)[:, None] + top / 2
            return round_codes(y, top, key, index), torch.stack([center, step], 1)
        lo, hi = torch.aminmax(x, dim=1)
        if self.clip < 1:
            cut = (hi - lo) * ((1 - self.clip) / 2)
            lo, hi = lo + cut, hi - cut
        lo = low(lo)
        step = high(hi / top - lo / top)
        y = (x - lo[:, None]) * safe_inverse(step)[:, None]
        return round_codes(y, top, key, index), torch.stack([lo, step], 1)

    def _gauss_scales(self, x: Tensor) -> Tensor:
        """fp32 rows [R, C] -> mean and deviation [R, 2], as they are stored."""
        center = x.mean(1)
        center = center.bfloat16().float() if self.scale == 16 else center
        spread = torch.linalg.vector_norm(x - center[:, None], dim=1) / x.shape[1] ** 0.5
        return torch.stack([center, ceil16(spread) if self.scale == 16 else spread], 1)

    def _gauss_units(self, x: Tensor, scales: Tensor) -> Tensor:
        """fp32 rows and their scales -> rows of mean 0 and deviation 1, turned if the codec turns."""
        x = x - scales[:, :1]
        return (rotate(x) if self.rotate else x) * safe_inverse(scales[:, 1:])

    def _gain(self, bits: int) -> float:
        """What levels are multiplied by: the centroid of a cell is a share 1 - distortion of what fell there."""
        unbiased = self.fit == "unbiased" or (self.fit is None and self.rotate is not None)
        return 1 / (1 - gauss_distortion(bits)) if unbiased else 1.0

    def _dequantize(self, codes: Tensor, scales: Tensor) -> Tensor:
        """codes fp32 [R, C], scales fp32 [R, 2] -> fp32 [R, C]."""
        base, step = scales[:, :1], scales[:, 1:]
        if self.levels == "gauss":
            y = level_table(self.bits, self._gain(self.bits), codes.device)[codes.int()] * step
        elif self.rotate:
            y = (codes - (2**self.bits - 1) / 2) * step
        else:
            return base + codes * step
        return (rotate_back(y) if self.rotate else y) + base

    # -- the contract -----------------------------------------------------------------------------------------
    def _tiles(self, x: Tensor, state: CodecState | None) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
        """(piece, start, stop, codes, scales) for every tile, in order."""
        key = next_key(state) if self.round == "stochastic" else None
        index = 0
        for i, piece in enumerate(self._pieces(x)):
            for start, stop in tiles(*piece.shape, x.device):
                yield i, start, stop, *self._quantize(piece[start:stop], key, index)
                index += (stop - start) * piece.shape[1]

    def _equalizes(self, shape: tuple[int, ...]) -> bool:
        return self.equalize is not None and applies(shape)

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        original, features = x, {}
        if self._equalizes(tuple(x.shape)):
            features["features"] = feature_scales(x)
            x = equalize(x, features["features"])
        if self.allocate:
            return self._payload(original, {**self._encode_allocated(x), **features})
        shapes = self._piece_shapes(tuple(x.shape))
        groups = sum(rows for rows, _ in shapes)
        nbytes = sum(rows * cols * self.bits // 8 for rows, cols in shapes)
        packed = torch.empty(nbytes, dtype=torch.uint8, device=x.device)
        scales = torch.empty(groups, 2, dtype=self._scale_dtype, device=x.device)
        at = row = 0
        for _, start, stop, codes, scale in self._tiles(x, state):
            out = pack(codes.to(code_dtype(self.bits)), self.bits).view(-1)
            packed[at : at + out.numel()] = out
            scales[row : row + stop - start] = scale
            at, row = at + out.numel(), row + stop - start
        return self._payload(original, {"codes": packed, "scales": scales, **features})

    # -- groups of different widths ---------------------------------------------------------------------------
    def _encode_allocated(self, x: Tensor) -> dict[str, Tensor]:
        spans = [
            (piece, *span) for piece in self._pieces(x) for span in tiles(*piece.shape, x.device)
        ]  # fmt: skip
        scales = torch.cat([self._gauss_scales(piece[a:b].float()) for piece, a, b in spans]).to(self._scale_dtype)
        regions = Regions(allocate(scales[:, 1].float(), self.bits), self._cols(tuple(x.shape)))
        packed, row = torch.empty(regions.nbytes, dtype=torch.uint8, device=x.device), 0
        for piece, start, stop in spans:
            units = self._gauss_units(piece[start:stop].float(), scales[row : row + stop - start].float())
            for bits, rows, at in regions.parts(row, row + stop - start):
                packed[at] = pack(bucket(units[rows], bits).to(torch.uint8), bits).view(-1)
            row += stop - start
        return {"codes": packed, "scales": scales}

    def _decode_allocated(
        self, codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> list[Tensor]:
        scales, pieces, row = scales.float(), [], 0
        regions = Regions(allocate(scales[:, 1], self.bits), self._cols(shape))
        for rows, cols in self._piece_shapes(shape):
            out = torch.empty(rows, cols, dtype=dtype, device=codes.device)
            for start, stop in tiles(rows, cols, codes.device):
                units = torch.zeros(stop - start, cols, dtype=torch.float32, device=codes.device)
                own = scales[row : row + stop - start]
                for bits, where, at in regions.parts(row, row + stop - start):
                    levels = level_table(bits, self._gain(bits), codes.device)
                    units[where] = levels[unpack(codes[at].view(where.numel(), -1), bits, cols).int()]
                out[start:stop] = rotate_back(units * own[:, 1:]) + own[:, :1]
                row += stop - start
            pieces.append(out)
        return pieces

    def _decode(self, payload: Payload) -> Tensor:
        packed, scales = payload.tensors["codes"], payload.tensors["scales"]
        features = payload.tensors.get("features")
        dtype = payload.dtype if features is None else torch.float32
        pieces, at, row = [], 0, 0
        if self.allocate:
            pieces = self._decode_allocated(packed, scales.float(), payload.shape, dtype)
        for rows, cols in [] if self.allocate else self._piece_shapes(payload.shape):
            out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
            width = cols * self.bits // 8
            for start, stop in tiles(rows, cols, packed.device):
                part = packed[at : at + (stop - start) * width].view(stop - start, width)
                codes = unpack(part, self.bits, cols).float()
                out[start:stop] = self._dequantize(codes, scales[row : row + stop - start].float())
                at, row = at + part.numel(), row + stop - start
            pieces.append(out)
        y = self._unite(pieces, payload.shape)
        return y if features is None else restore(y, features, payload.dtype)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        if self._equalizes(tuple(x.shape)):
            features = feature_scales(x)
            return restore(self._roundtrip_groups(equalize(x, features), state), features, x.dtype)
        return self._roundtrip_groups(x, state)

    def _roundtrip_groups(self, x: Tensor, state: CodecState | None) -> Tensor:
        pieces = [
            torch.empty(shape, dtype=x.dtype, device=x.device) for shape in self._piece_shapes(tuple(x.shape))
        ]
        if self.allocate:
            pieces = self._decode_allocated(**self._encode_allocated(x), shape=tuple(x.shape), dtype=x.dtype)
        for i, start, stop, codes, scale in () if self.allocate else self._tiles(x, state):
            pieces[i][start:stop] = self._dequantize(codes, scale)
        return self._unite(pieces, tuple(x.shape))

    @property
    def _scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.scale == 16 else torch.float32

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        features = 4 * shape[feature_dim(shape)] if self._equalizes(shape) else 0
        return features + sum(
            rows * (cols * self.bits // 8 + 2 * self._scale_dtype.itemsize)
            for rows, cols in self._piece_shapes(shape)
        )


def _same(x: Tensor) -> Tensor:
    return x
