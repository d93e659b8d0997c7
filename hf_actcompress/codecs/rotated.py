"""Rotated groups, coded by the levels of a Gaussian.  The codec for 2 to 4 bits.

    x ── features, patches or prototypes ──▶ groups ── less their mean, rotated ──▶ levels ──▶ codes

Each group keeps its mean and its deviation.  Sums are taken and rotations done tile by tile with torch's own
kernels, so that they have the same bits whether anything else is compiled or not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.memory import fresh
from ..ops.packing import packed_nbytes
from ..ops.ranges import feature_scales
from ..ops.rotation import butterflies_restored, equalized, levels_decode, levels_encode, restored
from ..ops.rows import Part, apply, blocks, parts
from ..ops.scales import ceil16
from .base import Codec, CodecState, Payload, Traits, check_int
from .registry import register_codec
from .transforms import prototypes
from .transforms.allocation import Regions, allocate
from .transforms.equalize import applies, feature_dim, period, tables
from .transforms.hadamard import in_runs, rotate, rotate_back, rotate_runs, signs
from .transforms.levels import bucket_edges, gauss_distortion, level_table
from .transforms.patches import from_frequencies, patch_size, to_frequencies

TILE = 1 << 21  # elements; calls of matrix products and kernels should not be what takes the time
SMALL = 2.0**-56  # norms of groups below this are computed from scaled values


@register_codec("rotated")
@dataclass(frozen=True)
class Rotated(Codec):
    """Groups rotated by a randomised Walsh-Hadamard transform, then coded by Lloyd-Max levels of a Gaussian.

    bits: 1 to 8 on average.  Groups of large deviation get up to two bits more and small ones fewer, with nothing more
        to send (transforms/allocation.py).
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

    # -- levels: what another codec of rotated groups does otherwise (trellis) -----------------------------------
    def _distortion(self, bits: int) -> float:
        """The squared error of a unit Gaussian at so many bits."""
        return gauss_distortion(bits)

    def _level_codes(self, y: Tensor, spread: Tensor, bits: int) -> Tensor:
        """fp32 [R, 1, C] around 0, of deviations [R, 1, 1] -> packed codes uint8 [R, 1, C * bits / 8]."""
        shared = [bucket_edges(bits, y.device), torch.arange(2**bits, device=y.device).float()]
        return apply(levels_encode, y, [spread], shared=shared, bits=bits, compilable=bits <= 6)[0]

    def _level_values(self, packed: Tensor, spread: Tensor, bits: int) -> Tensor:
        """The inverse: fp32 [R, C]."""
        table = level_table(bits, self._gain(bits), packed.device)
        return apply(levels_decode, packed, [spread], shared=[table], cols=self.group, bits=bits)[0][:, 0]

    def _gain(self, bits: int) -> float:
        """What levels are multiplied by: the centroid of a cell is a share 1 - distortion of what fell there."""
        return 1 / (1 - self._distortion(bits))

    # -- what suits a shape -----------------------------------------------------------------------------------------
    def _equalizes(self, shape: tuple[int, ...]) -> bool:
        return applies(shape) and patch_size(shape) == 1

    def _has_prototypes(self, shape: tuple[int, ...]) -> bool:
        return bool(self.prototypes) and prototypes.applies(shape)

    def _parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        repeat = period(shape, self.group) if self._equalizes(shape) else 1
        return parts(math.prod(shape), self.group, repeat, self.group)

    def _tables(self, features: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Mean and root of deviation of the features, for one period of groups or the whole tensor."""
        if features is None:
            return None, None
        return tables(features, shape, min(math.prod(shape), period(shape, self.group) * self.group))

    # -- the contract -----------------------------------------------------------------------------------------------
    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        # Sums over another memory order would have other last bits.
        x, shape, tensors, features = x.contiguous(), tuple(x.shape), {}, None
        if self._equalizes(shape):
            features = tensors["features"] = feature_scales(x)
        if (k := patch_size(shape)) > 1:
            mean = tensors["mean"] = x.float().mean().view(1)  # in the lowest frequency it would drown the others
            flat = to_frequencies(x.float() - mean, k)
        elif self._has_prototypes(shape):
            scales, matrix = features.float().unbind(0), x.reshape(-1, shape[-1])
            found = tensors["prototypes"] = prototypes.find(matrix, *scales, self.prototypes)
            flat, tensors["rows"] = prototypes.subtract(matrix, found, *scales)
            flat = flat.view(-1)
        else:
            flat = x.reshape(-1)
        codes, scales = self._encode_groups(flat, self._parts(shape), *self._tables(features, shape))
        return self._payload(x, {"codes": codes, "scales": scales, **tensors})

    def _encode_groups(
        self, flat: Tensor, parts: tuple[Part, ...], mean: Tensor | None, root: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Codes uint8 and scales bf16 [groups, 2] (mean, deviation)."""
        inverse = None if root is None else 1 / root
        scales = torch.empty(sum(p.groups for p in parts), 2, dtype=torch.bfloat16, device=flat.device)
        for start, stop, y in _tiles(flat, parts, mean, inverse):
            scales[start:stop] = _mean_and_deviation(y)
        regions = self._regions(scales)  # the widths of codes depend on all deviations
        packed = torch.empty(regions.nbytes, dtype=torch.uint8, device=flat.device)
        for start, stop, y in _tiles(flat, parts, mean, inverse):
            scale = scales[start:stop].float()
            y = rotate(y.sub_(scale[:, :1]))[:, None]
            for bits, rows, at in regions.parts(start, stop):
                packed[at] = self._level_codes(y[rows], scale[rows][:, None, 1:], bits).view(-1)
        return packed, scales

    def _decode(self, payload: Payload) -> Tensor:
        shape, tensors = payload.shape, payload.tensors
        k, alike = patch_size(shape), self._has_prototypes(shape)
        dtype = torch.float32 if k > 1 or alike else payload.dtype
        parts = self._parts(shape)
        groups = sum(part.groups for part in parts)
        sizes = {"codes": groups * self.group * self.bits // 8, "scales": (groups, 2, torch.bfloat16)}
        sizes |= {"features": (2, shape[feature_dim(shape)], torch.bfloat16)} if self._equalizes(shape) else {}
        sizes |= {"mean": (1, torch.float32)} if k > 1 else {}
        if alike:
            bits = self.prototypes.bit_length()
            sizes |= {"prototypes": (self.prototypes, shape[-1], torch.bfloat16),
                      "rows": (packed_nbytes(prototypes.rows(shape), bits), torch.uint8)}  # fmt: skip
        codes, scales, *_ = self._sized(payload, **sizes)
        features = self._tables(tensors.get("features"), shape)
        flat = self._decode_groups(codes, scales, parts, *features, dtype)
        flat = flat[: math.prod(shape)]
        if k > 1:
            return from_frequencies(flat, shape, k).add_(tensors["mean"]).to(payload.dtype)
        if alike:
            prototypes.add(flat.view(-1, shape[-1]), tensors["prototypes"], tensors["rows"])
        return flat.view(shape).to(payload.dtype)

    def _decode_groups(
        self, codes: Tensor, scales: Tensor, parts: tuple[Part, ...], mean: Tensor | None, root: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The values of the parts, one after another, flat, in `dtype`."""
        regions, at, row, cols = self._regions(scales), 0, 0, self.group
        whole = fresh(sum(part.groups * cols for part in parts), dtype, codes.device)
        for part in parts:
            out = whole[at : at + part.groups * cols].view(part.shape)
            at += out.numel()
            means, roots = part.features(mean), part.features(root)
            for n, k in blocks(*part.shape, codes.device, TILE):
                target = out[n, k]
                start, stop = row, row + target.shape[0] * target.shape[1]
                own = scales[start:stop].float()[:, None]
                center = own[..., :1].view(*target.shape[:2], 1)
                y = torch.zeros(stop - start, cols, dtype=torch.float32, device=codes.device)
                for bits, rows, where in regions.parts(start, stop):
                    packed = codes[where].view(len(rows), 1, -1)
                    y[rows] = self._level_values(packed, own[rows][..., 1:], bits)
                features = [None if t is None else t[k] for t in (means, roots)]
                if in_runs(cols):
                    y = rotate_runs(y, False).view(target.shape)
                    y, = apply(butterflies_restored, y, [center], features, [signs(cols, y.device)], dtype=dtype)
                else:
                    y, = apply(restored, rotate_back(y).view(target.shape), [center], features, dtype=dtype)
                target.copy_(y)
                row = stop
        return whole

    def _regions(self, scales: Tensor) -> Regions:
        return Regions(allocate(scales[:, 1].float(), self.bits, self._distortion), self.group)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        more = 4 * shape[feature_dim(shape)] if self._equalizes(shape) else 0
        more += prototypes.nbytes(shape, self.prototypes) if self._has_prototypes(shape) else 0
        more += 4 if patch_size(shape) > 1 else 0
        return more + sum(part.groups * (self.group * self.bits // 8 + 4) for part in self._parts(shape))


def _tiles(
    flat: Tensor, parts: tuple[Part, ...], mean: Tensor | None, inverse: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """(first group, last group + 1, their equalized values fp32 [R, C]) tile by tile."""
    row = 0
    for part in parts:
        x, means, inverses = part.take(flat), part.features(mean), part.features(inverse)
        for n, k in blocks(*part.shape, flat.device, TILE):
            y = x[n, k]
            # A tensor of its own in any case: what follows works in place.
            if means is None:
                y = y.to(torch.float32, copy=True)
            else:
                y, = apply(equalized, y, tables=[means[k], inverses[k]])
            y = y.reshape(-1, part.shape[2])
            yield row, row + y.shape[0], y
            row += y.shape[0]


def _mean_and_deviation(x: Tensor) -> Tensor:
    """fp32 rows [R, C] -> [R, 2]: the mean in bf16, and the deviation from that in bf16, rounded up."""
    center = x.mean(1).bfloat16().float()
    norm = torch.linalg.vector_norm(x.sub_(center[:, None]), dim=1)
    small = norm < SMALL
    if bool(small.any()):  # squares of such values underflow
        rows = x[small]
        top = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        norm[small] = torch.linalg.vector_norm(rows / top, dim=1) * top[:, 0]
    spread = norm / x.shape[1] ** 0.5
    return torch.stack([center, ceil16(spread)], 1)
