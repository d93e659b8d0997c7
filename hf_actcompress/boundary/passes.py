"""The passes of the whole model: whether one records gradients, and whether every boundary ran in the first."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..observe.nonfinite import Nonfinite, check

logger = logging.getLogger(__name__)


class Passes:
    """A forward pre-hook and forward hook of the whole model.  torch.compile traces it with the model.

    found: what the sites have found of NaN and Inf, which is checked when a pass begins: once a step, so that no site
        waits for a GPU.
    boundaries: by name; each says in `ran` whether the running pass came by.
    patience: training passes after which a boundary that never ran is an error; above 1 for a model that skips layers
        at random.

    Whether gradients are recorded is noted when the pass begins, because reentrant activation checkpointing runs
    layers of a training pass under `torch.no_grad`.
    """

    def __init__(self, boundaries: Mapping[str, Any] | None = None, patience: int = 1) -> None:
        self.found: list[Nonfinite] = []
        self.boundaries = {} if boundaries is None else boundaries
        self.patience = patience
        self._seen: set[str] = set()  # boundaries that ran in some training pass
        self._passes = 0
        self._running: list[bool] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        logger.warning(
            "A copy of a compressed model (made by deepcopy, as for EMA or SWA, or by pickle) is compressed too, with "
            "codec states and counters of its own. hf_actcompress.remove_compression(copy) takes that off."
        )

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        if not output:
            self.begin()
        elif self._running:
            recorded = self._running.pop()
            # After an exception there is no output.
            if recorded and module.training and output[0] is not None:
                self.end()

    def recorded(self) -> bool:
        return torch.is_grad_enabled() or bool(self._running and self._running[-1])

    def begin(self) -> None:
        if not torch.compiler.is_compiling():  # in a graph the channels check
            check(self.found)
        self._running.append(torch.is_grad_enabled())
        for boundary in self.boundaries.values():
            boundary.ran = False

    def end(self) -> None:
        if torch.compiler.is_compiling():
            # Once, when the graph is made.  What changes between passes must not be read here: it would be guarded.
            if self.patience == 1:
                self._require([name for name, boundary in self.boundaries.items() if not boundary.ran])
        elif len(self._seen) < len(self.boundaries):
            self._passes += 1
            self._seen |= {name for name, boundary in self.boundaries.items() if boundary.ran}
            if self._passes >= self.patience:
                self._require([name for name in self.boundaries if name not in self._seen])

    def _require(self, missing: list[str]) -> None:
        if missing:
            ran = [name for name in self.boundaries if name not in missing]
            raise RuntimeError(
                f"The boundaries after {', '.join(missing)} compressed nothing: these modules were not called in a "
                f"training pass. Boundaries that were passed: {', '.join(ran) or 'none'}. The model runs them in "
                "another way (a method of their own, a branch that this batch does not take). Choose other layers "
                "with first, last and layers, or name the modules that run with blocks."
            )
