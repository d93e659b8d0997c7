"""One traced forward pass of a model: which modules run, in which order, and what they return.

This file knows no layer numbers.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .inputs import guesses
from .untouched import untouched

logger = logging.getLogger(__name__)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The hidden state that a module's output carries: the tensor itself, `last_hidden_state`, or else the first
    floating tensor of a tuple, list, mapping (ModelOutput is one) or dataclass, those inside it last.  None if there
    is none."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("last_hidden_state"), torch.Tensor):
        return output["last_hidden_state"]
    values = [value for _, value in _items(output)]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value
    for value in values:
        if not isinstance(value, torch.Tensor) and (found := first_tensor(value)) is not None:
            return found if found.is_floating_point() else None
    return None


def replace_first_tensor(output: Any, new: torch.Tensor) -> Any:
    """A copy of `output`, of the same type, in which the tensor that `first_tensor` returns is `new`, wherever it
    occurs: as `last_hidden_state` and as the last of `hidden_states`."""
    old = first_tensor(output)
    if old is None:
        raise ValueError(f"an output of type {type(output).__name__} carries no floating tensor to replace; "
                         f"leave this module out")
    return _replaced(output, old, new)


def _replaced(output: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if output is old:
        return new
    pairs = _items(output)
    changed = [(key, _replaced(value, old, new)) for key, value in pairs]
    if all(now is before for (_, now), (_, before) in zip(changed, pairs, strict=True)):
        return output
    if isinstance(output, tuple):
        items = [value for _, value in changed]
        return output._make(items) if hasattr(output, "_make") else type(output)(items)
    result = copy.copy(output)
    for key, value in changed:
        if isinstance(output, (list, Mapping)):
            result[key] = value  # ModelOutput's own __setitem__ keeps attribute and item the same
        else:
            object.__setattr__(result, key, value)  # a frozen dataclass, too
    return result


def _items(output: Any) -> list[tuple[Any, Any]]:
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, (tuple, list)):
        return list(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return []


def inside(path: str, ancestor: str) -> bool:
    return not ancestor or path.startswith(ancestor + ".")


@dataclass
class Run:
    events: list[str] = field(default_factory=list)  # module paths in the order in which their calls ended
    calls: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, tuple] = field(default_factory=dict)  # path -> (shape, dtype, type name), last call
    # module -> the modules inside it whose output it returned, untouched or as a view
    handed_on: dict[str, set[str]] = field(default_factory=dict)


def trace_or_none(model: nn.Module, modules: dict, example_inputs: Any) -> Run | None:
    failure = None
    if _is_sharded(model):
        failure = "its parameters are sharded, and a pass would gather them"
    else:
        for inputs in guesses(model) if example_inputs is None else [example_inputs]:
            try:
                return _trace(model, modules, inputs)
            except Exception as error:  # noqa: BLE001 - a guess can fail in any way; the first reason is logged
                failure = failure or f"{type(error).__name__}: {error}"
    logger.warning("the layers of %s are in registration order, untraced, so the order may be wrong (%s); pass "
                   "example_inputs= that its forward accepts", type(model).__name__,
                   failure or "no input could be made up for it")  # fmt: skip
    return None


def _is_sharded(model: nn.Module) -> bool:
    return any(c.__name__ == "FSDPModule" for m in model.modules() for c in type(m).__mro__)


def _trace(model: nn.Module, modules: dict[str, nn.Module], inputs: Any) -> Run:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    with untouched(model), recording(modules) as run:
        if isinstance(inputs, Mapping):
            model(**{key: move(value) for key, value in inputs.items()})
        else:
            model(*[move(x) for x in (inputs if isinstance(inputs, (tuple, list)) else [inputs])])
    return run


@contextlib.contextmanager
def recording(modules: dict[str, nn.Module]) -> Iterator[Run]:
    """While the context lasts, what runs is noted."""
    recorder = Recorder()
    handles = [module.register_forward_hook(recorder.hook(path)) for path, module in modules.items()]
    try:
        yield recorder.run
    finally:
        for handle in handles:
            handle.remove()


class Recorder:
    """Forward hooks that note what runs."""

    def __init__(self) -> None:
        self.run = Run()
        # Calls that ended and whose parent has not: path, output, its version, the paths whose output it is.
        self._ended: list[tuple[str, torch.Tensor, int, set[str]]] = []

    def hook(self, path: str) -> Callable[..., None]:
        return functools.partial(self.note, path)

    def note(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        run, tensor = self.run, first_tensor(output)
        run.events.append(path)
        run.calls[path] = run.calls.get(path, 0) + 1
        shape, dtype = (None, None) if tensor is None else (tuple(tensor.shape), tensor.dtype)
        run.outputs[path] = (shape, dtype, type(output).__name__)
        same: set[str] = set()
        while self._ended and inside(self._ended[-1][0], path):
            inner, kept, version, more = self._ended.pop()
            # The version tells a tensor that is returned unchanged from one that is changed in place (`out += x`).
            if tensor is not None and _shares(kept, tensor) and version == tensor._version:
                same |= {inner, *more}
        # In each of its calls: a block without a residual hands on what is inside it in some places and not in others.
        run.handed_on[path] = run.handed_on.get(path, same) & same
        if tensor is not None:
            self._ended.append((path, tensor, tensor._version, same))


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    plain = type(one) is torch.Tensor is type(other) and one.layout == other.layout == torch.strided
    return plain and one.untyped_storage()._cdata == other.untyped_storage()._cdata
