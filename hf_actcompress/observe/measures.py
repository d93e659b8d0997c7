"""How a decoded tensor differs from the input, and how hard the input is to compress.

Pure functions of tensors: they know no codec, module or file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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


def read(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The numbers in 1-D tensors of one length and dtype; waits once for each device."""
    found: list[list[float]] = [[]] * len(tensors)
    for device in dict.fromkeys(t.device for t in tensors):
        own = [i for i, t in enumerate(tensors) if t.device == device]
        for i, values in zip(own, torch.stack([tensors[i] for i in own]).tolist(), strict=True):
            found[i] = values
    return found


def products(x: Tensor, y: Tensor) -> Tensor:
    """fp64 [4] of two 1-D tensors: |y - x|**2, |x|**2, |y|**2 and x . y, as in `Sums`."""
    x, y = x.double(), y.double()
    error = y - x
    return torch.stack([error @ error, x @ x, y @ y, x @ y])


def distances(found: Tensor) -> Tensor:
    """products [..., 4] -> [..., 2]: |y - x| / |x| and the cosine; 0 and 1 where both are zero, NaN where one holds
    NaN or Inf."""
    noise, power, own, dot = found.unbind(-1)
    same = (own == 0).double()
    error = torch.where(power == 0, 1 / same - 1, (noise / power).sqrt())
    cosine = torch.where(power == 0, same, torch.where(own == 0, 0.0, dot / (power * own).sqrt()))
    return torch.stack([error, cosine], -1)


def distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(|y - x| / |x|, cosine) of two 1-D tensors in double precision, as `distances`."""
    error, cosine = distances(products(x, y)).tolist()
    return error, cosine


def sketch(x: Tensor, y: Tensor) -> Tensor:
    """fp64 [16]: what `described` makes the measures of.  Nothing waits for the device."""
    if not x.numel():
        return x.new_full((16,), math.nan, dtype=torch.float64)
    extremes = [value.double() for t in (x, y) for value in torch.aminmax(t.detach())]
    a, b = pick(x, SAMPLE).double(), pick(y, SAMPLE).double()
    error, (_, _, bottom, top) = b - a, extremes
    spread, mean = torch.var_mean(a, correction=0)
    return torch.stack([
        *extremes, error.square().mean(), a.square().mean(), b.square().mean(), (a @ b) / a.numel(),
        ((a != 0) & (b == 0)).double().mean(), ((a > top) | (a < bottom)).double().mean(),
        spread, mean, (a - mean).pow(4).mean(), torch.full_like(mean, a.numel()), *torch.var_mean(error, correction=0),
    ])  # fmt: skip


def described(values: Sequence[float]) -> dict[str, float | None]:
    """All of MEASURES from the numbers of a sketch; see `compare`."""
    low, high, bottom, top, noise, power, own, dot, zeroed, saturated, spread, mean, fourth, n, *error = values
    if not all(map(math.isfinite, (low, high, bottom, top))):
        return dict.fromkeys(MEASURES)
    return {
        **_apart(noise, power, own, dot),
        "bias": _bias(*error, n),
        "zeroed": zeroed,
        "saturated": saturated,
        "outlier": max(high - mean, mean - low) / math.sqrt(spread) if spread > 0 else None,
        "kurtosis": fourth / spread**2 if spread > 0 else None,
        "effective_bits": 0.5 * math.log2(spread / noise) if spread > 0 and noise > 0 else None,
    }


def compare(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """All of MEASURES for an input `x` and what is decoded of it, `y`, of the same shape and strides.

    None stands for what is not defined: all of them for an empty tensor and where there is NaN or Inf; decibels and
    bits of an exact copy; outlier, kurtosis and bits of a constant tensor.
    """
    return described(sketch(x, y).tolist())


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
    """The sums of each pair of tensors; None counts as zeros.  Waits once for the device."""
    found: list[Tensor | None] = []
    for a, b in zip(exact, other, strict=True):
        if a is None and b is None:
            found.append(None)
            continue
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        a, b = a.detach().float().reshape(-1), b.detach().float().reshape(-1)
        error = b - a
        found.append(torch.stack([_dot(error, error), _dot(a, a), _dot(b, b), _dot(a, b)]))
    numbers = iter(read([values for values in found if values is not None]))
    return [Sums() if values is None else Sums(*next(numbers)) for values in found]


def rms_error(parts: Iterable[Sums]) -> float | None:
    """The root mean square of the parts' relative errors, so that a part with a small gradient counts like a large
    one, as it does for an optimizer that scales each parameter's step (Adam)."""
    parts = [part for part in parts if part.power != 0]
    if not all(math.isfinite(part.noise) and math.isfinite(part.power) for part in parts):
        return None
    return math.sqrt(sum(part.noise / part.power for part in parts) / len(parts)) if parts else 0.0


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The dot product, fp64: chunks in fp32, which is fast, and their sum in double precision."""
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float64)
    chunks = [a @ b for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)]
    return torch.stack(chunks).double().sum()


def _apart(noise: float, power: float, own: float, dot: float) -> dict[str, float | None]:
    if power == 0:
        return {"rel_error": 0.0 if noise == 0 else None, "snr_db": None, "cosine": 1.0 if noise == 0 else 0.0}
    return {
        "rel_error": math.sqrt(noise / power),
        "snr_db": 10 * math.log10(power / noise) if noise > 0 else None,
        "cosine": dot / math.sqrt(power * own) if own > 0 else 0.0,
    }


def _bias(spread: float, mean: float, n: float) -> float | None:
    """The mean error over its standard error: about normal with deviation 1 where rounding is unbiased."""
    if spread == 0:
        return 0.0 if mean == 0 else None
    return mean / math.sqrt(spread / n)
