"""Rows that many others are like are kept once, and those others as differences from them.

In a batch of sentences the first token of all is nearly one and the same row after a layer, and so is the padding.
Coded each for itself they take bits and get an error each; as differences from one prototype they are nearly nothing,
and ops/allocation.py gives their bits to the rest.  Prototypes are chosen from the rows for the bits that they save.
Related: gain-shape and residual vector quantization (Gersho and Gray, 1992).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops.packing import ceil8, pack, packed_nbytes, unpack

MIN_ROWS = 512  # below, three prototypes would weigh more than a twentieth of the payload of 2 bits
MOST = 15
SAMPLE, CANDIDATES = 1024, 64
FLOOR = 0.1  # of the mean energy of a row: what is left of a row below this hardly saves bits any more


def rows(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def applies(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has rows (features last) and enough of them."""
    return len(shape) in (2, 3) and rows(shape) >= MIN_ROWS


def nbytes(shape: tuple[int, ...], count: int) -> int:
    return count * shape[-1] * 2 + packed_nbytes(rows(shape), count.bit_length())


def _spaced(n: int, size: int, device: torch.device) -> Tensor:
    """About `size` of n positions, evenly spaced; the stride is odd, so that no period of the rows aliases."""
    stride = n // size
    return torch.arange(0, n, stride | 1 if stride > 1 else 1, device=device)


def _divided(x: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """Features of comparable size; 0 where one is not finite, so that only its own group is lost."""
    return ((x.float() - mean) / root).nan_to_num_(0.0, 0.0, 0.0)


def find(x: Tensor, mean: Tensor, root: Tensor, count: int) -> Tensor:
    """x [R, F], mean and root of deviation of its features, fp32 [F] -> prototypes less the mean, bf16 [count, F].

    Greedy: each one is the row that lowers the sum of the logarithms of what is left of a sample's rows most, and then
    becomes the mean of the rows that are nearest to it.
    """
    index = _spaced(x.shape[0], SAMPLE, x.device)
    sample = _divided(x[index], mean, root)
    some = _spaced(index.numel(), CANDIDATES, x.device)
    candidates = torch.cat([_divided(x[:1], mean, root), _divided(x[-1:], mean, root), sample[some]])
    energy = sample.square().sum(1)
    left = (energy[:, None] + candidates.square().sum(1) - 2 * sample @ candidates.T).clamp_min(0)
    floor = (FLOOR * energy.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    before, after = torch.log(energy + floor), torch.log(left + floor)
    chosen = []
    for _ in range(count):
        best = (before[:, None] - after).clamp_min(0).sum(0).argmax().view(1)
        before = torch.minimum(before, after.index_select(1, best)[:, 0])
        chosen.append(best)
    index = torch.cat(chosen)
    nearest = torch.cat([energy[:, None], left[:, index]], 1).argmin(1)
    own = (nearest == torch.arange(1, count + 1, device=x.device)[:, None]).float()
    size = own.sum(1, keepdim=True)
    found = torch.where(size > 0, own @ sample / size.clamp_min(1), candidates[index])
    return (found * root).bfloat16()


def subtract(x: Tensor, prototypes: Tensor, mean: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, F] -> fp32 x less the nearest prototype of each row (or nothing), and which one (packed)."""
    weights = prototypes.float() / root.square()
    # |y - p|**2 less |y|**2, for y = x - mean and p = 0 or a prototype, features divided by their root
    offset = (prototypes.float() * weights).sum(1) + 2 * weights @ mean
    distance = offset - 2 * (x.float() @ weights.T)
    index = torch.cat([torch.zeros_like(distance[:, :1]), distance], 1).argmin(1)
    codes = torch.cat([index, index.new_zeros(ceil8(len(index)) - len(index))]).to(torch.uint8)
    return x.float() - _of(prototypes, index), pack(codes, len(prototypes).bit_length())


def add(y: Tensor, prototypes: Tensor, packed: Tensor) -> Tensor:
    """The inverse, in place: fp32 [..., F] -> [R, F]."""
    y = y.view(-1, y.shape[-1])
    index = unpack(packed, len(prototypes).bit_length(), ceil8(len(y)))[: len(y)]
    return y.add_(_of(prototypes, index.long()))


def _of(prototypes: Tensor, index: Tensor) -> Tensor:
    """fp32 [R, F]: the prototype of each row; 0 for number 0, and for what a damaged payload has beyond the last."""
    known = torch.cat([torch.zeros_like(prototypes[:1]), prototypes]).float()
    return known[torch.where(index < len(known), index, 0)]
