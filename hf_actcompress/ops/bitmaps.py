"""Flags, masks and bitmaps in one bit a value, and slopes of activation functions in a few.

Shapes as in quantize.py: a grid x [N, K, C] of groups of C elements; bitmaps are uint8 [N, K, C / 8].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .compiled import Kernel
from .packing import code_dtype, pack
from .quantize import joined, rounded


def _bitmap(condition: Tensor) -> Tensor:
    """`pack` of one bit, in 32-bit integers: as many lanes as the comparisons of floats that it joins."""
    run = condition.shape[-1] // 8
    bits = torch.where(condition[..., :run], 1, 0).to(torch.int32)
    for k in range(1, 8):
        bits = bits | torch.where(condition[..., k * run : (k + 1) * run], 1 << k, 0).to(torch.int32)
    return bits.to(torch.uint8)


def _flags(x: Tensor, *, low: float, high: float | None) -> tuple[Tensor]:
    above = ~(x <= low)
    return (_bitmap(above if high is None else above & (x < high)),)


def _two_flags(x: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmaps of what is not 0, and of what is neither 0 nor `value` []."""
    zero = x == 0
    return _bitmap(~zero), _bitmap(~(zero | (x == value)))


def _unflag(bits: Tensor, values: Tensor) -> tuple[Tensor]:
    """values [2]: for a bit that is not set, and for one that is."""
    # All eight at once: eight runs of bytes joined take eight times as long.
    shifts = torch.arange(8, dtype=torch.int32, device=bits.device).view(8, 1)
    there = (bits.to(torch.int32).unsqueeze(-2) >> shifts) & 1
    return (torch.where(there != 0, values[1], values[0]).flatten(-2),)


def _slope_encode(
    x: Tensor, starts: Tensor, lanes: Tensor, key: Tensor, *, function: str, bits: int, least: float, width: float
) -> tuple[Tensor]:
    """Slopes of an activation function at `x` in equal steps from `least` to `least + width`."""
    x = x.float()
    if function == "gelu":
        slope = 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(x * x * -0.5) * (2 * math.pi) ** -0.5
    elif function == "gelu_tanh":
        k = (2 / math.pi) ** 0.5
        t = torch.tanh(k * (x + 0.044715 * x * x * x))
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (k * (1 + 3 * 0.044715 * x * x))
    else:
        s = torch.sigmoid(x)
        slope = s * (1 + x * (1 - s))
    top = 2**bits - 1
    codes = rounded((slope - least) * (top / width), top, starts, lanes, key)
    return (pack(codes.to(code_dtype(bits)), bits),)


def _band_bits(x: Tensor, lo: Tensor, hi: Tensor, *, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Bitmaps of the magnitudes from lo to hi, of those above hi (fp32 [], or fp64 for fp64), and of those that are
    NaN or beyond `limit`."""
    size = x.to(lo.dtype).abs()
    return _bitmap((size >= lo) & (size <= hi)), _bitmap(size > hi), _bitmap(~(size <= limit))


def _keep_above(x: Tensor, hi: Tensor) -> tuple[Tensor]:
    return (torch.where(x.to(hi.dtype).abs() > hi, x, torch.zeros_like(x)),)


def _place(bits: Tensor, ranks: Tensor, values: Tensor) -> tuple[Tensor]:
    """Bitmap [N, K, C / 8], for each byte the number of bits before it, values [k, 1] byte by byte -> [N, K, C]."""
    byte, out = bits.to(torch.int32), []
    for i in range(8):
        before = byte & ((1 << i) - 1)
        before = before - ((before >> 1) & 0x55)  # sums of neighbouring bits, pairs, halves
        before = (before & 0x33) + ((before >> 2) & 0x33)
        rank = ranks + ((before + (before >> 4)) & 0x0F)
        there = (byte >> i) & 1 != 0
        value = values[torch.where(there, rank, 0), 0]
        out.append(torch.where(there, value, torch.zeros_like(value)))
    return (joined(out),)


keep_above, band_bits, place = Kernel(_keep_above), Kernel(_band_bits), Kernel(_place)
flags, two_flags, unflag, slope_encode = Kernel(_flags), Kernel(_two_flags), Kernel(_unflag), Kernel(_slope_encode)
