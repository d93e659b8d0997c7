"""Inputs of GELU and SiLU as what their gradient needs of them: the slope, in a few bits.

The backward pass multiplies by f'(x) and uses x for nothing else.  So f'(x) itself is rounded, stochastically and
hence right on average, to one of 2**bits equally spaced levels between its least and its largest value; decoding gives
an x at which f' is that level.  Between the two extremes f' rises, so there is exactly one such x.
Sources: the idea of storing an activation's derivative in few bits is that of Few-bit backward (Novikov et al., 2023),
which fits levels by dynamic programming; equal levels with stochastic rounding are unbiased instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..codecs.rounding import RoundingState, next_key
from ..ops.bitmaps import decode_levels
from ..ops.bitmaps import encode_slopes as operator

LARGEST = 8  # bits


def _gelu(x: float) -> float:
    return 0.5 * (1 + math.erf(x / 2**0.5)) + x * math.exp(-x * x / 2) / (2 * math.pi) ** 0.5


def _tanh(x: float) -> float:
    inner = (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)
    slope = (2 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + math.tanh(inner)) + 0.5 * x * (1 - math.tanh(inner) ** 2) * slope


def _silu(x: float) -> float:
    s = 1 / (1 + math.exp(-x))
    return s * (1 + x * (1 - s))


# name: f' in double precision
SLOPES: dict[str, Callable[[float], float]] = {"gelu": _gelu, "gelu_tanh": _tanh, "silu": _silu}


@functools.cache
def extreme(name: str) -> float:
    """Where f' is largest; it is least at minus that."""
    low, high = 1.0, 3.0
    for _ in range(100):  # by thirds: f' has one maximum there
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if SLOPES[name](a) < SLOPES[name](b) else (low, b)
    return (low + high) / 2


@functools.cache
def places(name: str, bits: int) -> tuple[float, ...]:
    """The x whose slopes are the levels, ascending."""
    slope, end = SLOPES[name], extreme(name)
    least, most = slope(-end), slope(end)
    found = []
    for level in range(2**bits):
        wanted, low, high = least + (most - least) * level / (2**bits - 1), -end, end
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if slope(middle) < wanted else (low, middle)
        found.append((low + high) / 2)
    return tuple(found)


def encode_slopes(
    x: Tensor, name: str, bits: int, state: RoundingState | None, nonfinite: Tensor | None = None
) -> Tensor:
    """Packed codes uint8 of `x` (any shape, fp32 / bf16 / fp16): bits / 8 bytes per element.

    nonfinite: raised where NaN is among them, which gets the slope of the least x.
    """
    end = extreme(name)
    return operator(x, name, SLOPES[name](-end), SLOPES[name](end), bits, next_key(state), nonfinite)


def decode_slopes(codes: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str, bits: int) -> Tensor:
    """x' with f'(x') = the level that f'(x) was rounded to."""
    return decode_levels(codes, places(name, bits), shape, dtype, bits)
