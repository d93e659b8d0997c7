"""Block quantization: every group of elements has its own scale.  The default codec of the package."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..ops.groups import dequantize_groups, group_count, quantize_groups, roundtrip_groups
from ..ops.packing import MAX_BITS, ceil8, codes_nbytes
from ..ops.ranges import feature_scales
from .base import Codec, CodecState, Payload, check_choice, check_int
from .registry import register_codec
from .rounding import RoundingState, key_of
from .transforms.equalize import applies, feature_dim, inner_size

GROUP = 128


@register_codec("block")
@dataclass(frozen=True)
class Block(Codec):
    """Affine quantization with a minimum and a step per group, in bf16 and rounded outwards.

    bits: 1 to 16.
    group: elements per group (a multiple of 8; default 128), or splits: the number of equal parts of the whole tensor
        that are a group each, or dim="channel": one group per channel (dimension 1 of [B, C, H, W], else the last;
        tensors of fewer than two dimensions fall back to groups of 128).
    round: "nearest", or "stochastic", which is unbiased and has twice the squared error.  None is "nearest".
    equalize: "feature": each feature's mean is taken out and each is divided by the square root of its deviation
        first, and both are kept (4 bytes per feature); tensors of fewer than 256 rows stay as they are.  On the
        hidden states of a BERT this divides the error of 4 bits by five.  "none" leaves features alone.  None is
        "feature".

    Payload: bits / 8 bytes per element, rounded up to 8 elements in the last group, + 4 bytes per group, + 4 bytes per
    feature where they are equalized.
    Source: per-group quantization as in ActNN (Chen et al., 2021).
    """

    counts_nonfinite: ClassVar[bool] = True
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

    def in_rows(self, width: int) -> tuple[Codec, int | None]:
        named = self.group is not None or self.splits is not None or self.dim is not None
        return (self, None) if named else _in_rows(self, width)

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

    def _flat(self, x: Tensor) -> Tensor:
        if not self._channels(tuple(x.shape)):
            return x.reshape(-1)
        rows = x.movedim(feature_dim(x.shape), 0).reshape(x.shape[feature_dim(x.shape)], -1)
        pad = -rows.shape[1] % 8
        return (torch.cat([rows, rows[:, -1:].expand(-1, pad)], 1) if pad else rows).reshape(-1)

    def _unite(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Inverse of `_flat`."""
        if not self._channels(shape):
            return flat.view(shape)
        dim = feature_dim(shape)
        moved = [shape[dim], *shape[:dim], *shape[dim + 1 :]]
        rows = flat.view(shape[dim], -1)[:, : math.prod(shape) // shape[dim]]
        return rows.reshape(moved).movedim(0, dim).contiguous()

    def _count(self, shape: tuple[int, ...]) -> int:
        """Elements that are coded: of channels with what fills them up to a multiple of 8."""
        return shape[feature_dim(shape)] * self._cols(shape) if self._channels(shape) else math.prod(shape)

    # -- the contract -----------------------------------------------------------------------------------------
    def _encode(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Payload:
        shape, tensors = tuple(x.shape), {}
        if self._equalizes(shape):
            tensors["features"] = feature_scales(x)
        codes, scales = quantize_groups(
            self._flat(x), tensors.get("features"), inner_size(shape), None, self._cols(shape), self.bits,
            key_of(self, state), nonfinite,
        )  # fmt: skip
        return self._payload(x, {"codes": codes, "scales": scales, **tensors})

    def _decode(self, payload: Payload) -> Tensor:
        shape, n = payload.shape, self._count(payload.shape)
        cols = self._cols(shape)
        sizes = {"codes": codes_nbytes(n, cols, self.bits), "scales": (group_count(n, cols), 2, torch.bfloat16)}
        if self._equalizes(shape):
            sizes["features"] = (2, shape[feature_dim(shape)], torch.bfloat16)
        codes, scales, *features = self._sized(payload, **sizes)
        features = features[0] if features else None
        flat = dequantize_groups(codes, scales, features, inner_size(shape), [n], payload.dtype, cols, self.bits)
        return self._unite(flat, shape)

    def _roundtrip(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Tensor:
        shape = tuple(x.shape)
        features = feature_scales(x) if self._equalizes(shape) else None
        channels = self._channels(shape)
        y = roundtrip_groups(
            self._flat(x) if channels else x, features, inner_size(shape), None, self._cols(shape), self.bits,
            key_of(self, state), nonfinite,
        )  # fmt: skip
        return self._unite(y, shape) if channels else y

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        features = 4 * shape[feature_dim(shape)] if self._equalizes(shape) else 0
        n, cols = self._count(shape), self._cols(shape)
        return features + codes_nbytes(n, cols, self.bits) + 4 * group_count(n, cols)


@functools.lru_cache(1024)
def _in_rows(codec: Block, width: int) -> tuple[Block, int | None]:
    """Groups of 64 to 256 that take the fewest bits; filling rows up costs a copy, which has to save a tenth."""

    def bits(parts: int) -> float:
        total = parts * ceil8(-(-width // parts))
        return (total * codec.bits + 32 * parts) * (1.0 if total == width else 1.1)

    parts = min(range(max(1, -(-width // 256)), max(1, width // 64) + 1), key=bits)
    group = ceil8(-(-width // parts))
    return replace(codec, group=group), None if group * parts == width else group * parts
