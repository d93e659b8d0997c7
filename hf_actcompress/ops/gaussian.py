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


@functools.cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """fp32 [2, 256]: edges between neighbouring levels above 0, and those levels, which lie from 2**(bits - 1) on.

    After the last edge comes Inf.  Levels are divided by the share of its square that a value keeps on average (a
    centroid is a share 1 - distortion of what fell to it), so that a decoded value is on average the original.
    """
    found = torch.full((2, 256), torch.inf, dtype=torch.float32, device="cpu")
    for bits in range(1, 9):
        upper = torch.tensor(gauss_levels(bits), dtype=torch.float32, device="cpu")[2 ** (bits - 1) :]
        found[0, len(upper) : 2 * len(upper) - 1] = (upper[1:] + upper[:-1]) / 2
        found[1, len(upper) : 2 * len(upper)] = upper / (1 - gauss_distortion(bits))
    return tuple(found.to(device))


@functools.cache
def distortions() -> tuple[float, ...]:
    """The squared error of a unit Gaussian at 0 to 8 bits."""
    return (1.0, *map(gauss_distortion, range(1, 9)))


def quantize(w: Tensor, bits: int) -> Tensor:
    """fp32 -> uint8, sign + 2 * (which level above 0 is nearest to the magnitude)."""
    edges = tables(w.device)[0][2 ** (bits - 1) : 2**bits - 1]
    return ((w < 0) + 2 * torch.bucketize(w.abs(), edges, out_int32=True)).to(torch.uint8)


def dequantize(codes: Tensor, bits: int) -> Tensor:
    value = tables(codes.device)[1][(codes >> 1).long() + 2 ** (bits - 1)]
    return torch.where(codes & 1 == 1, -value, value)
