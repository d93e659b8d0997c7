"""The normalised Walsh-Hadamard transform of rows whose length is a power of two.

It is its own inverse and keeps lengths.  An outlier is spread over the whole group, so that the group looks Gaussian
and few bits suffice (Ashkboos et al., "QuaRot", 2024; TAH-Quant, 2025, for activations).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WIDEST = 1024  # a larger matrix would cost more memory than the rows: 4 GiB for n = 32768


@functools.cache
def hadamard_matrix(n: int, device: torch.device) -> Tensor:
    """fp32 [n, n], Sylvester's construction over sqrt(n)."""
    h = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return (h / n**0.5).to(device)


def hadamard(rows: Tensor) -> Tensor:
    """fp32 [R, n] -> fp32 [R, n].  Up to 1024 a product with the matrix is faster than log2(n) passes over memory."""
    count, n = rows.shape
    if n <= WIDEST:
        return rows @ hadamard_matrix(n, rows.device)
    # H[a * b] is the Kronecker product of H[a] and H[b]: each is applied along its own axis.
    outer = n // WIDEST
    inner = rows.reshape(-1, WIDEST) @ hadamard_matrix(WIDEST, rows.device)
    turned = hadamard(inner.view(count, outer, WIDEST).transpose(1, 2).reshape(-1, outer))
    return turned.view(count, WIDEST, outer).transpose(1, 2).reshape(count, n)
