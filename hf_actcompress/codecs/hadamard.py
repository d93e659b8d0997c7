"""The normalised Walsh-Hadamard transform of rows whose length is a power of two.

It is its own inverse and keeps lengths.  An outlier is spread over the whole group, so that the group looks Gaussian
and few bits suffice (Ashkboos et al., "QuaRot", 2024; TAH-Quant, 2025, for activations).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def hadamard_matrix(n: int, device: torch.device) -> Tensor:
    """fp32 [n, n], Sylvester's construction over sqrt(n)."""
    h = torch.ones(1, 1)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / n**0.5).to(device)


def hadamard(rows: Tensor) -> Tensor:
    """fp32 [R, n] -> fp32 [R, n].  Up to 1024 a product with the matrix is faster than log2(n) passes over memory."""
    return rows @ hadamard_matrix(rows.shape[1], rows.device)
