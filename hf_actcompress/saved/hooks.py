"""Module hooks that compress saved tensors during a forward pass, and tell which module is running.

They are objects, not closures, so that they can be copied and pickled with the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .tensors import SavedTensors


class Enter:
    def __init__(self, saved: SavedTensors) -> None:
        self.saved = saved

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.saved.enter(module)


class Leave:
    def __init__(self, saved: SavedTensors) -> None:
        self.saved = saved

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.saved.leave()


class Begin:
    """Tells which module saves the tensors that are packed from now on."""

    def __init__(self, saved: SavedTensors, name: str) -> None:
        self.saved, self.name = saved, name

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.saved.begin(self.name, module)


class End:
    def __init__(self, saved: SavedTensors) -> None:
        self.saved = saved

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.saved.end(module)


def is_hook(hook: Any) -> bool:
    return isinstance(hook, (Enter, Leave, Begin, End))


def install(saved: SavedTensors, model: nn.Module) -> Iterable[Any]:
    """Hooks on `model` and on the modules in it; returns their RemovableHandles."""
    removers = [
        model.register_forward_pre_hook(Enter(saved), prepend=True),
        model.register_forward_hook(Leave(saved), always_call=True),
    ]
    for name, module in model.named_modules():
        if module is not model:
            removers.append(module.register_forward_pre_hook(Begin(saved, name)))
            removers.append(module.register_forward_hook(End(saved), always_call=True))
    return removers
