"""How a decoded tensor differs from the input, and how hard the input is to compress.

Pure functions of tensors: they know no codec, module or file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.layout import in_memory_order

FEW = 1 << 14  # values that a meter samples of a tensor, evenly spaced
SAMPLE = 1 << 17  # values that records sample of a tensor; the extremes are those of the whole tensor
CHUNK = 1 << 16  # values that are summed in fp32

MEASURES = (
    "rel_error", "snr_db", "cosine", "bias", "zeroed", "saturated", "outlier", "kurtosis", "effective_bits",
)  # fmt: skip


def pick(x: Tensor, size: int = FEW) -> Tensor:
    """About `size` values of a tensor, fp32 and 1-D, evenly spaced in memory order.

    The step is odd, so that it does not fall in with a number of features that is a power of two.
    """
    if x.numel() <= size:
        return x.detach().float().reshape(-1)
    flat = in_memory_order(x.detach()).reshape(-1)
    return flat[:: (flat.numel() // size) | 1].float()


def distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(|y - x| / |x|, cosine) of two 1-D tensors in double precision; (0, 1) where both are zero."""
    x, y = x.double(), y.double()
    xx, yy, xy = (float(v) for v in (x @ x, y @ y, x @ y))
    if xx == 0:
        return (0.0, 1.0) if yy == 0 else (math.inf, 0.0)
    error = float(torch.linalg.vector_norm(y - x)) / math.sqrt(xx)
    return error, xy / math.sqrt(xx * yy) if yy > 0 else 0.0


def compare(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """All of MEASURES for an input `x` and what is decoded of it, `y`, of the same shape and strides.

    None stands for what is not defined: all of them for an empty tensor and where there is NaN or Inf; decibels and
    bits of an exact copy; outlier, kurtosis and bits of a constant tensor.
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
        **_apart(noise, power, float(b.square().mean()), float(a @ b) / a.numel()),
        "bias": _bias(error),
        "zeroed": float(((a != 0) & (b == 0)).double().mean()),
        "saturated": float(((a > top) | (a < bottom)).double().mean()),
        "outlier": max(high - mean, mean - low) / math.sqrt(spread) if spread > 0 else None,
        "kurtosis": float((a - mean).pow(4).mean()) / spread**2 if spread > 0 else None,
        "effective_bits": 0.5 * math.log2(spread / noise) if spread > 0 and noise > 0 else None,
    }


@dataclass(frozen=True)
class Sums:
    """Sums over two vectors: squares of their difference (`noise`), of the first (`power`) and of the second (`own`),
    and products of the two (`dot`).  Sums of parts add up to those of the whole."""

    noise: float = 0.0
    power: float = 0.0
    own: float = 0.0
    dot: float = 0.0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.noise + other.noise, self.power + other.power, self.own + other.own, self.dot + other.dot)

    def measures(self) -> dict[str, float | None]:
        """`rel_error`, `snr_db` and `cosine`; None where there is NaN or Inf."""
        values = (self.noise, self.power, self.own, self.dot)
        if not all(map(math.isfinite, values)):
            return dict.fromkeys(("rel_error", "snr_db", "cosine"))
        return _apart(*values)


def sums_of(exact: Iterable[Tensor | None], other: Iterable[Tensor | None]) -> list[Sums]:
    """The sums of each pair of tensors; None counts as zeros."""
    result = []
    for a, b in zip(exact, other, strict=True):
        if a is None and b is None:
            result.append(Sums())
            continue
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        a, b = a.detach().float().reshape(-1), b.detach().float().reshape(-1)
        error = b - a
        result.append(Sums(_dot(error, error), _dot(a, a), _dot(b, b), _dot(a, b)))
    return result


def rms_error(parts: Iterable[Sums]) -> float | None:
    """The root mean square of the parts' relative errors, so that a part with a small gradient counts like a large
    one, as it does for an optimizer that scales each parameter's step (Adam)."""
    parts = [part for part in parts if part.power != 0]
    if not all(math.isfinite(part.noise) and math.isfinite(part.power) for part in parts):
        return None
    return math.sqrt(sum(part.noise / part.power for part in parts) / len(parts)) if parts else 0.0


def _dot(x: Tensor, y: Tensor) -> float:
    """The dot product: chunks in fp32, which is fast, and their sum in double precision."""
    if x.numel() == 0:
        return 0.0
    chunks = [a @ b for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)]
    return float(torch.stack(chunks).double().sum())


def _apart(noise: float, power: float, own: float, dot: float) -> dict[str, float | None]:
    if power == 0:
        return {"rel_error": 0.0 if noise == 0 else None, "snr_db": None, "cosine": 1.0 if noise == 0 else 0.0}
    return {
        "rel_error": math.sqrt(noise / power),
        "snr_db": 10 * math.log10(power / noise) if noise > 0 else None,
        "cosine": dot / math.sqrt(power * own) if own > 0 else 0.0,
    }


def _bias(error: Tensor) -> float | None:
    """The mean error over its standard error: about normal with deviation 1 where rounding is unbiased."""
    spread, mean = (float(v) for v in torch.var_mean(error, correction=0))
    if spread == 0:
        return 0.0 if mean == 0 else None
    return mean / math.sqrt(spread / error.numel())


