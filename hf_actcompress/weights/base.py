"""The base class of compressions of weights: from tensors to the nearest compressed form (a projection).

A compression is a frozen dataclass whose fields are its options.  It takes one or several tensors; a `joint` one
treats them as one long vector.  Models, training and files are not known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .compressed_form import CompressedForm, Several

SWEEPS = 30  # of an alternating minimisation, at most
GAIN = 1e-3  # relative gain below which it ends


class Compression:
    """Subclasses set `name` and implement `_compress` for tensors that belong together."""

    name: ClassVar[str] = ""
    main: ClassVar[str] = ""  # the option that a spec always shows
    joint: bool = False
    needs_mu: bool = False  # whether it weighs a penalty against mu / 2 times the squared error

    def compress(
        self, tensors: Sequence[Tensor], mu: float | None = None, start: CompressedForm | None = None,
        names: Sequence[str] = (),
    ) -> CompressedForm:  # fmt: skip
        """The compressed form nearest to the tensors (any shapes and floating dtypes).

        mu: with a penalty C(Theta), the minimum of C + mu / 2 * squared error is found.
        start: an earlier result, from which alternating minimisations go on.
        names: of the tensors, for errors.
        Raises ValueError for NaN and Inf, and without mu where there is a penalty.
        """
        if self.needs_mu and not mu:
            raise ValueError(f"{self} weighs a penalty against mu/2 times the squared error: give mu > 0.")
        tensors = [t.detach().float() for t in tensors]
        bad = [i for i, t in enumerate(tensors) if not torch.isfinite(t).all()]
        if bad:
            which = ", ".join(names[i] if names else f"tensor {i + 1} of {len(tensors)}" for i in bad)
            raise ValueError(f"{self}: the weights hold NaN or Inf: {which}. Lower the learning rate or mu.")
        if self.joint or len(tensors) == 1:
            return self._compress(tensors, mu, start)
        return Several(tuple(self._compress([t], mu, None) for t in tensors))

    def _compress(self, tensors: list[Tensor], mu: float | None, start: CompressedForm | None) -> CompressedForm:
        raise NotImplementedError

    def __str__(self) -> str:
        """The spec: the name and the options that differ from their defaults, plus `main`."""
        options = [f"{f.name}={str(getattr(self, f.name)).lower()}" for f in dataclasses.fields(self)  # type: ignore
                   if getattr(self, f.name) != f.default or f.name == self.main]  # fmt: skip
        return f"{self.name}:{','.join(options)}" if options else self.name


def flatten(tensors: Sequence[Tensor]) -> Any:
    """fp64 numpy [N]"""
    return torch.cat([t.reshape(-1) for t in tensors]).double().cpu().numpy()


def shapes_of(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


def check(name: str, option: str, value: Any, good: Any, allowed: str) -> None:
    if not good or isinstance(value, bool):
        raise ValueError(f"{name}: {option}={value!r} is not {allowed}.")
