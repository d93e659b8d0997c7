"""What the kernels share: scales in 16 bits, noise, packing (packing.py says how codes lie)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number of fp32
MAX = tl.constexpr(3.4028234663852886e38)
ELEMENTS = 2048  # of a program; with 4 warps 16 a thread
SETTINGS = {"num_warps": 4, "enable_fp_fusion": False}  # a fused multiply-add would round once, the definitions twice


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **SETTINGS | constants)


def is_wide(n: int) -> bool:
    """Whether offsets need 64 bits."""
    return n >= 2**31 - 2**16


def takes(x: Tensor, cols: int, bits: int) -> bool:
    return x.dtype in FLOATS and x.numel() > 0 and bits <= 8 and 8 <= cols <= 1024 and cols % 8 == 0




@triton.jit
def floor16(x):  # noqa: ANN001, ANN201
    """The largest bf16 value that is not above, as fp32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x < 0, bits + 0xFFFF, bits)
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def finite_scale(lo, step, steps):  # noqa: ANN001, ANN201
    """Minimum, step and its inverse; NaN, NaN and 0 where one, or what so many steps reach, is not finite."""
    good = (tl.abs(lo) <= MAX) & (step * steps <= MAX)
    inverse = tl.div_rn(1.0, tl.where(good, step, 1.0))
    return tl.where(good, lo, float("nan")), tl.where(good, step, float("nan")), tl.where(good, inverse, 0.0)


@triton.jit
def group_scale(lo, hi, strange, TOP: tl.constexpr):  # noqa: ANN001, ANN201, N803
    lo = floor16(tl.where(tl.abs(lo) < TINY, 0.0, lo))
    step = -floor16(lo * (1.0 / TOP) - hi * (1.0 / TOP))
    step = tl.where(step < TINY, TINY, step)
    return finite_scale(tl.where(strange, float("nan"), lo), step, TOP * 1.0)


@triton.jit
def noise(counter, key):  # noqa: ANN001, ANN201
    """uint32 counters -> fp32, uniform on [0, 1) in steps of 2**-24."""
    h = counter ^ key.to(tl.uint32, bitcast=True)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    return (h >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def rounded(y, counter, key, TOP: tl.constexpr, STOCHASTIC: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Units of steps -> codes int32 0 .. TOP."""
    y = tl.where(y > 0, y, 0.0)  # below the range, and NaN
    y = tl.minimum(y, TOP + 1.0)
    if STOCHASTIC:
        y = tl.floor(y + noise(counter.to(tl.uint32), key))
    else:
        y = (y + 8388608.0) - 8388608.0  # to the nearest: what has no room for a fraction
    return tl.minimum(y.to(tl.int32), TOP)


@triton.jit
def to_kind(y, pointer):  # noqa: ANN001, ANN201
    """fp32 in the dtype that `pointer` points to; fp16 not beyond its largest number."""
    if pointer.dtype.element_ty == tl.float16:
        y = tl.where(y > 65504.0, 65504.0, y)
        y = tl.where(y < -65504.0, -65504.0, y)
    return y.to(pointer.dtype.element_ty)


@triton.jit
def _store_plane(codes, base, inside, ROWS: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """The plane of WIDTH bits, if these codes have one: byte j joins element j of every run."""
    if BITS & WIDTH:
        FIELDS: tl.constexpr = 8 // WIDTH  # noqa: N806
        START: tl.constexpr = COLS * (BITS - BITS % (2 * WIDTH)) // 8  # noqa: N806
        field = (codes >> (BITS % WIDTH)) & ((1 << WIDTH) - 1)
        cube = tl.reshape(field, (ROWS, FIELDS, COLS // FIELDS))
        shifts = tl.arange(0, FIELDS) * WIDTH
        byte = tl.sum(cube << shifts[None, :, None], axis=1)
        where = base[:, None] + START + tl.arange(0, COLS // FIELDS)[None, :]
        tl.store(where, byte.to(tl.uint8), mask=inside[:, None])


@triton.jit
def store_packed(codes, base, inside, ROWS: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """codes int32 [ROWS, COLS] to the bytes of each row from base [ROWS] on."""
    _store_plane(codes, base, inside, ROWS, COLS, BITS, 8)
    _store_plane(codes, base, inside, ROWS, COLS, BITS, 4)
    _store_plane(codes, base, inside, ROWS, COLS, BITS, 2)
    _store_plane(codes, base, inside, ROWS, COLS, BITS, 1)


@triton.jit
def _load_plane(codes, base, inside, ROWS: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: ANN001, ANN202, N803
    if BITS & WIDTH:
        FIELDS: tl.constexpr = 8 // WIDTH  # noqa: N806
        START: tl.constexpr = COLS * (BITS - BITS % (2 * WIDTH)) // 8  # noqa: N806
        where = base[:, None] + START + tl.arange(0, COLS // FIELDS)[None, :]
        byte = tl.load(where, mask=inside[:, None], other=0).to(tl.int32)
        shifts = tl.arange(0, FIELDS) * WIDTH
        cube = (byte[:, None, :] >> shifts[None, :, None]) & ((1 << WIDTH) - 1)
        codes += tl.reshape(cube, (ROWS, COLS)) << (BITS % WIDTH)
    return codes


@triton.jit
def load_packed(base, inside, ROWS: tl.constexpr, COLS: tl.constexpr, BITS: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """The inverse: codes int32 [ROWS, COLS]."""
    codes = tl.zeros((ROWS, COLS), tl.int32)
    codes = _load_plane(codes, base, inside, ROWS, COLS, BITS, 8)
    codes = _load_plane(codes, base, inside, ROWS, COLS, BITS, 4)
    codes = _load_plane(codes, base, inside, ROWS, COLS, BITS, 2)
    return _load_plane(codes, base, inside, ROWS, COLS, BITS, 1)


@triton.jit
def _load_tail_plane(codes, base, width, COLS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: ANN001, ANN202, N803
    if BITS & WIDTH:
        col = tl.arange(0, COLS)[None, :]
        run = width * WIDTH // 8
        field = col // run
        where = base + width * (BITS - BITS % (2 * WIDTH)) // 8 + col - field * run
        byte = tl.load(where, mask=col < width, other=0).to(tl.int32)
        codes += ((byte >> (field * WIDTH)) & ((1 << WIDTH) - 1)) << (BITS % WIDTH)
    return codes


@triton.jit
def load_packed_tail(base, width, COLS: tl.constexpr, BITS: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Codes int32 [1, COLS] of one row that is packed in `width` columns; 0 behind them."""
    codes = tl.zeros((1, COLS), tl.int32)
    codes = _load_tail_plane(codes, base, width, COLS, BITS, 8)
    codes = _load_tail_plane(codes, base, width, COLS, BITS, 4)
    codes = _load_tail_plane(codes, base, width, COLS, BITS, 2)
    return _load_tail_plane(codes, base, width, COLS, BITS, 1)


@triton.jit
def tail_places(width, COLS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Columns [8 / WIDTH, COLS * WIDTH / 8] that each byte of a plane joins, in a row packed in `width` columns."""
    FIELDS: tl.constexpr = 8 // WIDTH  # noqa: N806
    return tl.arange(0, FIELDS)[:, None] * (width * WIDTH // 8) + tl.arange(0, COLS // FIELDS)[None, :]


@triton.jit
def store_tail_plane(code, base, width, COLS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: ANN001, ANN201, N803
    """Codes of the columns `tail_places`, to the bytes from base on."""
    FIELDS: tl.constexpr = 8 // WIDTH  # noqa: N806
    part = (code >> (BITS % WIDTH)) & ((1 << WIDTH) - 1)
    byte = tl.sum(part << (tl.arange(0, FIELDS)[:, None] * WIDTH), axis=0, keep_dims=True)
    j = tl.arange(0, COLS // FIELDS)[None, :]
    where = base + width * (BITS - BITS % (2 * WIDTH)) // 8 + j
    tl.store(where, byte.to(tl.uint8), mask=j < width * WIDTH // 8)
