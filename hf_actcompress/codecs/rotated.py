"""Groups of the block codec that are turned, or coded by the levels of a Gaussian.

Each group keeps its mean and its deviation (or its step).  Sums are taken and rotations done tile by tile with
torch's own kernels, so that they have the same bits whether anything else is compiled or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.memory import fresh
from ..ops.packing import pack, unpack
from ..ops.rotated_kernels import (
    butterflies_restored,
    butterflies_steps,
    equalized,
    halves,
    levels_decode,
    levels_encode,
    restored,
    signed,
    steps_decode,
    steps_encode,
)  # fmt: skip
from ..ops.rounding import noise_source
from ..ops.rows import Part, apply, blocks, counters
from ..ops.scales import ceil16, safe_inverse
from . import trellis
from .base import CodecState
from .rounding import key_of
from .transforms.allocation import Regions, allocate, distortion
from .transforms.hadamard import (
    EXACT_BITS,
    averaging,
    in_runs,
    rotate,
    rotate_back,
    signs,
    turn_runs,
    turn_whole_runs,
    turned_ones,
)  # fmt: skip
from .transforms.levels import bucket_edges, level_table

if TYPE_CHECKING:
    from .block import Block


DEFAULT_GROUP = 128
TURNED = 1 << 21  # elements of a tile: calls of matrix products and kernels should not be what takes the time


def encode(
    codec: Block, flat: Tensor, parts: tuple[Part, ...], mean: Tensor | None, inverse: Tensor | None,
    state: CodecState | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Codes uint8 and scales [groups, 2] in their stored dtype."""
    cols = parts[0].shape[2]
    lanes, key = noise_source(key_of(codec, state), cols, flat.device)
    scales = torch.empty(sum(p.groups for p in parts), 2, dtype=codec.scale_dtype, device=flat.device)
    if codec.allocate:  # first, since the widths of codes depend on all deviations
        for start, stop, x in _tiles(flat, parts, mean, inverse):
            scales[start:stop] = _center_and_spread(codec, x)[1]
    widths = _regions(codec, scales, parts)
    packed = torch.empty(widths.nbytes, dtype=torch.uint8, device=flat.device)
    runs = signs(cols, flat.device) if codec.levels == "uniform" and in_runs(cols) else None
    scratch = None  # for all tiles: memory that is freed in between may go back to the system and cost page faults
    for start, stop, x in _tiles(flat, parts, mean, inverse, runs):
        if codec.levels != "uniform":
            if codec.allocate:
                scale = scales[start:stop].float()
                x = x.sub_(scale[:, :1])
            else:
                x, scale = _center_and_spread(codec, x)
            y = (rotate(x) if codec.rotate else x)[:, None]
            for bits, rows, at in widths.parts(start, stop, x.shape[1]):
                own, spread = (y, scale) if rows is None else (y[rows], scale[rows])
                packed[at] = _level_codes(codec, own, spread[:, None, 1:], bits).view(-1)
        else:
            starts = None if key is None else _starts(start, stop, cols, x.device)
            (_, _, at), = widths.parts(start, stop, x.shape[1])
            scratch = torch.empty_like(x).view(-1) if scratch is None or scratch.numel() < x.numel() else scratch
            codes, scale = _equal_steps(codec, x, starts, lanes, key, scratch)
            packed[at] = codes.view(-1)
        scales[start:stop] = scale
    return packed, scales


def _level_codes(codec: Block, y: Tensor, spread: Tensor, bits: int) -> Tensor:
    """fp32 [R, 1, C] around 0, of deviations [R, 1, 1] -> packed codes."""
    if codec.levels == "trellis":
        return pack(trellis.encode((y * safe_inverse(spread))[:, 0], bits), bits)
    shared = [bucket_edges(bits, y.device), torch.arange(2**bits, device=y.device).float()]
    return apply(levels_encode, y, [spread], shared=shared, bits=bits, compilable=bits <= 6)[0]


def decode(
    codec: Block, codes: Tensor, scales: Tensor, parts: tuple[Part, ...], mean: Tensor | None, root: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What the parts were, one after another, flat, in `dtype`."""
    widths, at, row = _regions(codec, scales, parts), 0, 0
    whole = fresh(sum(part.groups * part.shape[2] for part in parts), dtype, codes.device)
    for part in parts:
        out = whole[at : at + part.groups * part.shape[2]].view(part.shape)
        at += out.numel()
        means, roots = part.features(mean), part.features(root)
        for n, k in blocks(*part.shape, codes.device, TURNED):
            target = out[n, k]
            start, stop = row, row + target.shape[0] * target.shape[1]
            own = scales[start:stop].float()[:, None]
            center, step = own[..., :1].view(*target.shape[:2], 1), own[..., 1:]
            tables = [None if t is None else t[k] for t in (means, roots)]
            runs = widths.parts(start, stop, part.shape[2])
            if codec.rotate and in_runs(part.shape[2]):
                shared = [signs(part.shape[2], codes.device)]
                if codec.levels == "uniform" and codec.bits <= EXACT_BITS:
                    (_, _, run), = runs
                    y = codes[run].view(target.shape[0] * target.shape[1], 1, -1)
                    y = turn_whole_runs(apply(halves, y, cols=part.shape[2], bits=codec.bits)[0])
                    step = (step * part.shape[2] ** -0.5).view(center.shape)
                else:
                    y, step = turn_runs(_decoded(codec, codes, step, runs), False), None
                y = y.view(target.shape)
                y = apply(butterflies_restored, y, [center, step], tables, shared, dtype=dtype)[0]
            else:
                y = _decoded(codec, codes, step, runs)
                y = (rotate_back(y) if codec.rotate else y).view(target.shape)
                y = apply(restored, y, [center], tables, dtype=dtype)[0]
            target.copy_(y)
            row = stop
    return whole


def _decoded(
    codec: Block, codes: Tensor, scale: Tensor, runs: Iterator[tuple[int, Tensor | None, slice]]
) -> Tensor:
    """fp32 [R, C], around 0, of groups whose step or deviation is scale [R, 1, 1]."""
    out = None
    for bits, rows, at in runs:
        own = scale if rows is None else scale[rows]
        packed = codes[at].view(own.shape[0], 1, -1)
        cols = packed.shape[2] * 8 // bits
        if codec.levels == "trellis":
            y = trellis.decode(unpack(packed[:, 0], bits, cols), bits, _gain(codec, bits)) * own[:, 0]
        elif codec.levels == "gauss":
            table = level_table(bits, _gain(codec, bits), codes.device)
            y = apply(levels_decode, packed, [own], shared=[table], cols=cols, bits=bits)[0][:, 0]
        else:
            y = apply(steps_decode, packed, [own], cols=cols, bits=bits)[0][:, 0]
        if rows is None:
            return y
        if out is None:
            out = torch.zeros(scale.shape[0], cols, dtype=torch.float32, device=codes.device)
        out[rows] = y
    if out is None:  # no group of these was worth a bit
        out = torch.zeros(scale.shape[0], codec.group or DEFAULT_GROUP, dtype=torch.float32, device=codes.device)
    return out


def _starts(start: int, stop: int, cols: int, device: torch.device) -> Tensor:
    return counters(Part((stop - start, 1, cols), start * cols, 0, 0), device)


def _regions(codec: Block, scales: Tensor, parts: tuple[Part, ...]) -> Regions:
    if codec.allocate:
        return Regions(allocate(scales[:, 1].float(), codec.bits, codec.levels), parts[0].shape[2])
    return Regions(codec.bits, sum(part.groups * part.shape[2] for part in parts))


def _tiles(
    flat: Tensor, parts: tuple[Part, ...], mean: Tensor | None, inverse: Tensor | None, runs: Tensor | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """(first group, last group + 1, equalized groups fp32 [R, C], times `runs` [C]) tile by tile."""
    row = 0
    for part in parts:
        x, means, inverses = part.take(flat), part.features(mean), part.features(inverse)
        for n, k in blocks(*part.shape, flat.device, TURNED):
            y = x[n, k]
            # A tensor of its own in any case: what follows works in place.
            own = [None, None] if means is None else [means[k], inverses[k]]
            if runs is not None:
                y = apply(signed, y, tables=own, shared=[runs])[0]
            elif means is None:
                y = y.to(torch.float32, copy=True)
            else:
                y = apply(equalized, y, tables=own)[0]
            y = y.reshape(-1, part.shape[2])
            yield row, row + y.shape[0], y
            row += y.shape[0]


def _stored(codec: Block, mean: Tensor) -> Tensor:
    """Means of rows [R] as they are kept."""
    return mean.bfloat16().float() if codec.scale == 16 else mean


def _center_and_spread(codec: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 rows [R, C] -> rows around 0, in place; mean and deviation [R, 2], the latter rounded up."""
    center = _stored(codec, x.mean(1))
    x = x.sub_(center[:, None])
    spread = torch.linalg.vector_norm(x, dim=1) / x.shape[1] ** 0.5
    return x, torch.stack([center, ceil16(spread) if codec.scale == 16 else spread], 1)


def _equal_steps(
    codec: Block, x: Tensor, starts: Tensor | None, lanes: Tensor | None, key: Tensor | None,
    scratch: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fp32 rows [R, C] (times signs, where they are turned in runs) -> codes when turned, mean and step [R, 2]."""
    reach = 2 * codec.clip / (2**codec.bits - 1)
    if in_runs(cols := x.shape[1]):
        static = {"bits": codec.bits, "reach": reach, "stored": codec.scale}
        center = _stored(codec, torch.mv(x, averaging(cols, x.device)))
        own, shared = [center[:, None, None], starts], [turned_ones(cols, x.device), lanes, key]
        codes, step = apply(butterflies_steps, turn_runs(x, False, scratch)[:, None], own, shared=shared, **static)
        return codes, torch.stack([center, step.view(-1)], 1)
    center = _stored(codec, x.mean(1))
    y = rotate(x.sub_(center[:, None]))
    # amax and amin take a tenth of the time of the norm that is their larger one
    step = torch.maximum(y.amax(1), -y.amin(1)) * reach
    step = ceil16(step) if codec.scale == 16 else step
    codes = apply(steps_encode, y[:, None], [step[:, None, None], starts], shared=[lanes, key], bits=codec.bits)[0]
    return codes, torch.stack([center, step], 1)


def _gain(codec: Block, bits: int) -> float:
    """What levels are multiplied by: the centroid of a cell is a share 1 - distortion of what fell there."""
    unbiased = codec.fit == "unbiased" or (codec.fit is None and codec.rotate is not None)
    return 1 / (1 - distortion(bits, codec.levels)) if unbiased else 1.0
