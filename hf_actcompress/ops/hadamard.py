"""The randomised Walsh-Hadamard transform of rows whose length is a power of two.

Fixed random signs, then the normalised transform: an orthogonal map that spreads an outlier over the whole group, so
that the group looks Gaussian and few bits suffice.  The signs matter: without them the transform gathers the energy
of smooth signals (pictures) in few coefficients, which is the opposite of what a quantizer wants.
Sources: Ailon and Chazelle, 2006; QuIP# (Tseng et al., 2024) for weights, QuaRot (Ashkboos et al., 2024) and
TAH-Quant (2025) for activations.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def hashed(index: Tensor) -> Tensor:
    """int64 -> 32 random bits of each number (int64): the same on every machine and in every version of torch."""
    low = 0xFFFFFFFF  # products may wrap around: their low bits stay
    h = (index + 1) * 0x9E3779B9 & low
    h = (h ^ (h >> 16)) * 0x7FEB352D & low
    h = (h ^ (h >> 15)) * 0x846CA68B & low
    return h


@functools.cache
def signs(n: int, device: torch.device) -> Tensor:
    """fp32 [n]: the random signs over sqrt(n), which makes the transform orthogonal."""
    up = (hashed(torch.arange(n, device="cpu")) >> 16 & 1).float()  # whatever the defaults are: this is cached
    return ((2 * up - 1) * n**-0.5).to(device)


def butterflies(rows: Tensor) -> Tensor:
    """fp32 [R, n] -> the rows times Sylvester's matrix of +1 and -1, by sums and differences of halves.

    The order is part of the definition: it decides the last bits.
    """
    shape, half = rows.shape, rows.shape[1] // 2
    while half:
        a, b = rows.view(-1, 2, half).unbind(1)
        rows = torch.stack([a + b, a - b], 1)
        half //= 2
    return rows.view(shape)


def sum_of_halves(rows: Tensor) -> Tensor:
    """fp32 [R, n] -> [R]: the second half is added to the first one until one number is left."""
    while rows.shape[1] > 1:
        a, b = rows.chunk(2, 1)
        rows = a + b
    return rows[:, 0]


def rotate(rows: Tensor) -> Tensor:
    """fp32 [R, n] -> fp32 [R, n]."""
    return butterflies(rows * signs(rows.shape[1], rows.device))
