"""The operators that torch.compile sees in place of a boundary: one node for each direction.

A graph must not hold what happens in Python when a tensor is compressed (codec states, meters, listeners), so it holds
the *number* of the boundary, in a tensor: the same graph then serves every layer, and can be cached.  When the graph
runs, the operator looks the boundary up and does what eager mode does.  This file does not know what a boundary is.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from ..ops.library import operator

_boundaries: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def numbered(boundary: Any) -> Tensor:
    """A new number for the boundary, int64 [] on the CPU: reading it waits for no device."""
    number = next(_numbers)
    _boundaries[number] = boundary
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def _of(number: Tensor) -> Any:
    found = _boundaries.get(int(number))
    if found is None:
        raise RuntimeError(
            "A compiled graph belongs to a compression that no longer exists: the handle was removed between the "
            "forward and the backward pass. Call backward() before handle.remove()."
        )
    return found


def _forward(x: Tensor, number: Tensor, trains: bool) -> Tensor:
    boundary = _of(number)
    boundary.check_finite()  # of the last step; in eager mode it is done when a pass of the model begins
    return _as_traced(boundary.send(x, trains), x)


def _backward(grad: Tensor, number: Tensor) -> Tensor:
    return _as_traced(_of(number).send_back(grad), grad)


def _as_traced(y: Tensor, x: Tensor) -> Tensor:
    """With the strides that the graph was compiled for."""
    expected = torch.empty_like(x, device="meta").stride()
    return y if y.stride() == expected else torch.empty_like(x).copy_(y)


def _fake(x: Tensor, *more: Any) -> Tensor:
    return torch.empty_like(x)


# Listeners run in Python, which a CUDA graph would not run again.
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_exact_strides)

boundary_forward = operator("boundary_forward(Tensor x, Tensor number, bool trains) -> Tensor", _forward, _fake,
                            tags=_TAGS)  # fmt: skip
boundary_backward = operator("boundary_backward(Tensor grad, Tensor number) -> Tensor", _backward, _fake, tags=_TAGS)
