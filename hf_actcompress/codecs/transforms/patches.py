"""Images as frequencies: small patches, cosine transformed, coefficients of one frequency side by side.

Neighbouring pixels of an activation are alike, so most of a patch's energy lies in few coefficients.  Grouped by
channel and frequency, groups differ in energy by orders of magnitude, which is what allocation by energy needs.
Source: transform coding as in JPEG (Wallace, 1991), on patches of 2 to 8.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LARGEST = 8


def patch_size(shape: tuple[int, ...]) -> int:
    """The least k from 2 to LARGEST that divides height and width of [B, C, H, W]; 1 if there is none."""
    if len(shape) != 4:
        return 1
    return next((k for k in range(2, LARGEST + 1) if shape[2] % k == 0 == shape[3] % k and math.prod(shape)), 1)


@functools.cache
def cosines(k: int, device: torch.device) -> Tensor:
    """fp32 [k, k], orthogonal: rows are frequencies (DCT-II)."""
    i = torch.arange(k, dtype=torch.float64, device=device)
    basis = torch.cos(math.pi * i[:, None] * (i + 0.5) / k) * math.sqrt(2 / k)
    basis[0] /= math.sqrt(2)
    return basis.float()


def to_frequencies(x: Tensor, k: int) -> Tensor:
    """[B, C, H, W] -> fp32, flat: by channel, vertical and horizontal frequency, image and patch."""
    b, c, h, w = x.shape
    basis = cosines(k, x.device)
    y = x.float().reshape(b, c, h // k, k, w // k, k)
    return torch.einsum("bchiwj,pi,qj->cpqbhw", y, basis, basis).reshape(-1)


def from_frequencies(flat: Tensor, shape: tuple[int, ...], k: int) -> Tensor:
    """The inverse, fp32 and contiguous."""
    b, c, h, w = shape
    basis = cosines(k, flat.device)
    y = torch.einsum("cpqbhw,pi,qj->bchiwj", flat.view(c, k, k, b, h // k, w // k), basis, basis)
    return y.reshape(shape).contiguous()
