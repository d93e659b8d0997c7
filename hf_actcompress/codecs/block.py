"""Block quantization: every group of elements has its own scale.  The default codec of the package."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..ops.cpu import native
from ..ops.packing import MAX_BITS, ceil8
from ..ops.quantize import group_decode, group_encode, group_roundtrip
from ..ops.reductions import LARGEST, representable
from ..ops.rounding import noise_source
from ..ops.rows import Part, apply, counters, join, parts
from .base import Codec, CodecState, Payload, check_choice, check_int
from .registry import register_codec
from .rounding import RoundingState, key_of
from .transforms.equalize import applies, feature_dim, feature_scales, period, tables

GROUP = 128


@register_codec("block")
@dataclass(frozen=True)
class Block(Codec):
    """Affine quantization with a minimum and a step per group, in bf16 and rounded outwards.

    bits: 1 to 16.
    group: elements per group (a multiple of 8; default 128), or splits: the number of equal parts of the whole tensor
        that are a group each, or dim="channel": one group per channel (dimension 1 of [B, C, H, W], else the last;
        tensors of fewer than two dimensions fall back to groups of 128).
    round: "nearest", "stochastic" (unbiased), or None: what suits the site, which is stochastic for saved tensors and
        nearest elsewhere.
    equalize: "feature": each feature's mean is taken out and each is divided by the square root of its deviation
        first, and both are kept (4 bytes per feature); tensors of fewer than 256 rows stay as they are.  On the
        hidden states of a BERT this divides the error of 4 bits by five.  "none" leaves features alone.  None: what
        suits the site, which is "none" for saved tensors and "feature" elsewhere.

    Payload: bits / 8 bytes per element, rounded up to 8 elements in the last group, + 4 bytes per group, + 4 bytes per
    feature where they are equalized.
    Source: per-group quantization as in ActNN (Chen et al., 2021).
    """

    bits: int = 4
    group: int | None = None
    splits: int | None = None
    dim: Literal["channel"] | None = None
    round: Literal["nearest", "stochastic"] | None = None
    equalize: Literal["feature", "none"] | None = None

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, MAX_BITS, "To leave a tensor alone use identity.")
        check_choice(self.name, "round", self.round, (None, "nearest", "stochastic"))
        check_choice(self.name, "dim", self.dim, (None, "channel"))
        check_choice(self.name, "equalize", self.equalize, (None, "feature", "none"))
        if sum(value is not None for value in (self.group, self.splits, self.dim)) > 1:
            raise ValueError(
                f"block: group={self.group}, splits={self.splits} and dim={self.dim} exclude each other; give one."
            )
        if self.splits is not None:
            check_int(self.name, "splits", self.splits, 1, 2**20)
        if self.group is not None:
            check_int(self.name, "group", self.group, 8, 2**20)
            if self.group % 8:
                raise ValueError(f"block: group={self.group} is not a multiple of 8, so its codes would not pack.")

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return RoundingState(site, seed) if self.round == "stochastic" else None

    def for_saved(self) -> Codec:
        """Scales of features pay for themselves on a wire only: they cost a pass over each tensor."""
        codec = self.stochastic()
        return replace(codec, equalize="none") if self.equalize is None else codec

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
        return self.group or GROUP

    def _equalizes(self, shape: tuple[int, ...]) -> bool:
        if self.equalize == "none" or not applies(shape) or self._channels(shape):
            return False
        # A group within one feature is coded the same either way.
        return len(shape) != 4 or shape[2] * shape[3] % self._cols(shape) != 0

    def _parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        cols = self._cols(shape)
        if self._channels(shape):
            return parts(shape[feature_dim(shape)] * cols, cols)
        return parts(math.prod(shape), cols, period(shape, cols) if self._equalizes(shape) else 1)

    def _flat(self, x: Tensor) -> Tensor:
        if not self._channels(tuple(x.shape)):
            return x.reshape(-1)
        rows = x.movedim(feature_dim(x.shape), 0).reshape(x.shape[feature_dim(x.shape)], -1)
        pad = -rows.shape[1] % 8
        return (torch.cat([rows, rows[:, -1:].expand(-1, pad)], 1) if pad else rows).reshape(-1)

    def _unite(self, pieces: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Inverse of `_flat`, from what was decoded of each part."""
        n, flat = math.prod(shape), join([piece.view(-1) for piece in pieces])
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
        if self._equalizes(shape):
            x = x.contiguous()  # sums over another memory order would have other last bits
            tensors["features"] = feature_scales(x)
        mean, root = self._tables(tensors.get("features"), shape)
        inverse = None if root is None else 1 / root
        flat, key, results = self._flat(x), key_of(self, state), []
        for part in self._parts(shape):
            own = [part.features(mean), part.features(inverse)]
            result = native.group_encode(part.take(flat), part.start, *own, key, bits=self.bits)
            if result is None:
                rows = [None if key is None else counters(part, x.device)]
                shared = noise_source(key, part.shape[2], x.device)
                result = apply(group_encode, part.take(flat), rows, own, shared, bits=self.bits)
            results.append(result)
        codes = join([c.view(-1) for c, _ in results])
        scales = join([s.bfloat16().view(-1, 2) for _, s in results])
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
        if payload.dtype == torch.float64:
            return False
        factor, scales = 2**self.bits, payload.tensors["scales"]
        bound = native.reach(scales, factor)
        if bound is None:
            bound = (scales[:, 0].float().abs() + scales[:, 1].float() * factor).amax()
        if "features" in payload.tensors:
            mean, root = payload.tensors["features"].float().abs().amax(1)
            bound = bound * root + mean
        return bool(bound < LARGEST / 4)  # False for NaN

    def _decode(self, payload: Payload) -> Tensor:
        shape, found = payload.shape, self._parts(payload.shape)
        sizes = {"codes": sum(part.groups * part.shape[2] for part in found) * self.bits // 8,
                 "scales": (sum(part.groups for part in found), 2, torch.bfloat16)}  # fmt: skip
        if self._equalizes(shape):
            sizes["features"] = (2, shape[feature_dim(shape)], torch.bfloat16)
        codes, scales, *features = self._sized(payload, **sizes)
        mean, root = self._tables(features[0] if features else None, shape)
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
        shape, key = tuple(x.shape), key_of(self, state)
        if not self._equalizes(shape) and not self._channels(shape):
            moved = native.planes_roundtrip(x, self._cols(shape), key, bits=self.bits)
            if moved is not None:
                return moved
        features = None
        if self._equalizes(shape):
            x = x.contiguous()
            features = feature_scales(x)
        mean, root = self._tables(features, shape)
        inverse = None if root is None else 1 / root
        flat, pieces = self._flat(x), []
        for part in self._parts(shape):
            own = [part.features(mean), part.features(inverse), part.features(root)]
            result = native.group_roundtrip(part.take(flat), part.start, *own, key, bits=self.bits)
            if result is None:
                rows = [None if key is None else counters(part, x.device)]
                shared = noise_source(key, part.shape[2], x.device)
                result, = apply(group_roundtrip, part.take(flat), rows, own, shared, bits=self.bits)
            pieces.append(result)
        return self._unite(pieces, shape)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        features = 4 * shape[feature_dim(shape)] if self._equalizes(shape) else 0
        return features + sum(part.groups * (part.shape[2] * self.bits // 8 + 4) for part in self._parts(shape))
