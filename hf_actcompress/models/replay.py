"""Forward and backward passes on the side, in the middle of a training run, that leave no trace in it.

A leaf module: it knows torch's modules and random numbers, no codec, site or trainer.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

_side = threading.local()


def on_the_side() -> bool:
    """Whether the pass that is running is none of the training run's own: hooks that measure leave it alone."""
    return getattr(_side, "depth", 0) > 0


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers (statistics of batch norms) and random numbers are afterwards what they were."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [] if device.type in ("cpu", "meta") else [device]
    numpy = sys.modules.get("numpy")  # what is not loaded has drawn nothing
    python, arrays = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        _side.depth = getattr(_side, "depth", 0) + 1
        try:
            yield
        finally:
            _side.depth -= 1
            random.setstate(python)
            if numpy:
                numpy.random.set_state(arrays)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or else its outputs in a random direction, always the same one."""
    tensors = [t for t in tree_flatten(dict(output) if isinstance(output, dict) else output)[0]
               if isinstance(t, Tensor) and t.requires_grad]  # fmt: skip
    for t in tensors:
        if t.dim() == 0:
            return t
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(t.shape, generator=generator).to(t.device) for t in tensors]
    return sum((t.float() * d).mean() for t, d in zip(tensors, directions, strict=True))  # type: ignore


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter], again: bool = False) -> list[Tensor | None]:
    """Of the parameters, whose `.grad` stays as it is.  again: the graph is needed once more.

    Raises ValueError for sharded parameters and reentrant activation checkpointing, which allow no such pass.
    """
    if any(type(p.data).__name__ == "DTensor" for p in parameters):
        raise ValueError(
            "Gradients of whole parameters are compared here, and fully_shard or tensor parallelism has cut them. "
            "Leave analysis and auto out there: analysis=False, and fixed codecs."
        )
    if _reentrant(loss):
        raise ValueError(
            "Reentrant activation checkpointing allows no backward pass on the side, which analysis and auto need. "
            "Use activation_checkpointing_kwargs={'use_reentrant': False}, or leave them out."
        )
    return list(torch.autograd.grad(loss, parameters, retain_graph=again, allow_unused=True))


def _reentrant(loss: Tensor) -> bool:
    """Whether part of the graph is made only in the backward pass: `grad` would leave that out without a word."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
    return False


def few_rows(args: tuple, kwargs: dict[str, Any], take: int) -> tuple[tuple, dict[str, Any], float]:
    """The first `take` rows of a batch, and how many times as many there were."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.dim()]
    rows = tensors[0].shape[0] if tensors else 1
    if rows <= take:
        return args, kwargs, 1.0

    def few(value: Any) -> Any:
        return value[:take] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value

    return tree_map(few, args), tree_map(few, kwargs), rows / take


def normed(model: nn.Module) -> bool:
    """Whether rows of a batch depend on each other through batch normalisation."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
