"""Forward and backward passes that are run for a measurement, between the steps of a training run.

They leave gradients, buffers and random numbers as they were.  This file knows no codec, site or trainer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .untouched import random_states

_side = threading.local()


def on_the_side() -> bool:
    """Whether the pass that is running is one for a measurement: hooks that measure ignore it."""
    return getattr(_side, "depth", 0) > 0


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores buffers (statistics of batch norms) and random numbers at the end of the context."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    with random_states(model):
        _side.depth = getattr(_side, "depth", 0) + 1
        try:
            yield
        finally:
            _side.depth -= 1
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def loss_of(output: Any) -> Tensor:
    """The model's own loss: the first scalar of its output.  Without one, the mean product of the outputs with fixed
    random numbers."""
    tensors = [t for t in tree_flatten(dict(output) if isinstance(output, dict) else output)[0]
               if isinstance(t, Tensor) and t.requires_grad]  # fmt: skip
    for t in tensors:
        if t.dim() == 0:
            return t
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(t.shape, generator=generator).to(t.device) for t in tensors]
    return sum((t.float() * d).mean() for t, d in zip(tensors, directions, strict=True))  # type: ignore


def gradients(loss: Tensor, parameters: Sequence[nn.Parameter], again: bool = False) -> list[Tensor | None]:
    """Gradients of the parameters, whose `.grad` stays as it is.  again: keep the graph for another pass.

    Raises ValueError for sharded parameters and reentrant activation checkpointing, which allow no such pass.
    """
    if any(type(p.data).__name__ == "DTensor" for p in parameters):
        raise ValueError(
            "analysis=True and auto compare gradients of whole parameters, and fully_shard or tensor parallelism has "
            "sharded them. Use analysis=False and named codecs there."
        )
    if _reentrant(loss):
        raise ValueError(
            "analysis=True and auto run backward passes of their own, which reentrant activation checkpointing does "
            "not allow. Use activation_checkpointing_kwargs={'use_reentrant': False}, or leave them out."
        )
    return list(torch.autograd.grad(loss, parameters, retain_graph=again, allow_unused=True))


def _reentrant(loss: Tensor) -> bool:
    """Whether part of the graph is made only in the backward pass, where `torch.autograd.grad` would miss it."""
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
    """The first `take` rows of a batch, and the number of all rows divided by that.

    Where another tensor has as many rows by chance ([L, L], a bias, beside L samples), nobody can tell whether its
    rows are samples: the whole batch is taken.
    """
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor) and t.dim()]
    rows = tensors[0].shape[0] if tensors else 1
    if rows <= take or any(t.dim() > 1 and tuple(t.shape[:2]) == (rows, rows) for t in tensors):
        return args, kwargs, 1.0

    def few(value: Any) -> Any:
        return value[:take] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value

    return tree_map(few, args), tree_map(few, kwargs), rows / take


def has_batch_norm(model: nn.Module) -> bool:
    """Whether the rows of a batch depend on each other through batch normalisation."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
