"""Reading autograd's graph: which node saves which tensor.

A node is found again by its sequence number: `torch.autograd._get_sequence_nr()` is the next one to be given, so what
is packed now belongs to the node before.  Which of the node's saved tensors it is shows when the node is asked for
them one by one.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from .rules import VIEWS

LEAF = "torch::autograd::AccumulateGrad"
CHECKPOINT, OWN = torch.utils.checkpoint.__file__, os.path.dirname(__file__)
WRAPPERS = (os.path.join("fx", "graph_module.py"), os.path.join("modules", "module.py"))


def operation(node: Any) -> str:
    """ "AddmmBackward0" -> "Addmm"."""
    return re.sub(r"Backward\d*$", "", node.name())


@functools.lru_cache(None)
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(a.removeprefix("_raw_saved_") for a in dir(kind) if a.startswith("_raw_saved_"))


def ask(node: Any, heard: Callable[[], list[Any]]) -> dict[str, Any]:
    """What the hooks have packed for a node, by the names of its saved tensors.

    heard: returns what unpack hooks were called with since the last call.
    """
    found = {}
    heard()
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        node.saved_tensors  # noqa: B018  (asks for all of them)
        return {f"tensor{i}": packed for i, packed in enumerate(heard())}
    for name in _saved_names(type(node)):
        getattr(node, f"_saved_{name}")
        packed = heard()
        if len(packed) == 1:
            found[name] = packed[0]
    return found


def in_checkpoint() -> bool:
    """Whether it is torch.utils.checkpoint that saves a tensor now: an input, which belongs to no node."""
    frame: Any = sys._getframe(2)
    for _ in range(12):  # from the hook, by way of the module that torch.compile may inline
        if frame is None or frame.f_code.co_filename == CHECKPOINT:
            return frame is not None
        name = frame.f_code.co_filename
        if not (name.startswith(("<", OWN)) or name.endswith(WRAPPERS)):
            return False
        frame = frame.f_back
    return False


class Number:
    """A number that an operation saved as a tensor of no dimensions."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def value(self) -> Tensor:
        return self.x


def scalar_factor(node: Any) -> dict[str, Number]:
    """Of `x * 0.5` the number, for which autograd calls no hooks."""
    if node.name() != "MulBackward0" or node.next_functions[1][0] is not None:
        return {}
    raw = node._raw_saved_other
    if hasattr(raw, "unpack_hook"):
        return {} if raw.unpack_hook is not None else {"other": Number(raw.data)}
    try:  # before torch 2.14
        raw.register_hooks(lambda x: x, lambda x: x)
    except RuntimeError:  # there are hooks, so it is none
        return {}
    return {"other": Number(node._saved_other)}


def new_nodes(roots: Iterable[Any], first: int, seen: set[int], users: dict[int, str]) -> list[Any]:
    """The nodes from number `first` on that lead to `roots` and were not seen before, in the order they were made.

    users: gets, by the number of a node, the operation that takes its result, the one that was found first.
    """
    found, todo = [], list(roots)
    while todo:
        node = todo.pop()
        if node is None or node.name() == LEAF:
            continue
        number = node._sequence_nr()
        if number < first or number in seen:
            continue
        seen.add(number)
        found.append((number, node))
        name = users.get(number, "") if node.name() in VIEWS else operation(node)
        for before, _ in node.next_functions:
            if before is not None and before.name() != LEAF:
                users.setdefault(before._sequence_nr(), name)
                todo.append(before)
    return [node for _, node in sorted(found, key=lambda pair: pair[0])]
