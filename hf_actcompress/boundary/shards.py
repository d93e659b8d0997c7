"""Tensors that are made of tensors: each part is sent by itself.

A DTensor's shard is what its process would send to the next stage; the tensors inside a nested one have no common
shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def locally(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), where x may be a DTensor or a nested tensor, and so is the result.  Gradients flow back in the same
    way."""
    if x.is_nested:
        return _of_nested(run, x)
    if hasattr(x, "placements"):
        return _of_shards(run, x)
    return run(x)


def _of_nested(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if x.layout == torch.jagged:
        # With the same offsets, it has the same symbolic length as the tensors it is added to.
        return torch.nested.nested_tensor_from_jagged(run(x.values()), offsets=x.offsets(), lengths=x.lengths())
    return torch.nested.as_nested_tensor([run(part) for part in x.unbind()])


def _of_shards(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    if any(placement.is_partial() for placement in x.placements):
        # What is still to be summed over processes is no activation yet.
        x = x.redistribute(placements=[Replicate() if place.is_partial() else place for place in x.placements])
    y = run(x.to_local())
    return DTensor.from_local(y, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())
