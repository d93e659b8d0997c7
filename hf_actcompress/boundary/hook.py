"""The simulated boundary: where a pipeline would cut the model, inside one process.

      layer i ──x──▶ [codec.roundtrip] ──y──▶ layer i+1
                      [grad_codec.roundtrip] ◀──g──

The forward value and the gradient that comes back are each replaced by what a receiver would decode; the rounding
itself has no derivative (straight-through).  This file knows channels and modules, not trainers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec
from ..codecs.payload import FLOAT_DTYPES
from ..models.hooks import outside_of_graphs
from ..models.layers import first_tensor, replace_first_tensor
from ..observe.events import Listener
from ..observe.nonfinite import Nonfinite, check
from .channel import Candidate, Channel


class Passes:
    """A forward pre-hook and forward hook of the whole model: whether the pass that is running records gradients.

    found: what the sites have found of NaN and Inf, which is checked when a pass begins: once a step, so that no site
        waits for a GPU.
    It is noted when the pass begins, because reentrant activation checkpointing runs layers of a training pass under
    `torch.no_grad`.
    """

    def __init__(self) -> None:
        self.found: list[Nonfinite] = []
        self._running: list[bool] = []

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        if not output:
            check(self.found)
            self._running.append(torch.is_grad_enabled())
        elif self._running:
            self._running.pop()

    def recorded(self) -> bool:
        return torch.is_grad_enabled() or bool(self._running and self._running[-1])


class Boundary:
    """A forward hook that compresses a layer's output, and its gradient on the way back.

    A plain object with a `__call__`, not a closure, so that the model can be copied and pickled with it.

    evaluate: whether evaluation is compressed too.  Training is a pass that records gradients, through a layer in
        training mode: `generate`, or anything else under `torch.no_grad`, is evaluation in any mode.
    passes: what tells whether the running pass of the whole model records gradients.
    """

    def __init__(
        self, name: str, codec: Codec, grad_codec: Codec, *, seed: int = 0, evaluate: bool = True,
        nonfinite: str = "pass", passes: Passes | None = None,
    ) -> None:  # fmt: skip
        outside_of_graphs(Boundary)  # codecs keep state on the Python side
        self.name = name
        self.forward = Channel(name, "forward", codec, seed=seed, nonfinite=nonfinite)
        self.backward = Channel(name, "backward", grad_codec.for_gradients(), seed=seed, nonfinite=nonfinite)
        self.evaluate, self.passes = evaluate, passes or Passes()
        self.enabled = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        outside_of_graphs(Boundary)
        self.__dict__.update(state)

    @property
    def channels(self) -> dict[str, Channel]:
        return {"forward": self.forward, "backward": self.backward}

    def set_codecs(self, codec: Codec, grad_codec: Codec) -> None:
        """Change codecs between steps; state starts afresh for a codec that differs."""
        if codec != self.forward.codec:
            self.forward.set_codec(codec)
        if (grad_codec := grad_codec.for_gradients()) != self.backward.codec:
            self.backward.set_codec(grad_codec)

    @contextlib.contextmanager
    def isolated(self, *listeners: Listener) -> Iterator[None]:
        """While the context lasts, both channels work on copies of their states and tell these listeners only."""
        with self.forward.isolated(*listeners), self.backward.isolated(*listeners):
            yield

    @contextlib.contextmanager
    def candidates(self, *listeners: Listener) -> Iterator[dict[str, Candidate]]:
        """While the context lasts, the codec of each direction is what the caller sets; at first there is none."""
        before = self.forward, self.backward, self.enabled
        self.forward, self.backward, self.enabled = Candidate(self.forward), Candidate(self.backward), True
        self.forward.listeners, self.backward.listeners = list(listeners), list(listeners)
        try:
            yield self.channels  # type: ignore[misc]
        finally:
            self.forward, self.backward, self.enabled = before

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.enabled:
            return None
        recorded = self.passes.recorded()
        if not self.evaluate and not (module.training and recorded):
            return None
        x = first_tensor(output)
        if x is None or x.dtype not in FLOAT_DTYPES or x.layout != torch.strided or x.is_nested:
            raise ValueError(self._misfit(output, x))
        # A layer may be kept in eval mode inside a model that trains (frozen batch norms).
        trains = recorded and (module.training or x.requires_grad)
        return replace_first_tensor(output, _Compress.apply(x, self, trains))

    def _misfit(self, output: Any, x: Tensor | None) -> str:
        if x is None or not x.is_floating_point():
            found = f"a {type(output).__name__} without a floating point tensor, so there is nothing to compress"
        else:
            kind = "nested tensor" if x.is_nested else "tensor"
            found = f"a {kind} of {x.dtype} in layout {x.layout}, and codecs take dense ones of 16, 32 or 64 bits"
        return (f"{self.name}: the output is {found}. Choose other layers with first, last and layers, or name the "
                "blocks with blocks; where only evaluation has such tensors, evaluate='off' leaves them alone.")


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, boundary: Boundary, trains: bool) -> Tensor:
        ctx.boundary = boundary
        # Inside a backward pass a forward call is a recomputation; checkpoint itself asks the same question.
        if torch._C._current_graph_task_id() != -1:
            return boundary.forward.replay(x)
        return boundary.forward(x, trains)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.boundary.backward(grad), None, None
