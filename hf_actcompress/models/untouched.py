"""A pass through a model that leaves no trace in the model or in the process."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def random_states(model: nn.Module) -> Iterator[None]:
    """The random states of torch on every device, of numpy and of Python are afterwards what they were."""
    numpy = sys.modules.get("numpy")  # not imported only to save its random state
    python, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    generators = [(g, g.get_state()) for m in model.modules() for g in vars(m).values()
                  if isinstance(g, torch.Generator)]  # fmt: skip
    kinds = {p.device.type for p in model.parameters()} - {"cpu", "meta"}
    if torch.cuda.is_initialized():
        kinds.add("cuda")
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in sorted(kinds):
            devices = list(range(torch.get_device_module(kind).device_count()))
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)
            for generator, state in generators:
                generator.set_state(state)


@contextlib.contextmanager
def attributes(model: nn.Module) -> Iterator[None]:
    """What modules remember is afterwards what it was: flags, caches, hooks, submodules that were exchanged, values
    of buffers, and the settings in a config.

    A model may change any of these in its forward pass (BigBird goes over to another attention for short inputs).
    Lists and dictionaries of a module are restored one level deep.
    """
    owners: dict[int, Any] = {}
    for module in model.modules():
        owners[id(module)] = module
        for value in vars(module).values():
            if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)) and not callable(value):
                owners[id(value)] = value  # a config, a cache
    kept = [(owner, dict(vars(owner))) for owner in owners.values()]
    contents = [(value, value.copy()) for _, values in kept for value in values.values()
                if type(value) in (dict, list, set, OrderedDict)]  # fmt: skip
    buffers = [(b, b._version, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for owner, before in kept:
            now = vars(owner)
            if now.keys() != before.keys() or any(now[name] is not before[name] for name in before):
                now.clear()
                now.update(before)
        for value, before in contents:
            if isinstance(value, list):
                value[:] = before
            else:
                value.clear()
                value.update(before)
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; nothing of the model or of the random states changes."""
    with random_states(model), attributes(model), torch.no_grad():
        for module in model.modules():
            # Set directly: eval() may be overridden and have effects of its own (merging LoRA weights).
            module.training = False
        yield
