"""Training the floats of a compressed form while its structure is fixed.

The structure is which values share a codebook entry, which are not zero, which columns span a matrix.  All tensors of
one structure form a linear space.  `Structure.project` finds the nearest tensor of that space, on the tensors' own
device; `Structure.form` is the compressed form of such a tensor.  A projection after each optimizer step trains the
floats (for a codebook this is the "trained quantization" of Han et al., Deep Compression, 2016).  Models and trainers
are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .compressed_form import LEVELS, Coded, Codes, CompressedForm, Dense, Factors, Several, Sparse, Sum, split

SWEEPS = 3  # over the parts of a sum; where they overlap little, each reduces what is left by that share


class Structure:
    """Takes vectors fp32 [N]: several tensors as one."""

    def __init__(self, form: CompressedForm, device: torch.device) -> None:
        self.first, self.device = form, device

    def project(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def form(self, x: Tensor) -> CompressedForm:
        raise NotImplementedError


class _Free(Structure):
    def project(self, x: Tensor) -> Tensor:
        return x

    def form(self, x: Tensor) -> CompressedForm:
        return replace(self.first, flat=x.cpu().clone())  # type: ignore[type-var]


class _Frozen(Structure):
    """A codec's payload: its values stay as they are."""

    def __init__(self, form: CompressedForm, device: torch.device) -> None:
        super().__init__(form, device)
        self.values = torch.cat([v.reshape(-1) for v in form.values()]).to(device)

    def project(self, x: Tensor) -> Tensor:
        return self.values

    def form(self, x: Tensor) -> CompressedForm:
        return self.first


class _Groups(Structure):
    """Values that share one float each: a codebook; with `levels` multiples of a scale."""

    def __init__(self, form: Codes, device: torch.device) -> None:
        super().__init__(form, device)
        self.codes = torch.from_numpy(form.codes).to(device)
        self.levels = torch.tensor(LEVELS[form.levels], device=device) if form.levels in LEVELS else None
        self.counts = torch.bincount(self.codes, minlength=form.table.numel()).clamp_min(1)

    def _floats(self, x: Tensor) -> Tensor:
        sums = torch.bincount(self.codes, weights=x.double(), minlength=len(self.counts))
        if self.levels is None:
            return (sums / self.counts).float()
        squares = (self.counts * self.levels.double().square()).sum().clamp_min(1)
        return ((sums * self.levels).sum() / squares).float().reshape(1)

    def project(self, x: Tensor) -> Tensor:
        floats = self._floats(x)
        return (floats if self.levels is None else self.levels * floats)[self.codes]

    def form(self, x: Tensor) -> CompressedForm:
        return replace(self.first, floats=self._floats(x).cpu())  # type: ignore[type-var]


class _Support(Structure):
    """Values at fixed positions, free or of a codebook; zero elsewhere."""

    def __init__(self, form: Sparse, device: torch.device) -> None:
        super().__init__(form, device)
        self.positions = torch.from_numpy(form.positions).to(device)
        shape = [(len(form.positions),)]
        self.groups = None if form.codes is None else _Groups(Codes(shape, form.codes, form.values_), device)

    def project(self, x: Tensor) -> Tensor:
        kept, out = x[self.positions], torch.zeros_like(x)
        out[self.positions] = kept if self.groups is None else self.groups.project(kept)
        return out

    def form(self, x: Tensor) -> CompressedForm:
        kept = x[self.positions]
        return replace(self.first, values_=(kept if self.groups is None else self.groups._floats(kept)).cpu())  # type: ignore[type-var]


class _Columns(Structure):
    """Matrices whose columns are combinations of the left factor's."""

    def __init__(self, form: Factors, device: torch.device) -> None:
        super().__init__(form, device)
        self.left = form.left.to(device)
        # Factors of little weight would be lost in fp32.
        self.inverse = torch.linalg.pinv(form.left.double()).float().to(device)

    def _right(self, x: Tensor) -> Tensor:
        return self.inverse @ x.view(self.left.shape[0], -1)

    def project(self, x: Tensor) -> Tensor:
        return (self.left @ self._right(x)).view(-1)

    def form(self, x: Tensor) -> CompressedForm:
        return replace(self.first, right=self._right(x).T.contiguous().cpu())  # type: ignore[type-var]


class _Apart(Structure):
    """Each tensor by itself."""

    def __init__(self, form: Several, device: torch.device) -> None:
        super().__init__(form, device)
        self.parts = [structure(part, device) for part in form.parts]
        self.sizes = [sum(math.prod(shape) for shape in part.shapes) for part in form.parts]

    def project(self, x: Tensor) -> Tensor:
        return torch.cat([part.project(v) for part, v in zip(self.parts, x.split(self.sizes), strict=True)])

    def form(self, x: Tensor) -> CompressedForm:
        return Several(tuple(part.form(v) for part, v in zip(self.parts, x.split(self.sizes), strict=True)))


class _Added(Structure):
    """A sum: each part in turn is fitted to what the others leave over.  Values are kept as the next call's start."""

    def __init__(self, form: Sum, device: torch.device) -> None:
        super().__init__(form, device)
        self.parts = [structure(part, device) for part in form.parts]
        self.values = [torch.cat([v.reshape(-1) for v in part.values()]).to(device) for part in form.parts]

    def project(self, x: Tensor) -> Tensor:
        for _ in range(SWEEPS):
            for i, part in enumerate(self.parts):
                self.values[i] = part.project(self._rest(x, i))
        return torch.stack(self.values).sum(0)

    def _rest(self, x: Tensor, i: int) -> Tensor:
        return x - sum((v for j, v in enumerate(self.values) if j != i), torch.zeros_like(x))

    def form(self, x: Tensor) -> CompressedForm:
        self.project(x)
        return Sum(tuple(part.form(self.values[i]) for i, part in enumerate(self.parts)))


_KINDS: list[tuple[type[CompressedForm], type[Any]]] = [
    (Codes, _Groups), (Sparse, _Support), (Factors, _Columns), (Dense, _Free), (Coded, _Frozen), (Several, _Apart),
    (Sum, _Added),
]  # fmt: skip


def structure(form: CompressedForm, device: torch.device) -> Structure:
    return next(made for kind, made in _KINDS if isinstance(form, kind))(form, device)


def project(found: Structure, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The nearest tensors of the structure, fp32, for tensors of any shapes and dtypes."""
    flat = torch.cat([t.detach().reshape(-1).float() for t in tensors])
    return split(found.project(flat), [tuple(t.shape) for t in tensors])
