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

from ...ops.rotation import RUN, butterflies
from ...ops.rows import apply

LARGEST = 1024
BUTTERFLIES = 256


def random_sign(i: int) -> float:
    """+1 or -1 from a hash of the position: the same on every machine and in every version of torch."""
    h = (i + 1) * 0x9E3779B9 & 0xFFFFFFFF
    h = (h ^ (h >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    h = (h ^ (h >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return 1.0 if (h >> 16) & 1 else -1.0


def _sylvester(n: int) -> Tensor:
    """fp32 [n, n] of +1 and -1."""
    h = torch.ones(1, 1, dtype=torch.float32, device="cpu")  # whatever the defaults are: what is made of it is cached
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


@functools.cache
def signs(n: int, device: torch.device) -> Tensor:
    """fp32 [n]"""
    return torch.tensor([random_sign(i) for i in range(n)], dtype=torch.float32, device="cpu").to(device)


@functools.cache
def rotation_matrix(n: int, device: torch.device) -> Tensor:
    """fp32 [n, n], orthogonal: diag(signs) times Sylvester's matrix over sqrt(n)."""
    return (signs(n, torch.device("cpu"))[:, None] * _sylvester(n) / n**0.5).to(device)


@functools.cache
def inverse_matrix(n: int, device: torch.device) -> Tensor:
    """Its transpose, laid out in rows: a product with a transposed view takes longer."""
    return rotation_matrix(n, device).T.contiguous()


@functools.cache
def _small_matrix(n: int, device: torch.device) -> Tensor:
    """Sylvester's [RUN, RUN] with the norm of the whole transform of n."""
    return (_sylvester(RUN) / n**0.5).to(device)


def in_runs(n: int) -> bool:
    """Whether a rotation of n is a product over runs of 16 and butterflies between them."""
    return RUN < n <= BUTTERFLIES


def rotate_runs(rows: Tensor, signed: bool) -> Tensor:
    """The first half of such a rotation, with the signs, or of its inverse, without: fp32 [..., n]."""
    n = rows.shape[-1]
    signed_rows = (rows * signs(n, rows.device) if signed else rows).reshape(-1, RUN)
    return torch.mm(signed_rows, _small_matrix(n, rows.device)).view(rows.shape)


def rotate(rows: Tensor) -> Tensor:
    """fp32 [R, n] -> fp32 [R, n].

    Sylvester's matrix is a Kronecker product.  Up to BUTTERFLIES a product over runs of 16 is followed by additions
    between runs, up to LARGEST one product does it; a longer row is cut into LARGEST-long runs, which are
    rotated first by themselves and then against each other.
    """
    n = rows.shape[1]
    if in_runs(n):
        return apply(butterflies, rotate_runs(rows, True)[:, None], shared=[None])[0][:, 0]
    if n <= LARGEST:
        return rows @ rotation_matrix(n, rows.device)
    inner = rows.reshape(-1, LARGEST) @ rotation_matrix(LARGEST, rows.device)
    across = inner.view(-1, n // LARGEST, LARGEST).transpose(1, 2).reshape(-1, n // LARGEST)
    return rotate(across).view(-1, LARGEST, n // LARGEST).transpose(1, 2).reshape(-1, n)


def rotate_back(rows: Tensor) -> Tensor:
    """The inverse of `rotate`."""
    n = rows.shape[1]
    if in_runs(n):
        return apply(butterflies, rotate_runs(rows, False)[:, None], shared=[signs(n, rows.device)])[0][:, 0]
    if n <= LARGEST:
        return rows @ inverse_matrix(n, rows.device)
    across = rotate_back(rows.view(-1, n // LARGEST, LARGEST).transpose(1, 2).reshape(-1, n // LARGEST))
    inner = across.view(-1, LARGEST, n // LARGEST).transpose(1, 2).reshape(-1, LARGEST)
    return (inner @ inverse_matrix(LARGEST, rows.device)).view(-1, n)
