"""Reading autograd's graph: which node saves which tensor, and whether a tensor is a weight that was computed.

A node is found again by its sequence number: `torch.autograd._get_sequence_nr()` is the next one to be given, so what
is packed now belongs to the node before.  Which of the node's saved tensors it is shows when the node is asked for
them one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .rules import VIEWS

LEAF = "torch::autograd::AccumulateGrad"
MOST = 24  # nodes between a weight that is computed and its parameters

# Of what weights are made of parameters: merged adapters, weight, spectral and orthogonal norms, standardised weights.
_WEIGHT_OPERATIONS = (
    "Abs Add Addmm Addmv Addcmul Bmm Baddbmm Broadcast Cat Clone Diag DiagEmbed Div Dot Einsum Exp Expand Kron "
    "LinalgHouseholderProduct LinalgInvEx LinalgMatrixExp LinalgSolveEx LinalgVectorNorm Linear Matmul Mean Mm "
    "Mul Mv NativeBatchNorm Neg Norm Outer Pow Prod Reciprocal Repeat Rsqrt Rsub Sigmoid Split SplitWithSizes "
    "Sqrt Stack Std StdMean Sub Sum Tanh ToCopy Tril Triu Unbind Var VarMean Vdot WeightNormInterface Where "
).split()
_PRODUCTS = "Addmm Addmv Addcmul Baddbmm Bmm Div Dot Linear Matmul Mm Mul Mv Vdot".split()


def operation(node: Any) -> str:
    """"AddmmBackward0" -> "Addmm"."""
    return node.name().split("Backward")[0]


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
    try:
        node._raw_saved_other.register_hooks(lambda x: x, lambda x: x)
    except RuntimeError:  # there are hooks, so it is none
        return {}
    return {"other": Number(node._saved_other)}


def new_nodes(roots: Iterable[Any], seen: set[int], users: dict[int, str]) -> list[Any]:
    """The nodes that lead to `roots` and were not seen before, in the order in which they were made.

    users: gets, by the number of a node, the operation that takes its result, the one that was found first.
    """
    found, todo = [], list(roots)
    while todo:
        node = todo.pop()
        if node is None or node.name() == LEAF:
            continue
        number = node._sequence_nr()
        if number in seen:
            continue
        seen.add(number)
        found.append((number, node))
        name = users.get(number, "") if node.name() in VIEWS else operation(node)
        for before, _ in node.next_functions:
            if before is not None and before.name() != LEAF:
                users.setdefault(before._sequence_nr(), name)
                todo.append(before)
    return [node for _, node in sorted(found, key=lambda pair: pair[0])]


def is_parameter(x: Tensor) -> bool:
    """A parameter or a view of one."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def of_parameters(node: Any, shapes: Container[tuple[int, ...]], has_data: Callable[[Any], bool]) -> bool:
    """Whether what `node` computes depends on parameters alone, so that it is a weight.

    shapes: of all parameters and buffers.
    has_data: of a node, whether it saves what is no weight.
    """
    todo, count = [node], 0
    while todo:
        node = todo.pop()
        count += 1
        if node.name() == LEAF:
            if not isinstance(node.variable, nn.Parameter):
                return False
            continue
        name = operation(node)
        if count > MOST or not (name in _WEIGHT_OPERATIONS or f"{name}Backward0" in VIEWS):
            return False
        if any(before is None for before, _ in node.next_functions):
            # An input without a gradient: a frozen weight, or data.
            if name in _PRODUCTS:
                if has_data(node):
                    return False
            elif tuple(node._input_metadata[0].shape) not in shapes:
                return False
        todo += [before for before, _ in node.next_functions if before is not None]
    return True
