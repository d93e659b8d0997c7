"""Block quantization: every group of elements has its own scale.  The default codec of the package."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..ops.cpu import native
from ..ops.kernels import group_decode, group_encode, group_roundtrip
from ..ops.packing import MAX_BITS, ceil8
from ..ops.reductions import LARGEST, representable
from ..ops.rounding import noise_source
from ..ops.rows import Part, apply, counters, join, parts
from . import rotated as turned
from .base import Codec, CodecState, Payload, check_choice, check_int
from .registry import register_codec
from .rotated import DEFAULT_GROUP
from .rounding import RoundingState, key_of
from .transforms import prototypes
from .transforms.equalize import applies, feature_dim, feature_scales, period, tables
from .transforms.patches import from_frequencies, patch_size, to_frequencies


@register_codec("block")
@dataclass(frozen=True)
class Block(Codec):
    """Affine quantization with two scales per group.

    bits: 1 to 16.
    group: elements per group (a multiple of 8; default 128), or splits: number of equal parts of the tensor, or
        dim="channel": one group per channel (dimension 1 of [B, C, H, W], else the last;
        tensors of fewer than two dimensions fall back to groups of 128).
    round: "nearest", "stochastic" (unbiased; equal levels only), or None: what suits the site, which is stochastic
        for saved tensors and nearest elsewhere.
    rotate: None or "hadamard": the group's mean is taken out and kept, the rest is turned by a randomised
        Walsh-Hadamard transform, which spreads outliers.  The group must be a power of two.
    levels: "uniform" (equal steps), "gauss" (Lloyd-Max levels of a Gaussian of the group's variance), or "trellis"
        (twice as many levels, of which a path through the group may use half at a time: a quarter to a third less
        error at the same bits, for several times the time).
    fit: what these levels are best for: "unbiased" (a decoded value is on average the original; default after a
        rotation) or "error" (least squares; default without one, where a spiky group would be blown up).  Least
        squares shrinks 2-bit values by an eighth, which a network sees as a shift of all its inputs.
    allocate: None or "energy": groups of large deviation get up to two bits more and small ones less, at the same
        average and with nothing more to send (with rotate, and levels other than uniform).
    patch: None or "dct": images [B, C, H, W] are first cut into small patches that a cosine transform turns; groups
        hold coefficients of one channel and frequency (with allocate only, in place of equalize).
    prototypes: up to so many rows that others are like are kept once and taken out of those (0 to 15; with allocate
        and equalize, for [rows, F] or [B, L, F] of 512 rows or more).
    clip: the share of the range that equal steps cover (nearest only); below 1 the tails are cut for a finer step.
    equalize: "feature": each feature's mean is taken out and each is divided by the square root of its deviation
        first, and both are kept (4 bytes per feature); tensors of fewer than 256 rows stay as they are.  On the
        hidden states of a BERT this divides the error of 4 bits by five.  "none" leaves features alone.  None: what
        suits the site, which is "none" for saved tensors and "feature" elsewhere.
    scale: 16 (bf16, rounded outwards, so that no value falls out of range) or 32 bits per scale.

    Payload: bits / 8 bytes per element, rounded up to 8 elements in the last group (to the whole group when
    rotated), + 2 scales per group.
    With `equalize`, 4 bytes per feature more; with `prototypes`, 2 bytes per feature of each and up to 4 bits per row.
    Sources: per-group quantization as in ActNN (Chen et al., 2021); rotation as in QuaRot (Ashkboos et al., 2024);
    the unbiased scale as in EDEN (Vargaftik et al., 2022).
    """

    bits: int = 4
    group: int | None = None
    splits: int | None = None
    dim: str | None = None
    round: str | None = None
    rotate: str | None = None
    levels: str = "uniform"
    fit: str | None = None
    allocate: str | None = None
    patch: str | None = None
    prototypes: int = 0
    clip: float = 1.0
    equalize: Literal["feature", "none"] | None = None
    scale: int = 16

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, MAX_BITS, "To leave a tensor alone use identity.")
        check_choice(self.name, "round", self.round, (None, "nearest", "stochastic"))
        check_choice(self.name, "rotate", self.rotate, (None, "hadamard"))
        check_choice(self.name, "levels", self.levels, ("uniform", "gauss", "trellis"))
        check_choice(self.name, "fit", self.fit, (None, "unbiased", "error"))
        check_choice(self.name, "allocate", self.allocate, (None, "energy"))
        check_choice(self.name, "patch", self.patch, (None, "dct"))
        check_choice(self.name, "dim", self.dim, (None, "channel"))
        check_choice(self.name, "equalize", self.equalize, (None, "feature", "none"))
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
        if self.fit is not None and self.levels == "uniform":
            raise ValueError(f"block: fit={self.fit} belongs to levels=gauss or trellis; got levels=uniform. Drop it.")
        if self.allocate and not (self.rotate and self.levels != "uniform"):
            raise ValueError(
                f"block: allocate={self.allocate} needs rotate=hadamard and levels=gauss or trellis; got rotate="
                f"{str(self.rotate).lower()}, levels={self.levels}."
            )
        if self.patch and not self.allocate:
            raise ValueError(f"block: patch={self.patch} needs allocate=energy, which gives frequencies their bits.")
        check_int(self.name, "prototypes", self.prototypes, 0, prototypes.MOST)
        if self.prototypes and not (self.allocate and self.equalize != "none"):
            raise ValueError(
                f"block: prototypes={self.prototypes} needs allocate=energy, which gives the bits that they save to "
                f"others, and equalize=feature; got allocate={str(self.allocate).lower()}, "
                f"equalize={self.equalize}."
            )
        if self.levels != "uniform" and self.bits > 8:
            raise ValueError(
                f"block: levels={self.levels} goes up to 8 bits; got bits={self.bits}. Use levels=uniform."
            )

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return RoundingState(site, seed) if self.round == "stochastic" else None

    def for_saved(self) -> Codec:
        """Scales of features pay for themselves on a wire only: they cost a pass over each tensor."""
        codec = self.stochastic()
        return replace(codec, equalize="none") if self.equalize is None and not self._turned else codec

    def stochastic(self) -> Codec:
        return self if self.levels != "uniform" or self.clip != 1 else super().stochastic()

    # -- groups -----------------------------------------------------------------------------------------------
    def _channels(self, shape: tuple[int, ...]) -> bool:
        return self.dim == "channel" and len(shape) > 1

    def _cols(self, shape: tuple[int, ...]) -> int:
        """Elements per group, a multiple of 8."""
        n = math.prod(shape)
        if self._channels(shape):
            return ceil8(n // shape[feature_dim(shape)])
        if self.splits is not None:
            return ceil8(-(-n // self.splits))
        return self.group or DEFAULT_GROUP

    def _equalizes(self, shape: tuple[int, ...]) -> bool:
        if self.equalize == "none" or not applies(shape) or self._channels(shape) or self._patch(shape) > 1:
            return False
        # A group within one feature is coded the same either way; only shares of bits would differ.
        return bool(self.allocate) or len(shape) != 4 or shape[2] * shape[3] % self._cols(shape) != 0

    def _parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        cols = self._cols(shape)
        if self._channels(shape):
            return parts(shape[feature_dim(shape)] * cols, cols)
        repeat = period(shape, cols) if self._equalizes(shape) else 1
        return parts(math.prod(shape), cols, repeat, cols if self.rotate else 0)

    def _patch(self, shape: tuple[int, ...]) -> int:
        return patch_size(shape) if self.patch else 1

    def _alike(self, shape: tuple[int, ...]) -> bool:
        return bool(self.prototypes) and prototypes.applies(shape) and self._equalizes(shape)

    def _flat(self, x: Tensor) -> Tensor:
        if self._patch(tuple(x.shape)) > 1:
            return to_frequencies(x, self._patch(tuple(x.shape)))
        if not self._channels(tuple(x.shape)):
            return x.reshape(-1)
        rows = x.movedim(feature_dim(x.shape), 0).reshape(x.shape[feature_dim(x.shape)], -1)
        pad = -rows.shape[1] % 8
        return (torch.cat([rows, rows[:, -1:].expand(-1, pad)], 1) if pad else rows).reshape(-1)

    def _unite(self, pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Inverse of `_flat`, from what was decoded of each part."""
        n, flat = math.prod(shape), join([piece.view(-1) for piece in pieces])
        if self._patch(shape) > 1:
            return from_frequencies(flat[:n], shape, self._patch(shape))
        if not self._channels(shape):
            return flat[:n].view(shape)
        dim = feature_dim(shape)
        moved = [shape[dim], *shape[:dim], *shape[dim + 1 :]]
        return flat.view(shape[dim], -1)[:, : n // shape[dim]].reshape(moved).movedim(0, dim).contiguous()

    def _tables(self, features: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Mean and root of deviation of the features, for one period of groups or the whole tensor."""
        if features is None:
            return None, None
        n, cols = math.prod(shape), self._cols(shape)
        return tables(features, shape, min(n, period(shape, cols) * cols))

    # -- the contract -----------------------------------------------------------------------------------------
    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        shape, tensors = tuple(x.shape), {}
        features = feature_scales(x) if self._equalizes(shape) else None
        if features is not None:
            tensors["features"] = features
        if self._alike(shape):
            scales, matrix = features.float().unbind(0), x.reshape(-1, shape[-1])
            tensors["prototypes"] = prototypes.find(matrix, *scales, self.prototypes)
            flat, tensors["rows"] = prototypes.subtract(matrix, tensors["prototypes"], *scales)
            flat = flat.view(-1)
        else:
            flat = self._flat(x)
        mean, root = self._tables(features, shape)
        inverse = None if root is None else 1 / root
        found = self._parts(shape)
        if self._turned:
            codes, scales = turned.encode(self, flat, found, mean, inverse, state)
        else:
            key, results = key_of(self, state), []
            for part in found:
                own = [part.features(mean), part.features(inverse)]
                static = {"bits": self.bits, "clip": self.clip, "stored": self.scale}
                result = native.group_encode(part.take(flat), part.start, *own, key, **static)
                if result is None:
                    rows = [None if key is None else counters(part, x.device)]
                    shared = noise_source(key, part.shape[2], x.device)
                    with native.patience():
                        result = apply(group_encode, part.take(flat), rows, own, shared, **static)
                results.append(result)
            codes = join([c.view(-1) for c, _ in results])
            scales = join([s.to(self.scale_dtype).view(-1, 2) for _, s in results])
        return self._payload(x, {"codes": codes, "scales": scales, **tensors})

    def _encode_checked(self, x: Tensor, state: CodecState | None) -> Payload | None:
        before = None if state is None else state.snapshot()
        payload = self._encode(x, state)
        # The scales bound all values, NaN included: only where they are large is a pass over the tensor needed.
        if self._surely_representable(payload) or representable(x):
            return payload
        if state is not None:
            state.restore(before)
        return None

    def _surely_representable(self, payload: Payload) -> bool:
        if payload.dtype == torch.float64 or self._patch(payload.shape) > 1:
            return False
        # Steps above the minimum, or on both sides of the mean of a group that may have been turned; clipped tails.
        turned_by = self._cols(payload.shape) ** 0.5 if self._turned else 1.0
        factor, scales = 2**self.bits * turned_by / self.clip, payload.tensors["scales"]
        bound = native.reach(scales, factor)
        if bound is None:
            bound = (scales[:, 0].float().abs() + scales[:, 1].float() * factor).amax()
        if "features" in payload.tensors:
            mean, root = payload.tensors["features"].float().abs().amax(1)
            bound = bound * root + mean
        if "prototypes" in payload.tensors:
            bound = bound + payload.tensors["prototypes"].abs().amax()
        return bool(bound < LARGEST / 4)  # False for NaN

    def _decode(self, payload: Payload) -> Tensor:
        codes, scales, shape = payload.tensors["codes"], payload.tensors["scales"], payload.shape
        mean, root = self._tables(payload.tensors.get("features"), shape)
        found = self._parts(shape)
        if self._turned:
            dtype = torch.float32 if self._patch(shape) > 1 or self._alike(shape) else payload.dtype
            y = self._unite([turned.decode(self, codes, scales, found, mean, root, dtype)], shape)
            if self._alike(shape):
                prototypes.add(y.view(-1, shape[-1]), payload.tensors["prototypes"], payload.tensors["rows"])
            return y.to(payload.dtype)
        pieces, at, row = [], 0, 0
        for part in found:
            n, k, c = part.shape
            width = c * self.bits // 8
            args = (codes[at : at + n * k * width].view(n, k, width), scales[row : row + n * k].view(n, k, 2))
            own, static = (part.features(mean), part.features(root)), {"bits": self.bits, "dtype": payload.dtype}
            result = native.group_decode(*args, *own, **static)
            if result is None:
                result, = apply(group_decode, args[0], args[1:], own, cols=c, **static)
            pieces.append(result)
            at, row = at + n * k * width, row + n * k
        return self._unite(pieces, shape)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        if self._turned:
            return self._decode(self._encode(x, state))
        shape, static = tuple(x.shape), {"bits": self.bits, "clip": self.clip, "stored": self.scale}
        key = key_of(self, state)
        if not self._equalizes(shape) and not self._channels(shape):
            moved = native.planes_roundtrip(x, self._cols(shape), key, **static)
            if moved is not None:
                return moved
        flat = self._flat(x)
        mean, root = self._tables(feature_scales(x) if self._equalizes(shape) else None, shape)
        inverse = None if root is None else 1 / root
        pieces = []
        for part in self._parts(shape):
            own = [part.features(mean), part.features(inverse), part.features(root)]
            result = native.group_roundtrip(part.take(flat), part.start, *own, key, **static)
            if result is None:
                rows = [None if key is None else counters(part, x.device)]
                shared = noise_source(key, part.shape[2], x.device)
                with native.patience():
                    result, = apply(group_roundtrip, part.take(flat), rows, own, shared, **static)
            pieces.append(result)
        return self._unite(pieces, shape)

    @property
    def _turned(self) -> bool:
        return self.rotate is not None or self.levels != "uniform"

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.scale == 16 else torch.float32

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        features = 4 * shape[feature_dim(shape)] if self._equalizes(shape) else 0
        features += prototypes.nbytes(shape, self.prototypes) if self._alike(shape) else 0
        return features + sum(
            part.groups * (part.shape[2] * self.bits // 8 + 2 * self.scale_dtype.itemsize)
            for part in self._parts(shape)
        )
