"""Rotated groups: Walsh-Hadamard transforms, and codes by the levels of a Gaussian.

Shapes as in quantize.py: a grid x [N, K, C] of groups of C elements; what belongs to a group is [N, K, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import Kernel
from .packing import code_dtype, pack, unpack_parts
from .quantize import chosen, joined, looked_up, units
from .scales import safe_inverse

RUN = 16  # columns that one small matrix transforms; the lanes of a vector register


def _equalized(x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor]:
    return (units(x, mean, inverse),)


def _restored(
    y: Tensor, center: Tensor, mean: Tensor | None, root: Tensor | None, *, dtype: torch.dtype
) -> tuple[Tensor]:
    """fp32 groups around 0 and their means [N, K, 1] -> the tensor's own values."""
    y = y + center
    return ((y if mean is None else y * root + mean).to(dtype),)


def _between_runs(x: Tensor) -> list[Tensor]:
    """Sums and differences between the runs of RUN columns of fp32 [N, K, C], as in a Walsh-Hadamard transform."""
    runs = [x[..., i : i + RUN] for i in range(0, x.shape[-1], RUN)]
    half = 1
    while half < len(runs):
        for i in range(len(runs)):
            if not i & half:
                runs[i], runs[i + half] = runs[i] + runs[i + half], runs[i] - runs[i + half]
        half *= 2
    return runs


def _butterflies(x: Tensor, signs: Tensor | None) -> tuple[Tensor]:
    """The second half of a rotation, or with signs [C] of its inverse."""
    runs = _between_runs(x)
    if signs is not None:
        runs = [run * signs[i * RUN : (i + 1) * RUN] for i, run in enumerate(runs)]
    return (joined(runs),)


def _butterflies_restored(
    x: Tensor, center: Tensor, mean: Tensor | None, root: Tensor | None, signs: Tensor, *, dtype: torch.dtype
) -> tuple[Tensor]:
    """The second half of the inverse, with signs [C], and then what `restored` does."""
    out = []
    for i, run in enumerate(_between_runs(x)):
        at = slice(i * RUN, (i + 1) * RUN)
        y = run * signs[at] + center
        out.append((y if mean is None else y * root[:, at] + mean[:, at]).to(dtype))
    return (joined(out),)


def _levels_encode(y: Tensor, spread: Tensor, edges: Tensor, ranks: Tensor, *, bits: int) -> tuple[Tensor]:
    """Groups around 0 of deviations [N, K, 1] by edges fp32 [k - 1]; ranks: 0, 1, ... as fp32 [k]."""
    codes = chosen(y * safe_inverse(spread), edges, False, ranks)[0]
    return (pack(codes.to(code_dtype(bits)), bits),)


def _levels_decode(codes: Tensor, spread: Tensor, table: Tensor, *, bits: int) -> tuple[Tensor]:
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (joined([looked_up(table, run, bits) * spread for _, run in runs]),)


equalized, restored = Kernel(_equalized), Kernel(_restored)
levels_encode, levels_decode = Kernel(_levels_encode), Kernel(_levels_decode)
butterflies, butterflies_restored = Kernel(_butterflies), Kernel(_butterflies_restored)
