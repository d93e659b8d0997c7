"""Which saved tensors are weights: parameters, buffers, casts of them, and what is computed of them alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .graph import LEAF, operation
from .rules import VIEWS
from .slots import is_parameter

MOST = 24  # nodes between a weight that is computed and its parameters

# Of what weights are made of parameters: merged adapters, weight, spectral and orthogonal norms, standardised weights.
OPERATIONS = (
    "Abs Add Addmm Addmv Addcmul Bmm Baddbmm Broadcast Cat Clone Diag DiagEmbed Div Dot Einsum Exp Expand Kron "
    "LinalgHouseholderProduct LinalgInvEx LinalgMatrixExp LinalgSolveEx LinalgVectorNorm Linear Matmul Mean Mm Mul Mv "
    "NativeBatchNorm Neg Norm Outer Pow Prod Reciprocal Repeat Rsqrt Rsub Sigmoid Split SplitWithSizes Sqrt Stack Std "
    "StdMean Sub Sum Tanh ToCopy Tril Triu Unbind Var VarMean Vdot WeightNormInterface Where"
).split()
PRODUCTS = "Addmm Addmv Addcmul Baddbmm Bmm Div Dot Linear Matmul Mm Mul Mv Vdot".split()


class Weights:
    """The parameters and buffers of a model, as one pass finds them."""

    def __init__(self, model: nn.Module) -> None:
        parameters, buffers = dict(model.named_parameters()), list(model.buffers())
        self.names = {id(p): name for name, p in parameters.items()}
        self._buffers = {b.untyped_storage()._cdata for b in buffers if type(b) in (Tensor, nn.Parameter)}
        self._dtypes: dict[tuple[int, ...], set[torch.dtype]] = {}
        for t in (*parameters.values(), *buffers):
            self._dtypes.setdefault(tuple(t.shape), set()).add(t.dtype)

    def has(self, x: Tensor) -> bool:
        """Whether `x` is a parameter, a view of one, or lies in a buffer."""
        return is_parameter(x) or x.untyped_storage()._cdata in self._buffers

    def is_cast(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a tensor without a gradient may be a cast of a frozen weight: one of its shape in another dtype.
        In its own dtype it would be the parameter itself."""
        kinds = self._dtypes.get(shape, set()) | self._dtypes.get(shape[::-1], set())
        return bool(kinds) and dtype not in kinds

    def computed(self, node: Any, has_data: Callable[[Any], bool]) -> bool:
        """Whether what `node` computes depends on parameters alone.

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
            if count > MOST or not (name in OPERATIONS or node.name() in VIEWS):
                return False
            if any(before is None for before, _ in node.next_functions):
                # An input without a gradient: a frozen weight, or data.
                shape = tuple(node._input_metadata[0].shape)
                if has_data(node) if name in PRODUCTS else shape not in self._dtypes:
                    return False
            todo += [before for before, _ in node.next_functions if before is not None]
        return True


def weight_of(node: Any) -> nn.Parameter | None:
    """The parameter that an operation multiplies its input with, else any that it takes."""
    found = None
    for before, _ in node.next_functions:
        while before is not None and before.name() in VIEWS:
            before = before.next_functions[0][0]
        if before is not None and before.name() == LEAF and isinstance(before.variable, nn.Parameter):
            if before.variable.dim() > 1:
                return before.variable
            found = before.variable if found is None else found
    return found
