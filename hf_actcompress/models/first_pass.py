"""The first real batch as the trace, for a model that accepts none of the inputs that were made up.

No pass is run for it: hooks note what runs while the model is trained or used, and are gone after one whole pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .tracing import Recorder, Run


class FirstPass:
    """Calls `done` with what ran, once, at the end of the first forward pass that does not fail.

    In a compiled graph nothing is noted.
    """

    def __init__(self, model: nn.Module, done: Callable[[Run], None]) -> None:
        self.done = done
        self._recorder: Recorder | None = None
        self._hooks = [model.register_forward_pre_hook(self._begin)]
        # After the boundaries: what a stage hands on is what they made of its last block's output.
        self._hooks += [module.register_forward_hook(_Note(self, path))
                        for path, module in model.named_modules() if path]  # fmt: skip
        # Before the check that every boundary has run: it may be why one moves.
        self._hooks.append(model.register_forward_hook(self._end, prepend=True))

    def remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._recorder = None

    def note(self, path: str, output: Any) -> None:
        if self._recorder is not None:
            self._recorder.note(path, None, None, output)

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._recorder = Recorder()

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._recorder is not None:
            self.note("", output)
            run = self._recorder.run
            self.remove()
            self.done(run)


class _Note:
    """A forward hook of one module."""

    def __init__(self, first: FirstPass, path: str) -> None:
        self.first, self.path = first, path

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.first.note(self.path, output)
