"""When an automatic choice is made: on the first training batch, and now and then afterwards.

Deterministic: batches, weights and seeds decide, no clock does.  Processes of a distributed run each decide for
themselves, by their own batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models.replay import on_the_side


class Tuner:
    """A forward pre-hook of the whole model; subclasses say what is measured and chosen.

    handle: the Handle of the model.
    """

    every: int  # passes between measurements
    early: tuple[int, ...] = ()  # further passes at which to measure

    def __init__(self, handle: Any) -> None:
        self.handle, self.passes = handle, 0

    def __getstate__(self) -> dict[str, Any]:
        return {"handle": None}  # a copy of the model keeps what was chosen

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.handle is None or on_the_side() or not torch.is_grad_enabled() or not self.applies(module):
            return
        due = self.passes % self.every == 0 or self.passes in self.early
        if not due or self.measure(module, args, kwargs):
            self.passes += 1  # else the next batch may do

    def applies(self, module: nn.Module) -> bool:
        """Whether a pass with gradients counts."""
        raise NotImplementedError

    def measure(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Measures and chooses; False where NaN or Inf makes that impossible."""
        raise NotImplementedError
