"""Reproduction levels for a unit Gaussian.

Levels: J. Max, "Quantizing for minimum distortion", 1960; S. Lloyd, "Least squares quantization in PCM", 1982.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


@functools.cache
def gauss_levels(bits: int) -> tuple[float, ...]:
    """The 2**bits levels that minimise the squared error of a standard Gaussian, ascending and symmetric."""
    k = 2**bits
    # The asymptotically optimal point density is the cube root of the pdf: a Gaussian of variance 3.
    probs = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    levels = math.sqrt(3) * math.sqrt(2) * torch.erfinv(2 * probs - 1)
    inf = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(400 * bits):
        edges = torch.cat([-inf, (levels[1:] + levels[:-1]) / 2, inf])
        pdf = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        cdf = 0.5 * (1 + torch.erf(edges / math.sqrt(2)))
        levels = (pdf[:-1] - pdf[1:]) / (cdf[1:] - cdf[:-1])  # the centroid of each cell
    levels = (levels - levels.flip(0)) / 2
    return tuple(levels.float().tolist())


@functools.cache
def gauss_distortion(bits: int) -> float:
    """The squared error of those levels on a unit Gaussian: 0.3634, 0.1175, 0.0345, 0.0095 ... for 1, 2, 3, 4 bits."""
    levels = torch.tensor(gauss_levels(bits), dtype=torch.float64)
    inf = torch.tensor([math.inf], dtype=torch.float64)
    edges = torch.cat([-inf, (levels[1:] + levels[:-1]) / 2, inf])
    pdf = torch.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    cdf = 0.5 * (1 + torch.erf(edges / math.sqrt(2)))
    return 1 + float((levels**2 * cdf.diff() + 2 * levels * pdf.diff()).sum())


def level_table(bits: int, gain: float, device: torch.device) -> Tensor:
    """fp32 [2**bits]: the levels times `gain`."""
    return torch.tensor([gain * level for level in gauss_levels(bits)], dtype=torch.float32, device=device)


def bucket_edges(bits: int, device: torch.device) -> Tensor:
    """fp32 [2**bits - 1]: halfway between neighbouring levels."""
    levels = level_table(bits, 1.0, device)
    return (levels[1:] + levels[:-1]) / 2
