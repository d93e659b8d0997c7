"""Rotated groups, coded by the levels of a Gaussian.  The codec for 2 to 4 bits.

    x ── features, patches or prototypes ──▶ groups ── less their mean, rotated ──▶ levels ──▶ codes

Each group keeps its mean and its deviation; ops/rotated.py does it in one pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.groups import group_count
from ..ops.packing import packed_nbytes
from ..ops.ranges import feature_scales
from ..ops.rotated import codes_nbytes, dequantize_rotated, quantize_rotated, roundtrip_rotated
from ..ops.scales import to_dtype
from .base import Codec, CodecState, Payload, Traits, check_int
from .registry import register_codec
from .transforms import prototypes
from .transforms.equalize import applies, feature_dim, inner_size
from .transforms.patches import from_frequencies, patch_size, to_frequencies


@register_codec("rotated")
@dataclass(frozen=True)
class Rotated(Codec):
    """Groups rotated by a randomised Walsh-Hadamard transform, then coded by Lloyd-Max levels of a Gaussian.

    bits: 1 to 8 on average.  Groups of large deviation get up to two bits more and small ones fewer, with nothing more
        to send (ops/allocation.py).
    group: elements per group, a power of two from 8 on.
    prototypes: up to so many rows that others are like are kept once and taken out of those (0 to 15; for tensors
        [rows, F] or [B, L, F] of 512 rows or more: transforms/prototypes.py).

    What comes before: of [rows, F] or [B, L, F] with 256 rows or more each feature's mean is taken out, and each is
    divided by the square root of its deviation (transforms/equalize.py).  Images [B, C, H, W] whose height and width
    have a common divisor from 2 to 8 are cut into patches of that size, which are cosine transformed
    (transforms/patches.py).  Levels are stretched so that a decoded value is on average the original.
    Payload: bits / 8 bytes per element, rounded up to whole groups, + 4 bytes per group; 4 bytes per feature, or 4 for
    an image's mean; 2 bytes per feature of each prototype and up to 4 bits per row.
    Sources: rotation as in QuaRot (Ashkboos et al., 2024); unbiased levels as in EDEN (Vargaftik et al., 2022).
    """

    counts_nonfinite: ClassVar[bool] = True
    paths: ClassVar[bool] = False  # whether codes are those of a trellis
    bits: int = 4
    group: int = 128
    prototypes: int = 0

    def __post_init__(self) -> None:
        check_int(self.name, "bits", self.bits, 1, 8, "For more bits use block.")
        check_int(self.name, "group", self.group, 8, 2**20)
        if self.group.bit_count() != 1:
            raise ValueError(f"{self.name}: group={self.group} is not a power of two. Use for example group=128.")
        check_int(self.name, "prototypes", self.prototypes, 0, prototypes.MOST)

    @functools.cached_property
    def traits(self) -> Traits:
        return dataclasses.replace(super().traits, rotates=True)

    # -- what suits a shape -----------------------------------------------------------------------------------------
    def _equalizes(self, shape: tuple[int, ...]) -> bool:
        return applies(shape) and patch_size(shape) == 1

    def _has_prototypes(self, shape: tuple[int, ...]) -> bool:
        return bool(self.prototypes) and prototypes.applies(shape)

    def _prepared(self, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """What groups are made of, the features that the operator equalizes, and what else goes into the payload."""
        # Sums over another memory order would have other last bits.
        x, shape = x.contiguous(), tuple(x.shape)
        features = feature_scales(x) if self._equalizes(shape) else None
        if (k := patch_size(shape)) > 1:
            # In the lowest frequency the mean would drown the others.  NaN stays with the patches in which it is.
            mean = x.float().mean().nan_to_num_(0.0, 0.0, 0.0).view(1)
            return to_frequencies(x.float() - mean, k), None, {"mean": mean}
        if self._has_prototypes(shape):
            matrix = x.reshape(-1, shape[-1])
            found = prototypes.find(matrix, *features.float().unbind(0), self.prototypes)
            left, rows = prototypes.subtract(matrix, found, *features.float().unbind(0))
            return left, features, {"prototypes": found, "rows": rows}
        return x, features, {}

    def _restored(self, y: Tensor, x: Payload | Tensor, tensors: dict[str, Tensor]) -> Tensor:
        """The inverse, for what was decoded of the groups and the shape and dtype of `x`."""
        shape, dtype = tuple(x.shape), x.dtype
        if (k := patch_size(shape)) > 1:
            return to_dtype(from_frequencies(y, shape, k).add_(tensors["mean"]), dtype)
        if self._has_prototypes(shape):
            return to_dtype(prototypes.add(y, tensors["prototypes"], tensors["rows"]), dtype).view(shape)
        return y

    # -- the contract -----------------------------------------------------------------------------------------------
    def _encode(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Payload:
        y, features, tensors = self._prepared(x)
        codes, scales = quantize_rotated(
            y, features, inner_size(x.shape), self.group, self.bits, self.paths, nonfinite
        )
        more = {} if features is None else {"features": features}
        return self._payload(x, {"codes": codes, "scales": scales, **more, **tensors})

    def _decode(self, payload: Payload) -> Tensor:
        shape, n = payload.shape, math.prod(payload.shape)
        patches, alike = patch_size(shape) > 1, self._has_prototypes(shape)
        sizes = {"codes": codes_nbytes(n, self.group, self.bits),
                 "scales": (group_count(n, self.group), 2, torch.bfloat16)}  # fmt: skip
        sizes |= {"features": (2, shape[feature_dim(shape)], torch.bfloat16)} if self._equalizes(shape) else {}
        sizes |= {"mean": (1, torch.float32)} if patches else {}
        if alike:
            bits = self.prototypes.bit_length()
            sizes |= {"prototypes": (self.prototypes, shape[-1], torch.bfloat16),
                      "rows": (packed_nbytes(prototypes.rows(shape), bits), torch.uint8)}  # fmt: skip
        tensors = dict(zip(sizes, self._sized(payload, **sizes), strict=True))
        dtype = torch.float32 if patches or alike else payload.dtype
        y = dequantize_rotated(
            tensors["codes"], tensors["scales"], tensors.get("features"), inner_size(shape), list(shape), dtype,
            self.group, self.bits, self.paths,
        )  # fmt: skip
        return self._restored(y, payload, tensors)

    def _roundtrip(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Tensor:
        y, features, tensors = self._prepared(x)
        y = roundtrip_rotated(y, features, inner_size(x.shape), self.group, self.bits, self.paths, nonfinite)
        return self._restored(y, x, tensors)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        n = math.prod(shape)
        more = 4 * shape[feature_dim(shape)] if self._equalizes(shape) else 0
        more += prototypes.nbytes(shape, self.prototypes) if self._has_prototypes(shape) else 0
        more += 4 if patch_size(shape) > 1 else 0
        return more + codes_nbytes(n, self.group, self.bits) + 4 * group_count(n, self.group)
