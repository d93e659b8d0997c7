"""Module hooks that compress saved tensors during a forward pass, and tell which module is running."""

from __future__ import annotations

from typing import Any

from torch import nn

from .tensors import SavedTensors


class Hook:
    """Calls a method of the site with a module and its name.

    An object and not a closure, so that it can be copied and pickled with the model.
    """

    def __init__(self, saved: SavedTensors, method: str, name: str) -> None:
        self.saved, self.method, self.name = saved, method, name

    def __call__(self, module: nn.Module, *args: Any) -> None:
        getattr(self.saved, self.method)(module, self.name)


def is_hook(hook: Any) -> bool:
    return isinstance(hook, Hook)


def install(saved: SavedTensors, model: nn.Module) -> list[Any]:
    """Hooks on `model` and on the modules in it; returns their RemovableHandles."""
    removers = []
    for name, module in model.named_modules():
        before, after = ("enter", "leave") if module is model else ("begin", "end")
        removers += [
            module.register_forward_pre_hook(Hook(saved, before, name), prepend=module is model),
            module.register_forward_hook(Hook(saved, after, name), always_call=True),
        ]
    return removers
