"""The simulated boundary: where a pipeline would cut the model, inside one process.

      layer i ──x──▶ [codec.roundtrip] ──y──▶ layer i+1
                      [grad_codec.roundtrip] ◀──g──

The forward value and the gradient that comes back are each replaced by what a receiver would decode; the rounding
itself has no derivative (straight-through).  This file knows codecs and tensors, not models or trainers.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec, CodecState, raw_nbytes
from ..models.layers import first_tensor, replace_first_tensor
from ..observe.meter import Meter, pick
from ..ops.layout import dense
from ..ops.reductions import representable


class Channel:
    """One direction of a boundary: a codec, its state and its meter."""

    def __init__(self, name: str, codec: Codec, seed: int, meter_every: int, nonfinite: str) -> None:
        self.name, self.seed, self.nonfinite = name, seed, nonfinite
        self.meter = Meter(every=meter_every)
        self.set_codec(codec)

    def set_codec(self, codec: Codec) -> None:
        self.codec = codec
        self.state = codec.init_state(self.name, self.seed)
        self._replays: dict[tuple, CodecState] = {}

    def __call__(self, x: Tensor, remember: bool = False, learn: bool = True) -> Tensor:
        """What a receiver would decode of `x`; strides are kept.

        remember: a recomputation of this call may follow (activation checkpointing).
        learn: let the codec's state go on; without it, evaluation leaves training as it was.
        """
        began = time.perf_counter()
        if x.numel() == 0:
            self.meter.count(0, 0, 0.0)
            return x.clone()
        x = dense(x)
        if not representable(x):
            self.meter.nonfinite += 1
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    f"{self.name}: NaN, Inf or a magnitude above 2**48 among the {x.numel()} values of a tensor of "
                    f"shape {tuple(x.shape)}. With nonfinite='pass' it would be passed on uncompressed and counted."
                )
            self.meter.count(raw := raw_nbytes(x.shape, x.dtype), raw, 0.0)
            return x.clone()
        codec, state = (self.codec, self._state_for(x, remember)) if learn else self.codec.for_evaluation(self.state)
        y = roundtrip(codec, x, state)
        seconds = time.perf_counter() - began
        if self.meter.due():
            self.meter.sample(pick(x), pick(y))
        nbytes = codec.sent_nbytes(tuple(x.shape), x.dtype, state)
        self.meter.count(raw_nbytes(x.shape, x.dtype), nbytes, seconds)
        return y

    def replay(self, x: Tensor) -> Tensor:
        """The value of an earlier call again, for a forward pass that activation checkpointing recomputes."""
        x = dense(x)
        state = self._replays.get(_fingerprint(x)) or self.state
        return roundtrip(self.codec, x, None if state is None else state.snapshot(), check=True)

    def _state_for(self, x: Tensor, remember: bool) -> CodecState | None:
        if self.state is not None and remember:
            # A recomputation sees the same input; the state it needs is the one before this call.
            self._replays[_fingerprint(x)] = self.state.snapshot()
            while len(self._replays) > (2 if self.codec.traits.keeps_tensors else 32):
                del self._replays[next(iter(self._replays))]
        return self.state


class Boundary:
    """A forward hook that compresses a layer's output, and its gradient on the way back.

    A plain object with a `__call__`, not a closure, so that the model can be copied and pickled with it.
    """

    def __init__(
        self,
        name: str,
        codec: Codec,
        grad_codec: Codec,
        *,
        seed: int = 0,
        evaluate: bool = True,
        nonfinite: str = "pass",
        meter_every: int = 10,
    ) -> None:
        _hide_from_compiler()
        self.name = name
        self.forward = Channel(f"{name}/forward", codec, seed, meter_every, nonfinite)
        self.backward = Channel(f"{name}/backward", grad_codec.for_gradients(), seed, meter_every, nonfinite)
        self.evaluate = evaluate
        self.enabled = True

    def set_codecs(self, codec: Codec, grad_codec: Codec) -> None:
        """Change codecs between steps; state starts afresh for a codec that differs."""
        if codec != self.forward.codec:
            self.forward.set_codec(codec)
        if (grad_codec := grad_codec.for_gradients()) != self.backward.codec:
            self.backward.set_codec(grad_codec)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _hide_from_compiler()
        self.__dict__.update(state)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.enabled or not (module.training or self.evaluate):
            return None
        x = first_tensor(output)
        if x is None or not x.is_floating_point():
            raise ValueError(
                f"{self.name}: the output is a {type(output).__name__} without a floating point tensor, so there is "
                "nothing to compress. Choose other layers with first, last and layers, or name the blocks with blocks."
            )
        # A layer may be kept in eval mode inside a model that trains (frozen batch norms).
        training = module.training or (x.requires_grad and torch.is_grad_enabled())
        return replace_first_tensor(output, _Compress.apply(x, self, training))


def _hide_from_compiler() -> None:
    """Break the graph at boundaries: codecs keep state and meters on the Python side.

    Done with the first boundary and not by a decorator, because the decorator loads the compiler (a second and more),
    which `import hf_actcompress` should not.
    """
    if not hasattr(Boundary.__call__, "hidden"):
        Boundary.__call__ = torch.compiler.disable(Boundary.__call__)
        Boundary.__call__.hidden = True


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, boundary: Boundary, training: bool) -> Tensor:
        ctx.boundary = boundary
        # Inside a backward pass a forward call is a recomputation; checkpoint itself asks the same question.
        if torch._C._current_graph_task_id() != -1:
            return boundary.forward.replay(x)
        return boundary.forward(x, remember=training, learn=training)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.boundary.backward(grad), None, None


def roundtrip(codec: Codec, x: Tensor, state: CodecState | None, check: bool = False) -> Tensor:
    """codec.roundtrip of a dense tensor, with its strides."""
    return _laid_out_like(x, codec.roundtrip(x, state, check=check))


def _laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    # Convolutions choose their algorithm, and so their last bits, by memory format.
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def _fingerprint(x: Tensor) -> tuple:
    """A key that two different activations of a training run do not share: shape and 64 values."""
    flat = pick(x)
    return (tuple(x.shape), *flat[:: max(1, flat.numel() // 64)].tolist())
