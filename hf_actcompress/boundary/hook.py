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
from ..models.layers import first_tensor, replace_first_tensor
from ..observe.events import Listener
from ..observe.nonfinite import check
from . import operator
from .channel import Candidate, Channel
from .passes import Passes
from .shards import locally


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
        self.name = name
        self.forward = Channel(name, "forward", codec, seed=seed, nonfinite=nonfinite)
        self.backward = Channel(name, "backward", grad_codec.for_gradients(), seed=seed, nonfinite=nonfinite)
        self.evaluate, self.passes = evaluate, passes or Passes()
        self.enabled = True
        self.ran = False  # in the pass that is running
        self.number = operator.numbered(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.number = operator.numbered(self)

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

    # -- the hook; torch.compile traces it -------------------------------------------------------------------------
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.ran = True
        if not self.enabled:
            return None
        recorded = self.passes.recorded()
        if not self.evaluate and not (module.training and recorded):
            return None
        if torch.compiler.is_exporting():
            raise ValueError(f"{self.name}: an exported program holds no compression of this run. Call "
                             "handle.remove(), or export the model within `with handle.disabled():`.")  # fmt: skip
        x = first_tensor(output)
        # A layer may be kept in eval mode inside a model that trains (frozen batch norms).
        trains = recorded and x is not None and (module.training or x.requires_grad)
        if x is None or x.dtype not in FLOAT_DTYPES or x.layout != torch.strided or x.is_nested:
            if x is None or not x.is_nested or trains:
                raise ValueError(self._misfit(output, x))
        return replace_first_tensor(output, locally(lambda own: _Send.apply(own, self.number, self, trains), x))

    def _misfit(self, output: Any, x: Tensor | None) -> str:
        if x is None or not x.is_floating_point():
            found = f"a {type(output).__name__} without a floating point tensor, so there is nothing to compress"
        else:
            kind = "nested tensor" if x.is_nested else "tensor"
            found = f"a {kind} of {x.dtype} in layout {x.layout}, and codecs take dense ones of 16, 32 or 64 bits"
        return (f"{self.name}: the output is {found}. Choose other layers with first, last and layers, or name the "
                "blocks with blocks; where only evaluation has such tensors, evaluate='off' leaves them alone.")

    # -- what happens to a tensor; the operators call it when a compiled graph runs ----------------------------------
    def send(self, x: Tensor, trains: bool) -> Tensor:
        """What arrives of an activation; a new tensor."""
        # Inside a backward pass a forward call is a recomputation; checkpoint itself asks the same question.
        if torch._C._current_graph_task_id() != -1:
            return self.forward.replay(x)
        return self.forward(x, trains)

    def check_finite(self) -> None:
        """With nonfinite="raise": raises for what was found since the last check.  Waits for a GPU."""
        check([channel.found for channel in self.channels.values()])

    def send_back(self, grad: Tensor) -> Tensor:
        """What arrives of a gradient."""
        return self.backward(grad)


class _Send(torch.autograd.Function):
    """The activation on its way; in backward, the gradient on its own.

    In a graph the operators stand for the boundary, and the number for which one it is (operator.py).
    """

    @staticmethod
    def forward(x: Tensor, number: Tensor, boundary: Boundary, trains: bool) -> Tensor:
        if torch.compiler.is_compiling():
            return operator.boundary_forward(x, number, trains)
        return boundary.send(x, trains)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.number, ctx.boundary, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _SendBack.apply(grad, ctx.number, ctx.boundary), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        _refuse_vmap()


class _SendBack(torch.autograd.Function):
    """The gradient on its way; its own derivative takes the rounding for constant, as the activation's does."""

    @staticmethod
    def forward(grad: Tensor, number: Tensor, boundary: Boundary) -> Tensor:
        if torch.compiler.is_compiling():
            return operator.boundary_backward(grad, number)
        return boundary.send_back(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        _refuse_vmap()


def _refuse_vmap() -> None:
    raise ValueError(
        "torch.vmap: a codec takes the tensor of a whole batch, and one sample's values must not depend on how many "
        "are mapped over. Run the samples one by one, or within `with handle.disabled():`."
    )
