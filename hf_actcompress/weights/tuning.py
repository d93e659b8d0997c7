"""Tensors of one structure: which values share a codebook entry, which stay, which columns span a matrix is settled;
the floats may still change.

With its structure settled a Theta stands for a linear space of tensors.  `Structure.project` finds the nearest tensor
in it, on the tensors' own device, `Structure.theta` the Theta of such a tensor.  Training within the space, every step
followed by a projection, trains the floats themselves ("trained quantization" of Han et al., Deep Compression, 2016,
is the case of a codebook).  Models and trainers are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .compressed_form import LEVELS, Coded, Codes, Dense, Factors, Several, Sparse, Sum, Theta, split

SWEEPS = 3  # over the parts of a sum; where they overlap little, each reduces what is left by that share


class Structure:
    """Vectors fp32 [N], several tensors as one."""

    def __init__(self, theta: Theta, device: torch.device) -> None:
        self.first, self.device = theta, device

    def project(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def theta(self, x: Tensor) -> Theta:
        raise NotImplementedError


class _Free(Structure):
    def project(self, x: Tensor) -> Tensor:
        return x

    def theta(self, x: Tensor) -> Theta:
        return replace(self.first, flat=x.cpu().clone())  # type: ignore[type-var]


class _Frozen(Structure):
    """What a codec left cannot be changed a little."""

    def __init__(self, theta: Theta, device: torch.device) -> None:
        super().__init__(theta, device)
        self.values = torch.cat([v.reshape(-1) for v in theta.values()]).to(device)

    def project(self, x: Tensor) -> Tensor:
        return self.values

    def theta(self, x: Tensor) -> Theta:
        return self.first


class _Groups(Structure):
    """Values that share one float each: a codebook; with `levels` multiples of a scale."""

    def __init__(self, theta: Codes, device: torch.device) -> None:
        super().__init__(theta, device)
        self.codes = torch.from_numpy(theta.codes).to(device)
        self.levels = torch.tensor(LEVELS[theta.levels], device=device) if theta.levels in LEVELS else None
        self.counts = torch.bincount(self.codes, minlength=theta.table.numel()).clamp_min(1)

    def _floats(self, x: Tensor) -> Tensor:
        sums = torch.bincount(self.codes, weights=x.double(), minlength=len(self.counts))
        if self.levels is None:
            return (sums / self.counts).float()
        squares = (self.counts * self.levels.double().square()).sum().clamp_min(1)
        return ((sums * self.levels).sum() / squares).float().reshape(1)

    def project(self, x: Tensor) -> Tensor:
        floats = self._floats(x)
        return (floats if self.levels is None else self.levels * floats)[self.codes]

    def theta(self, x: Tensor) -> Theta:
        return replace(self.first, floats=self._floats(x).cpu())  # type: ignore[type-var]


class _Support(Structure):
    """Zero but for some places, where values are free, or of a codebook."""

    def __init__(self, theta: Sparse, device: torch.device) -> None:
        super().__init__(theta, device)
        self.positions = torch.from_numpy(theta.positions).to(device)
        shape = [(len(theta.positions),)]
        self.groups = None if theta.codes is None else _Groups(Codes(shape, theta.codes, theta.values_), device)

    def project(self, x: Tensor) -> Tensor:
        kept, out = x[self.positions], torch.zeros_like(x)
        out[self.positions] = kept if self.groups is None else self.groups.project(kept)
        return out

    def theta(self, x: Tensor) -> Theta:
        kept = x[self.positions]
        return replace(self.first, values_=(kept if self.groups is None else self.groups._floats(kept)).cpu())  # type: ignore[type-var]


class _Columns(Structure):
    """Matrices whose columns are combinations of the same few."""

    def __init__(self, theta: Factors, device: torch.device) -> None:
        super().__init__(theta, device)
        self.left = theta.left.to(device)
        # Factors of little weight would be lost in fp32.
        self.inverse = torch.linalg.pinv(theta.left.double()).float().to(device)

    def _right(self, x: Tensor) -> Tensor:
        return self.inverse @ x.view(self.left.shape[0], -1)

    def project(self, x: Tensor) -> Tensor:
        return (self.left @ self._right(x)).view(-1)

    def theta(self, x: Tensor) -> Theta:
        return replace(self.first, right=self._right(x).T.contiguous().cpu())  # type: ignore[type-var]


class _Apart(Structure):
    """Each tensor by itself."""

    def __init__(self, theta: Several, device: torch.device) -> None:
        super().__init__(theta, device)
        self.parts = [structure(part, device) for part in theta.parts]
        self.sizes = [sum(math.prod(shape) for shape in part.shapes) for part in theta.parts]

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([part.project(v) for part, v in zip(self.parts, x.split(self.sizes), strict=True)])

    def theta(self, x: Tensor) -> Theta:
        return Several(tuple(part.theta(v) for part, v in zip(self.parts, x.split(self.sizes), strict=True)))


class _Added(Structure):
    """A sum: each part in turn takes what the others leave.  What it starts from is kept between calls."""

    def __init__(self, theta: Sum, device: torch.device) -> None:
        super().__init__(theta, device)
        self.parts = [structure(part, device) for part in theta.parts]
        self.values = [torch.cat([v.reshape(-1) for v in part.values()]).to(device) for part in theta.parts]

    def project(self, x: Tensor) -> Tensor:
        for _ in range(SWEEPS):
            for i, part in enumerate(self.parts):
                self.values[i] = part.project(self._rest(x, i))
        return torch.stack(self.values).sum(0)

    def _rest(self, x: Tensor, i: int) -> Tensor:
        return x - sum((v for j, v in enumerate(self.values) if j != i), torch.zeros_like(x))

    def theta(self, x: Tensor) -> Theta:
        self.project(x)
        return Sum(tuple(part.theta(self.values[i]) for i, part in enumerate(self.parts)))


_KINDS: list[tuple[type[Theta], type[Any]]] = [
    (Codes, _Groups), (Sparse, _Support), (Factors, _Columns), (Dense, _Free), (Coded, _Frozen), (Several, _Apart),
    (Sum, _Added),
]  # fmt: skip


def structure(theta: Theta, device: torch.device) -> Structure:
    return next(made for kind, made in _KINDS if isinstance(theta, kind))(theta, device)


def project(found: Structure, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same of tensors of any shapes and dtypes; fp32."""
    flat = torch.cat([t.detach().reshape(-1).float() for t in tensors])
    return split(found.project(flat), [tuple(t.shape) for t in tensors])
