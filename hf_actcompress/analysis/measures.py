"""How a decoded tensor differs from what went in, and how hard the input is to code.

Pure functions of tensors: they know no codec, module or file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..metering import pick

SAMPLE = 1 << 17  # values that stand for a larger tensor, evenly spaced; the extremes are those of the whole tensor

MEASURES = (
    "rel_error", "snr_db", "cosine", "bias", "zeroed", "saturated", "outlier", "kurtosis", "effective_bits",
)  # fmt: skip


def compare(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """All of MEASURES for an input `x` and what is decoded of it, `y`, of the same shape and strides.

    None stands for what is not defined: everything where there are no values or NaN or Inf is among them; the decibels
    and bits of an exact copy; the ratios of a constant tensor.
    """
    none = dict.fromkeys(MEASURES)
    if x.numel() == 0:
        return none
    (low, high), (bottom, top) = (tuple(float(v) for v in torch.aminmax(t.detach())) for t in (x, y))
    if not all(map(math.isfinite, (low, high, bottom, top))):
        return none
    a, b = pick(x, SAMPLE).double(), pick(y, SAMPLE).double()
    error = b - a
    noise, power = float(error.square().mean()), float(a.square().mean())
    spread, mean = (float(v) for v in torch.var_mean(a, correction=0))
    return {
        **_apart(noise, power, float(a @ b), float(b.square().sum()), a.numel()),
        "bias": _bias(error),
        "zeroed": float(((a != 0) & (b == 0)).double().mean()),
        "saturated": float(((a > top) | (a < bottom)).double().mean()),
        "outlier": max(high - mean, mean - low) / math.sqrt(spread) if spread > 0 else None,
        "kurtosis": float((a - mean).pow(4).mean()) / spread**2 if spread > 0 else None,
        "effective_bits": 0.5 * math.log2(spread / noise) if spread > 0 and noise > 0 else None,
    }


def compare_gradients(
    exact: Iterable[Tensor | None], other: Iterable[Tensor | None]
) -> dict[str, float | None]:
    """`rel_error`, `snr_db` and `cosine` of two gradients, each given as the parts of one long vector.

    A part that is None on one side counts as zeros there.
    """
    noise = power = dot = own = 0.0
    for a, b in zip(exact, other, strict=True):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        a, b = a.detach().float().reshape(-1), b.detach().float().reshape(-1)
        noise += _sum((b - a).square_())
        power += _sum(a.square())
        own += _sum(b.square())
        dot += _sum(a * b)
    if not all(map(math.isfinite, (noise, power, own, dot))):
        return dict.fromkeys(("rel_error", "snr_db", "cosine"))
    return _apart(noise, power, dot, own, 1)


def _sum(x: Tensor) -> float:
    return float(x.sum(dtype=torch.float64))


def _apart(noise: float, power: float, dot: float, own: float, count: int) -> dict[str, float | None]:
    """From mean squares of error and input, and sums of products and squares of the output."""
    if power == 0:
        return {"rel_error": 0.0 if noise == 0 else None, "snr_db": None, "cosine": 1.0 if noise == 0 else 0.0}
    return {
        "rel_error": math.sqrt(noise / power),
        "snr_db": 10 * math.log10(power / noise) if noise > 0 else None,
        "cosine": dot / math.sqrt(power * count * own) if own > 0 else 0.0,
    }


def _bias(error: Tensor) -> float | None:
    """The mean error over its standard error: about normal with deviation 1 where rounding is unbiased."""
    spread, mean = (float(v) for v in torch.var_mean(error, correction=0))
    if spread == 0:
        return 0.0 if mean == 0 else None
    return mean / math.sqrt(spread / error.numel())


