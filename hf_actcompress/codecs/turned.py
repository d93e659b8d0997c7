"""Groups of the block codec that are turned, or coded by the levels of a Gaussian.

Each group keeps its mean and its deviation (or its step).  Sums are taken and rotations done tile by tile with
torch's own kernels, so that they have the same bits whether anything else is compiled or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .allocation import Regions, allocate
from .base import CodecState
from .hadamard import rotate, rotate_back
from .levels import bucket, ceil16, gauss_distortion, level_table, safe_inverse
from .packing import code_dtype, pack, unpack
from .rounding import hash_noise, next_key
from .rows import Part, blocks

if TYPE_CHECKING:
    from .block import Block


def encode(
    codec: Block, flat: Tensor, parts: list[Part], mean: Tensor | None, inverse: Tensor | None,
    state: CodecState | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes uint8 and scales [groups, 2] in their stored dtype."""
    key = next_key(state) if codec.round == "stochastic" else None
    gauss, groups = codec.levels == "gauss", sum(part.groups for part in parts)
    scales = torch.empty(groups, 2, dtype=codec.scale_dtype, device=flat.device)
    if gauss:  # first, since the widths of codes depend on all deviations
        for start, stop, x in _tiles(flat, parts, mean, inverse):
            scales[start:stop] = _center_and_spread(codec, x)
    widths = _regions(codec, scales, parts)
    packed = torch.empty(widths.nbytes, dtype=torch.uint8, device=flat.device)
    for start, stop, x in _tiles(flat, parts, mean, inverse):
        if gauss:
            own = scales[start:stop].float()
            y = x - own[:, :1]
            y = (rotate(y) if codec.rotate else y) * safe_inverse(own[:, 1:])
            for bits, rows, at in widths.parts(start, stop, x.shape[1]):
                packed[at] = pack(bucket(y if rows is None else y[rows], bits).to(torch.uint8), bits).view(-1)
        else:
            codes, scales[start:stop] = _equal_steps(codec, x, key, start * parts[0].shape[2])
            for bits, _, at in widths.parts(start, stop, x.shape[1]):
                packed[at] = pack(codes.to(code_dtype(bits)), bits).view(-1)
    return packed, scales


def decode(
    codec: Block, codes: Tensor, scales: Tensor, parts: list[Part], mean: Tensor | None, root: Tensor | None,
    dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """What each part [N, K, C] was, in `dtype`."""
    widths, pieces, row = _regions(codec, scales, parts), [], 0
    for part in parts:
        out = torch.empty(part.shape, dtype=dtype, device=codes.device)
        means, roots = part.features(mean), part.features(root)
        for n, k in blocks(*part.shape, codes.device):
            target = out[n, k]
            start, stop = row, row + target.shape[0] * target.shape[1]
            own = scales[start:stop].float()
            y = torch.zeros(stop - start, part.shape[2], dtype=torch.float32, device=codes.device)
            for bits, rows, at in widths.parts(start, stop, part.shape[2]):
                q = unpack(codes[at].view(stop - start if rows is None else rows.numel(), -1), bits, part.shape[2])
                if codec.levels == "gauss":
                    q = level_table(bits, _gain(codec, bits), codes.device)[q.int()]
                else:
                    q = q.float() - (2**bits - 1) / 2
                y[slice(None) if rows is None else rows] = q
            y = y * own[:, 1:]
            y = ((rotate_back(y) if codec.rotate else y) + own[:, :1]).view(target.shape)
            target.copy_(y if means is None else y * roots[k] + means[k])
            row = stop
        pieces.append(out)
    return pieces


def _regions(codec: Block, scales: Tensor, parts: list[Part]) -> Regions:
    if codec.allocate:
        return Regions(allocate(scales[:, 1].float(), codec.bits), parts[0].shape[2])
    return Regions(codec.bits, sum(part.groups * part.shape[2] for part in parts))


def _tiles(
    flat: Tensor, parts: list[Part], mean: Tensor | None, inverse: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """(first group, last group + 1, equalized groups fp32 [R, C]) tile by tile."""
    row = 0
    for part in parts:
        x, means, inverses = part.take(flat), part.features(mean), part.features(inverse)
        for n, k in blocks(*part.shape, flat.device):
            y = x[n, k].float()
            y = y if means is None else (y - means[k]) * inverses[k]
            y = y.reshape(-1, part.shape[2])
            yield row, row + y.shape[0], y
            row += y.shape[0]


def _mean(codec: Block, x: Tensor) -> Tensor:
    mean = x.mean(1)
    return mean.bfloat16().float() if codec.scale == 16 else mean


def _center_and_spread(codec: Block, x: Tensor) -> Tensor:
    """fp32 rows [R, C] -> mean and deviation [R, 2], the latter rounded up."""
    center = _mean(codec, x)
    spread = torch.linalg.vector_norm(x - center[:, None], dim=1) / x.shape[1] ** 0.5
    return torch.stack([center, ceil16(spread) if codec.scale == 16 else spread], 1)


def _equal_steps(codec: Block, x: Tensor, key: int | None, index: int) -> tuple[Tensor, Tensor]:
    """Turned rows in equal steps around their mean: codes fp32 [R, C], mean and step [R, 2]."""
    center, top = _mean(codec, x), 2**codec.bits - 1
    y = rotate(x - center[:, None])
    step = torch.linalg.vector_norm(y, torch.inf, dim=1) * (2 * codec.clip / top)
    step = ceil16(step) if codec.scale == 16 else step
    y = y * safe_inverse(step)[:, None] + top / 2
    if key is None:
        codes = torch.round(y)
    else:
        codes = torch.floor(y + hash_noise(*y.shape, key, index, y.device))
    return codes.clamp_(0, top), torch.stack([center, step], 1)


def _gain(codec: Block, bits: int) -> float:
    """What levels are multiplied by: the centroid of a cell is a share 1 - distortion of what fell there."""
    unbiased = codec.fit == "unbiased" or (codec.fit is None and codec.rotate is not None)
    return 1 / (1 - gauss_distortion(bits)) if unbiased else 1.0
