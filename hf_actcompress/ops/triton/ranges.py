"""Numbers that describe a tensor (ops/ranges.py), each in one kernel.

Every program reduces a part, and the program that ends last joins the parts.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import in_memory_order
from .common import FLOATS, MAX, TINY, finite_scale, is_wide, launch

PARTS = 1024  # programs at most, one an element of the join
BLOCK = 2048  # elements that a program takes at once
SAMPLE = 1024  # rows from which scales of features are estimated
FEATURES = 32  # of a program


@functools.cache
def _scratch(device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Parts of the programs, and a count of those that have ended, which the last one sets back to 0."""
    return torch.empty(3 * PARTS, dtype=torch.float32, device=device), torch.zeros(1, dtype=torch.int32, device=device)


def scratch(device: torch.device) -> tuple[Tensor, Tensor]:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _scratch(device, stream)


@triton.jit
def _range(x, parts, ended, programs, n, STEPS: tl.constexpr, WIDE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Least, largest and whether all is finite, of the whole tensor, in the program that ends last."""
    program = tl.program_id(0)
    start = program * STEPS * 2048
    if WIDE:
        start = program.to(tl.int64) * STEPS * 2048
    lo = tl.full((2048,), float("inf"), tl.float32)
    hi = tl.full((2048,), float("-inf"), tl.float32)
    strange = tl.zeros((2048,), tl.int32)
    for i in range(STEPS):
        at = start + i * 2048 + tl.arange(0, 2048)
        y = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        strange |= (~(tl.abs(y) <= MAX)).to(tl.int32)
        lo = tl.minimum(lo, tl.where(at < n, y, float("inf")))
        hi = tl.maximum(hi, tl.where(at < n, y, float("-inf")))
    tl.store(parts + program, tl.min(lo))
    tl.store(parts + 1024 + program, tl.max(hi))
    tl.store(parts + 2048 + program, tl.max(strange).to(tl.float32))
    tl.debug_barrier()  # all threads have written before one says so
    return tl.atomic_add(ended, 1, sem="acq_rel") == programs - 1


@triton.jit
def _joined(parts, ended, programs):  # noqa: ANN001, ANN202
    at = tl.arange(0, 1024)
    inside = at < programs
    lo = tl.min(tl.load(parts + at, mask=inside, other=float("inf"), volatile=True))
    hi = tl.max(tl.load(parts + 1024 + at, mask=inside, other=float("-inf"), volatile=True))
    strange = tl.max(tl.load(parts + 2048 + at, mask=inside, other=0.0, volatile=True)) > 0
    tl.store(ended, 0)
    return lo, hi, strange


@triton.jit
def _tensor_scale(  # noqa: ANN202
    x, parts, ended, out, nonfinite, programs, n, levels,  # noqa: ANN001
    STEPS: tl.constexpr, SYMMETRIC: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,  # noqa: N803
):  # fmt: skip
    if _range(x, parts, ended, programs, n, STEPS, WIDE):
        lo, hi, strange = _joined(parts, ended, programs)
        if SYMMETRIC:
            least = lo * 0.0
            step = tl.div_rn(tl.maximum(-lo, hi), levels)
        else:
            least = tl.where(tl.abs(lo) < TINY, 0.0, lo)
            step = tl.div_rn(hi, levels) - tl.div_rn(lo, levels)
        step = tl.where(step < TINY, TINY, step)
        least, step, _ = finite_scale(tl.where(strange, float("nan"), least), step, levels)
        tl.store(out, least)
        tl.store(out + 1, step)
        if COUNT:
            if step != step:
                tl.atomic_add(nonfinite, 1)


@triton.jit
def _count_nonfinite(x, nonfinite, n, STEPS: tl.constexpr, WIDE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Adds 1 for every program that finds one."""
    program = tl.program_id(0)
    start = program * STEPS * 2048
    if WIDE:
        start = program.to(tl.int64) * STEPS * 2048
    strange = tl.zeros((2048,), tl.int32)
    for i in range(STEPS):
        at = start + i * 2048 + tl.arange(0, 2048)
        y = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        strange |= (~(tl.abs(y) <= MAX)).to(tl.int32)
    if tl.max(strange) > 0:
        tl.atomic_add(nonfinite, 1)


@triton.jit
def _sampled(x, s, f, features, inner, total, stride, IMAGES: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Samples s [S] of features f [F] -> [S, F], 0 where there are none: row s * stride of a matrix [rows, F], or of
    images pixel s % per * stride of image s // per."""
    if IMAGES:
        per = (inner + stride - 1) // stride
        at = ((s // per).to(tl.int64) * features)[:, None] * inner + f[None, :] * inner + (s % per * stride)[:, None]
    else:
        at = (s.to(tl.int64) * stride * features)[:, None] + f[None, :]
    return tl.load(x + at, mask=(s < total)[:, None] & (f < features)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _feature_scales(  # noqa: ANN202
    x, out, roots, ended, programs, features, inner, outer, total, stride,  # noqa: ANN001
    IMAGES: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """32 features a program.  Values are brought near 1 by a power of two for each feature: squares stay in the
    range of fp32."""
    f = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = f < features
    top = tl.zeros((32,), tl.float32)
    for first in range(0, total, BLOCK):
        s = first + tl.arange(0, BLOCK)
        y = _sampled(x, s, f, features, inner, total, stride, IMAGES)
        top = tl.maximum(top, tl.max(tl.where(tl.abs(y) <= MAX, tl.abs(y), 0.0), axis=0))
    bits = tl.maximum(top, 7.52316384526264e-37).to(tl.int32, bitcast=True) & 0x7F800000
    unit = bits.to(tl.float32, bitcast=True)  # a power of two, so that its inverse is exact
    inverse = tl.div_rn(unit * 0.0 + 1.0, unit)
    total_sum = tl.zeros((32,), tl.float32)
    for first in range(0, total, BLOCK):
        s = first + tl.arange(0, BLOCK)
        y = _sampled(x, s, f, features, inner, total, stride, IMAGES)
        y = tl.where(tl.abs(y) <= MAX, y * inverse[None, :], 0.0)
        total_sum += tl.sum(y, axis=0)
    mean = tl.div_rn(total_sum, total_sum * 0.0 + total)
    stored = (mean * unit).to(tl.bfloat16)
    center = tl.div_rn(stored.to(tl.float32), unit)
    squares = tl.zeros((32,), tl.float32)
    for first in range(0, total, BLOCK):
        s = first + tl.arange(0, BLOCK)
        y = _sampled(x, s, f, features, inner, total, stride, IMAGES)
        y = tl.where(tl.abs(y) <= MAX, y * inverse[None, :], 0.0)
        d = tl.where((s < total)[:, None], y - center[None, :], 0.0)
        squares += tl.sum(d * d, axis=0)
    root = tl.sqrt(tl.sqrt(tl.div_rn(squares, squares * 0.0 + total))) * tl.sqrt(unit)
    tl.store(out + f, stored, mask=inside)
    tl.store(roots + f, root, mask=inside)
    tl.debug_barrier()
    if tl.atomic_add(ended, 1, sem="acq_rel") == programs - 1:
        # The floor keeps features that look constant in the sample from being lost, or divided by nothing.
        most = 0.0
        for first in range(0, features, 1024):
            at = first + tl.arange(0, 1024)
            most = tl.maximum(most, tl.max(tl.load(roots + at, mask=at < features, other=0.0, volatile=True)))
        for first in range(0, features, 1024):
            at = first + tl.arange(0, 1024)
            own = tl.load(roots + at, mask=at < features, other=0.0, volatile=True)
            own = tl.where(most > 0, tl.maximum(own, most * 0.00390625), 1.0)
            tl.store(out + features + at, own.to(tl.bfloat16), mask=at < features)
        tl.store(ended, 0)


def _split(n: int) -> tuple[int, int]:
    """Programs, and steps of BLOCK elements of each: a power of two, so that few kernels are compiled."""
    blocks = -(-n // BLOCK)
    steps = 1
    while -(-blocks // steps) > PARTS:
        steps *= 2
    return -(-blocks // steps), steps


def tensor_scale(x, levels, symmetric, nonfinite):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel():
        return NotImplemented
    x, n = in_memory_order(x).contiguous(), x.numel()
    programs, steps = _split(n)
    out, (parts, ended) = torch.empty(2, dtype=torch.float32, device=x.device), scratch(x.device)
    launch(
        _tensor_scale, programs, x.device, x, parts, ended, out, nonfinite, programs, n, float(levels), STEPS=steps,
        SYMMETRIC=symmetric, COUNT=nonfinite is not None, WIDE=is_wide(n),
    )  # fmt: skip
    return out


def count_nonfinite(x, nonfinite):  # noqa: ANN001, ANN201
    if x.dtype not in FLOATS or not x.numel():
        return NotImplemented
    x, n = in_memory_order(x).contiguous(), x.numel()
    programs, steps = _split(n)
    launch(_count_nonfinite, programs, x.device, x, nonfinite, n, STEPS=steps, WIDE=is_wide(n))
    return None


def feature_scales(x):  # noqa: ANN001, ANN201
    images = x.dim() == 4
    features = x.shape[1] if images else x.shape[-1]
    if x.dtype not in FLOATS or not x.numel() or features > PARTS * 3:
        return NotImplemented
    x = x.contiguous()
    inner = x.shape[2] * x.shape[3] if images else 1
    rows = x.numel() // features
    if images:  # the same pixels as the definition: every stride-th of each image
        stride = max(1, x.numel() // features // SAMPLE) | 1
        total = x.shape[0] * -(-inner // stride)
    else:
        stride = max(0, rows // SAMPLE) | 1
        total = -(-rows // stride)
    out, (roots, ended) = torch.empty(2, features, dtype=torch.bfloat16, device=x.device), scratch(x.device)
    programs = -(-features // FEATURES)
    launch(_feature_scales, programs, x.device, x, out, roots, ended, programs, features, inner, rows, total, stride,
           IMAGES=images, BLOCK=64)  # fmt: skip
    return out
