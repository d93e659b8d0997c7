"""Rotated groups to codes and back (ops/rotated.py): one kernel each, a program for every window of groups.

A program reads its groups twice when it encodes, first for their means and deviations: what it read before mostly
still lies in the cache.  Between the two it sorts the deviations and finds the bits of its groups, which go through
memory, as a program cannot take a part of what lies in its registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import gaussian
from ..allocation import Windows, moves
from .common import FLOATS, MAX, floor16, is_wide, launch, to_kind
from .groups import restored, values

TILE, WARPS = 2048, 8  # elements that a program has in its registers at a time


@triton.jit
def _hashed(i):  # noqa: ANN001, ANN202
    """32 random bits of each number, as in hadamard.py."""
    h = (i.to(tl.uint32) + 1) * 0x9E3779B9
    h = (h ^ (h >> 16)) * 0x7FEB352D
    return (h ^ (h >> 15)) * 0x846CA68B


@triton.jit
def _group(run, window, windows, members, full):  # noqa: ANN001, ANN202
    """The group of each run that belongs to a window."""
    by = (_hashed(run).to(tl.int64) % windows).to(tl.int32)
    by = tl.where((run == members - 1) & (full < windows), 0, by)
    return run * windows + (window + by) % windows


@triton.jit
def _signs(COLS: tl.constexpr, NORM: tl.constexpr):  # noqa: ANN202, N803
    return tl.where((_hashed(tl.arange(0, COLS)) >> 16) & 1 == 1, NORM, -NORM)[None, :]


@triton.jit
def _stage(y, ROWS: tl.constexpr, COLS: tl.constexpr, HALF: tl.constexpr):  # noqa: ANN001, ANN202, N803
    if HALF < COLS:
        a, b = tl.split(tl.permute(tl.reshape(y, (ROWS * COLS // (2 * HALF), 2, HALF)), (0, 2, 1)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, COLS))
    return y


@triton.jit
def _butterflies(y, ROWS: tl.constexpr, COLS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    y = _stage(y, ROWS, COLS, 512)
    y = _stage(y, ROWS, COLS, 256)
    y = _stage(y, ROWS, COLS, 128)
    y = _stage(y, ROWS, COLS, 64)
    y = _stage(y, ROWS, COLS, 32)
    y = _stage(y, ROWS, COLS, 16)
    y = _stage(y, ROWS, COLS, 8)
    y = _stage(y, ROWS, COLS, 4)
    y = _stage(y, ROWS, COLS, 2)
    return _stage(y, ROWS, COLS, 1)


@triton.jit
def _added(y, ROWS: tl.constexpr, HALF: tl.constexpr):  # noqa: ANN001, ANN202, N803
    a, b = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, HALF)), (0, 2, 1)))
    return a + b


@triton.jit
def _sum_of_halves(y, ROWS: tl.constexpr, COLS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """[ROWS, 1], in the order of hadamard.py."""
    if COLS >= 1024:
        y = _added(y, ROWS, 512)
    if COLS >= 512:
        y = _added(y, ROWS, 256)
    if COLS >= 256:
        y = _added(y, ROWS, 128)
    if COLS >= 128:
        y = _added(y, ROWS, 64)
    if COLS >= 64:
        y = _added(y, ROWS, 32)
    if COLS >= 32:
        y = _added(y, ROWS, 16)
    if COLS >= 16:
        y = _added(y, ROWS, 8)
    y = _added(y, ROWS, 4)
    y = _added(y, ROWS, 2)
    return _added(y, ROWS, 1)


@triton.jit
def _to_bf16(x):  # noqa: ANN001, ANN202
    """fp32 rounded to the nearest number that bf16 holds."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load16(pointer, inside):  # noqa: ANN001, ANN202
    """fp32 of the bits of bf16."""
    return (tl.load(pointer, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _store16(pointer, value, inside):  # noqa: ANN001, ANN202
    """fp32 that bf16 holds, as bits: a conversion would be another one under the interpreter."""
    tl.store(pointer, (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=inside)


@triton.jit
def _fetched(  # noqa: ANN202
    x, features, group, there, n, count, inner,  # noqa: ANN001
    COLS: tl.constexpr, FEATURES: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Values of groups in units of a power of two of each, and the inverse of that; where they begin."""
    begin = group[:, None] * COLS
    if WIDE:
        begin = group.to(tl.int64)[:, None] * COLS
    col = tl.arange(0, COLS)[None, :]
    y = values(x, features, tl.minimum(begin + col, n - 1), there[:, None] & (col >= 0), count, inner, FEATURES)
    top = tl.max(tl.abs(y), axis=1, keep_dims=True)
    unit = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.minimum(tl.maximum(unit, 1.1754943508222875e-38), 8.507059173023462e37)
    inverse = tl.div_rn(1.0, unit)
    return y * inverse, inverse, unit, begin + col


@triton.jit
def _scales(y, inverse, unit, ROWS: tl.constexpr, COLS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    center = _to_bf16(_sum_of_halves(y, ROWS, COLS) * (1.0 / COLS) * unit)
    z = y - center * inverse
    spread = -floor16(-(tl.sqrt_rn(_sum_of_halves(z * z, ROWS, COLS) * (1.0 / COLS)) * unit))
    good = (tl.abs(center) <= MAX) & (spread <= MAX)
    return tl.where(good, center, float("nan")), tl.where(good, spread, float("nan"))


@triton.jit
def _allocate(  # noqa: ANN202
    scales, places, window, windows, members, full, size, first, a1, b1, a2, b2,  # noqa: ANN001
    BITS: tl.constexpr, STEPS: tl.constexpr, MEMBERS: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Writes the bits of each group of the window and the planes before it to places [groups, 2], from `first` on."""
    rank = tl.arange(0, MEMBERS)
    group = _group(rank, window, windows, members, full)
    key = tl.load(scales + 2 * group.to(tl.int64) + 1, mask=rank < size, other=0).to(tl.int32) & 0x7FFF
    key = 0x7FFF - tl.where(key >= 0x7F80, 0, key)
    key = tl.sort(tl.where(rank < size, (key << 16) | rank, 0x7FFFFFFF))
    own = ((0x7FFF - (key >> 16)) << 16).to(tl.float32, bitcast=True)
    other = tl.gather(own, tl.maximum(size - 1 - rank, 0), 0)
    wins = rank < size // 2
    large, small = tl.where(wins, own, other), tl.where(wins, other, own)
    change = rank * 0
    if STEPS >= 1:
        moved = large * a1 > small * b1
        change += moved.to(tl.int32)
        if STEPS >= 2:
            change += (moved & (large * a2 > small * b2)).to(tl.int32)
    change = tl.where(wins, change, tl.where(rank >= size - size // 2, -change, 0))
    tl.store(places + 2 * (first + (key & 0xFFFF)), BITS + change, mask=rank < size)
    tl.debug_barrier()
    given = tl.load(places + 2 * (first + rank), mask=rank < size, other=0)
    tl.store(places + 2 * (first + rank) + 1, first * BITS + tl.cumsum(given, 0) - given, mask=rank < size)
    tl.debug_barrier()


@triton.jit
def _decoded(  # noqa: ANN202
    out, features, u, at, there, n, center, spread, count, inner,  # noqa: ANN001
    ROWS: tl.constexpr, COLS: tl.constexpr, NORM: tl.constexpr, FEATURES: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Levels to values."""
    y = _butterflies(u, ROWS, COLS) * _signs(COLS, NORM) * spread + center
    inside = there[:, None] & (at < n)
    y = restored(y, features, at, inside, count, inner, FEATURES)
    tl.store(out + at, to_kind(y, out), mask=inside)


@triton.jit
def _quantize(  # noqa: ANN202
    x, features, edges, levels, codes, scales, places, out, nonfinite, n, count, inner,  # noqa: ANN001
    windows, members, full, a1, b1, a2, b2,  # noqa: ANN001
    COLS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr, MEMBERS: tl.constexpr,  # noqa: N803
    NORM: tl.constexpr, FEATURES: tl.constexpr, ROUNDTRIP: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    window = tl.program_id(0)
    size = tl.where(window < full, members, members - 1)
    first = window * (members - 1) + tl.minimum(window, full)
    strange = 0
    for start in range(0, size, ROWS):
        run = start + tl.arange(0, ROWS)
        there = run < size
        group = _group(run, window, windows, members, full)
        y, inverse, unit, _ = _fetched(x, features, group, there, n, count, inner, COLS, FEATURES, WIDE)
        center, spread = _scales(y, inverse, unit, ROWS, COLS)
        pair = scales + 2 * group.to(tl.int64)[:, None]
        _store16(pair, center, there[:, None])
        _store16(pair + 1, spread, there[:, None])
        strange += tl.sum(((spread != spread) & there[:, None]).to(tl.int32))
    if COUNT:
        if strange > 0:
            tl.atomic_add(nonfinite, strange.to(tl.int64))
    tl.debug_barrier()
    _allocate(scales, places, window, windows, members, full, size, first, a1, b1, a2, b2, BITS, STEPS, MEMBERS)
    for start in range(0, size, ROWS):
        run = start + tl.arange(0, ROWS)
        there = run < size
        group = _group(run, window, windows, members, full)
        y, inverse, _, at = _fetched(x, features, group, there, n, count, inner, COLS, FEATURES, WIDE)
        pair = scales + 2 * group.to(tl.int64)[:, None]
        center, spread = _load16(pair, there[:, None]), _load16(pair + 1, there[:, None])
        given = tl.load(places + 2 * (first + run), mask=there, other=0)
        width = spread * inverse
        over = tl.where(width > 0, tl.div_rn(1.0, tl.where(width > 0, width, 1.0)), 0.0)
        w = _butterflies((y - center * inverse) * _signs(COLS, NORM), ROWS, COLS) * over
        size_of = tl.where(given > 0, (1 << given) >> 1, 0)[:, None]  # levels above 0
        level = tl.zeros((ROWS, COLS), tl.int32)
        for step in tl.static_range(1, BITS + STEPS):
            part = size_of >> step
            edge = tl.load(edges + size_of + level + part - 1, mask=(level >= 0) & (part > 0), other=float("inf"))
            level += tl.where(tl.abs(w) > edge, part, 0)
        known = (spread == spread) & (size_of > 0)
        level = tl.where(known, level, 0)
        below = (w < 0) & known
        if ROUNDTRIP:
            u = tl.load(levels + size_of + level, mask=(level >= 0) & (size_of > 0), other=0.0)
            _decoded(out, features, tl.where(below, -u, u), at, there, n, center, spread, count, inner, ROWS, COLS,
                     NORM, FEATURES)  # fmt: skip
        else:
            before = tl.load(places + 2 * (first + run) + 1, mask=there, other=0)
            code = below.to(tl.int32) + 2 * level
            byte = tl.arange(0, COLS // 8)[None, :]
            for plane in tl.static_range(BITS + STEPS):
                bit = tl.reshape((code >> plane) & 1, (ROWS, COLS // 8, 8)) << tl.arange(0, 8)[None, None, :]
                where = (before.to(tl.int64) + plane)[:, None] * (COLS // 8) + byte
                inside = (there & (plane < given))[:, None] & (byte >= 0)
                tl.store(codes + where, tl.sum(bit, axis=2).to(tl.uint8), mask=inside)


@triton.jit
def _dequantize(  # noqa: ANN202
    codes, scales, features, levels, places, out, n, count, inner, windows, members, full, a1, b1, a2, b2,  # noqa: ANN001
    COLS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, STEPS: tl.constexpr, MEMBERS: tl.constexpr,  # noqa: N803
    NORM: tl.constexpr, FEATURES: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    window = tl.program_id(0)
    size = tl.where(window < full, members, members - 1)
    first = window * (members - 1) + tl.minimum(window, full)
    _allocate(scales, places, window, windows, members, full, size, first, a1, b1, a2, b2, BITS, STEPS, MEMBERS)
    for start in range(0, size, ROWS):
        run = start + tl.arange(0, ROWS)
        there = run < size
        group = _group(run, window, windows, members, full)
        pair = scales + 2 * group.to(tl.int64)[:, None]
        center, spread = _load16(pair, there[:, None]), _load16(pair + 1, there[:, None])
        given = tl.load(places + 2 * (first + run), mask=there, other=0)
        before = tl.load(places + 2 * (first + run) + 1, mask=there, other=0)
        code = tl.zeros((ROWS, COLS), tl.int32)
        byte = tl.arange(0, COLS // 8)[None, :]
        for plane in tl.static_range(BITS + STEPS):
            where = (before.to(tl.int64) + plane)[:, None] * (COLS // 8) + byte
            inside = (there & (plane < given))[:, None] & (byte >= 0)
            own = tl.load(codes + where, mask=inside, other=0).to(tl.int32)
            code += tl.reshape((own[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (ROWS, COLS)) << plane
        size_of = tl.where(given > 0, (1 << given) >> 1, 0)[:, None]
        u = tl.load(levels + size_of + (code >> 1), mask=(code >= 0) & (size_of > 0), other=0.0)
        begin = group[:, None] * COLS
        if WIDE:
            begin = group.to(tl.int64)[:, None] * COLS
        _decoded(out, features, tl.where(code & 1 == 1, -u, u), begin + tl.arange(0, COLS)[None, :], there, n, center,
                 spread, count, inner, ROWS, COLS, NORM, FEATURES)  # fmt: skip


def _takes(n: int, dtype: torch.dtype, cols: int, paths: bool) -> bool:
    return not paths and dtype in FLOATS and n > 0 and 8 <= cols <= 1024


def _common(n: int, cols: int, bits: int, features: Tensor | None) -> tuple[int, list, dict]:
    """Programs, the last arguments and the constants of both kernels."""
    windows, limits = Windows.of(-(-n // cols)), moves(bits, False)
    members = max(2, triton.next_power_of_2(windows.members))
    flat = [value for pair in limits for value in pair]
    constants = {
        "COLS": cols, "ROWS": min(members, max(1, TILE // cols)), "BITS": bits, "STEPS": len(limits),
        "MEMBERS": members, "NORM": cols**-0.5, "FEATURES": features is not None,
        "WIDE": is_wide(n + TILE), "num_warps": WARPS,
    }  # fmt: skip
    return windows.count, [*windows, *flat, *[0.0] * (4 - len(flat))], constants


def _run(x: Tensor, features, inner, cols, bits, nonfinite, codes, out) -> Tensor:  # noqa: ANN001
    n = x.numel()
    programs, last, constants = _common(n, cols, bits, features)
    scales = x.new_empty(-(-n // cols), 2, dtype=torch.bfloat16)
    launch(
        _quantize, programs, x.device, x.contiguous(), features, *gaussian.tables(x.device), codes,
        scales.view(torch.int16),
        torch.empty_like(scales, dtype=torch.int32), out, nonfinite, n,
        0 if features is None else features.shape[1], inner, *last, **constants,
        ROUNDTRIP=out is not None, COUNT=nonfinite is not None,
    )  # fmt: skip
    return scales


def quantize_rotated(x, features, inner, cols, bits, paths, nonfinite):  # noqa: ANN001, ANN201
    if not _takes(x.numel(), x.dtype, cols, paths):
        return NotImplemented
    codes = x.new_empty(-(-x.numel() // cols) * bits * cols // 8, dtype=torch.uint8)
    return codes, _run(x, features, inner, cols, bits, nonfinite, codes, None)


def roundtrip_rotated(x, features, inner, cols, bits, paths, nonfinite):  # noqa: ANN001, ANN201
    if not _takes(x.numel(), x.dtype, cols, paths):
        return NotImplemented
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(x, features, inner, cols, bits, nonfinite, None, out)
    return out


def dequantize_rotated(codes, scales, features, inner, shape, dtype, cols, bits, paths):  # noqa: ANN001, ANN201
    n = math.prod(shape)
    if not _takes(n, dtype, cols, paths):
        return NotImplemented
    programs, last, constants = _common(n, cols, bits, features)
    out, scales = codes.new_empty(shape, dtype=dtype), scales.contiguous()
    launch(
        _dequantize, programs, codes.device, codes.contiguous(), scales.view(torch.int16), features,
        gaussian.tables(codes.device)[1],
        torch.empty_like(scales, dtype=torch.int32), out, n, 0 if features is None else features.shape[1], inner,
        *last, **constants,
    )  # fmt: skip
    return out
