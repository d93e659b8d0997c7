"""Gradients of the parameters under compression, compared with the exact ones on the same graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..models.replay import gradients, loss_of
from .measures import Sums, sums_of


class ExactPass:
    """A forward pass whose graph is kept, and the exact gradient of its loss.

    To be made where nothing is compressed, and where the model is left undisturbed (models/replay.py).
    """

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self.output = module(*args, **kwargs)
        self.loss = loss_of(self.output)
        self.exact = gradients(self.loss, parameters, again=True)
        self.power = sum(sums.power for sums in sums_of(self.exact, self.exact))  # squares of the exact gradient

    def backward(self) -> list[Sums]:
        """Runs another backward pass through the graph; compares the gradient of each parameter with the exact one."""
        return sums_of(self.exact, gradients(self.loss, self.parameters, again=True))
