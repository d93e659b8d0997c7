"""Kernels of groups that are turned, or coded by levels of their own; as those of kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import Kernel
from .kernels import chosen, joined, looked_up, rounded, units
from .packing import code_dtype, pack, pack_runs, unpack_parts
from .scales import ceil16, safe_inverse

RUN = 16  # columns that a small matrix turns; the lanes of a vector register


def _equalized(x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor]:
    return (units(x, mean, inverse),)


def _signed(x: Tensor, mean: Tensor | None, inverse: Tensor | None, signs: Tensor) -> tuple[Tensor]:
    """The same (in fp32 without tables) times signs [C]."""
    return (units(x, mean, inverse) * signs,)


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
    x: Tensor, center: Tensor, step: Tensor | None, mean: Tensor | None, root: Tensor | None, signs: Tensor, *,
    dtype: torch.dtype,
) -> tuple[Tensor]:  # fmt: skip
    """The same, times step [N, K, 1], and then what `restored` does."""
    out = []
    for i, run in enumerate(_between_runs(x.float())):
        at = slice(i * RUN, (i + 1) * RUN)
        y = (run if step is None else run * step) * signs[at] + center
        out.append((y if mean is None else y * root[:, at] + mean[:, at]).to(dtype))
    return (joined(out),)


def _butterflies_steps(
    x: Tensor, center: Tensor, starts: Tensor | None, ones: Tensor, lanes: Tensor | None, key: Tensor | None, *,
    bits: int, reach: float, stored: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The second half of a rotation, and its codes in equal steps: codes, step [N, K, 1].

    center: [N, K, 1], taken out of the groups after they are turned; ones: [C], what a group of ones is turned to.
    reach: the step over the largest magnitude.
    """
    runs = [run - center * ones[i * RUN : (i + 1) * RUN] for i, run in enumerate(_between_runs(x))]
    hi, lo = runs[0], runs[0]
    for run in runs[1:]:
        hi, lo = torch.maximum(hi, run), torch.minimum(lo, run)
    step = torch.maximum(hi.amax(-1, keepdim=True), -lo.amin(-1, keepdim=True)) * reach
    step = ceil16(step) if stored == 16 else step
    codes, top, inverse = [], 2**bits - 1, safe_inverse(step)
    for i, run in enumerate(runs):
        own = None if lanes is None else lanes[i * RUN : (i + 1) * RUN]
        codes.append(rounded(run * inverse + top / 2, top, starts, own, key).to(code_dtype(bits)))
    return pack_runs(codes, bits), step


def _steps_encode(
    y: Tensor, step: Tensor, starts: Tensor | None, lanes: Tensor | None, key: Tensor | None, *, bits: int
) -> tuple[Tensor]:
    """Groups around 0 in equal steps [N, K, 1], half of the codes on each side."""
    top = 2**bits - 1
    codes = rounded(y * safe_inverse(step) + top / 2, top, starts, lanes, key)
    return (pack(codes.to(code_dtype(bits)), bits),)


def _steps_decode(codes: Tensor, step: Tensor, *, bits: int) -> tuple[Tensor]:
    middle = (2**bits - 1) / 2
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (joined([(run.float() - middle) * step for _, run in runs]),)


def _halves(codes: Tensor, *, bits: int) -> tuple[Tensor]:
    """Codes around 0, which are whole numbers and a half, in bf16: exact up to 8 bits."""
    middle = (2**bits - 1) / 2
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (joined([(run.float() - middle).bfloat16() for _, run in runs]),)


def _levels_encode(y: Tensor, spread: Tensor, edges: Tensor, ranks: Tensor, *, bits: int) -> tuple[Tensor]:
    """Groups around 0 of deviations [N, K, 1] by edges fp32 [k - 1]; ranks: 0, 1, ... as fp32 [k]."""
    codes = chosen(y * safe_inverse(spread), edges, False, ranks)[0]
    return (pack(codes.to(code_dtype(bits)), bits),)


def _levels_decode(codes: Tensor, spread: Tensor, table: Tensor, *, bits: int) -> tuple[Tensor]:
    runs = unpack_parts(codes, bits, codes.shape[-1] * 8 // bits)
    return (joined([looked_up(table, run, bits) * spread for _, run in runs]),)


equalized, signed, restored = Kernel(_equalized), Kernel(_signed), Kernel(_restored)
steps_encode, steps_decode, halves = Kernel(_steps_encode), Kernel(_steps_decode), Kernel(_halves)
levels_encode, levels_decode = Kernel(_levels_encode), Kernel(_levels_decode)
butterflies = Kernel(_butterflies)
butterflies_restored, butterflies_steps = Kernel(_butterflies_restored), Kernel(_butterflies_steps)
