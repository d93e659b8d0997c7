"""One direction of a boundary: a codec, its state, and what a recomputed forward pass needs of it.

This file knows codecs and tensors, not models or trainers.  Who counts or measures is a listener (observe/events.py).
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, CodecState, raw_nbytes
from ..observe.events import Event, Listener
from ..observe.nonfinite import Nonfinite
from ..ops.layout import dense
from ..ops.reductions import strided_sample


class Channel:
    """Replaces a tensor by what a receiver would decode of it.

    layer, direction: of the boundary; they and `seed` decide about random numbers.
    nonfinite: what happens where NaN or Inf is in a tensor, of which its group becomes NaN (codecs/base.py): "pass"
        counts it; "raise" also raises FloatingPointError, at once on a CPU, elsewhere when `found` is checked.
    """

    def __init__(self, layer: str, direction: str, codec: Codec, *, seed: int = 0, nonfinite: str = "pass") -> None:
        self.layer, self.direction, self.seed = layer, direction, seed
        self.found = Nonfinite(self.name, nonfinite == "raise")
        self.listeners: list[Listener] = []
        self.set_codec(codec)

    @property
    def name(self) -> str:
        return f"{self.layer}/{self.direction}"

    def set_codec(self, codec: Codec) -> None:
        """Use another codec from now on, with fresh state."""
        self.codec = codec
        self.state = codec.init_state(self.name, self.seed)
        self._replays = Replays(2 if codec.traits.keeps_tensors else 32)

    def __call__(self, x: Tensor, training: bool = True) -> Tensor:
        """What a receiver would decode of `x`; strides are kept.

        training: the codec's state goes on, and activation checkpointing may compute this call again.  Without it the
            state stays as it is, so that evaluation does not change training.
        """
        began = time.perf_counter()
        if x.numel() == 0:
            y = x.clone()
            self._tell(x, y, 0, 0)
            return y
        x = dense(x)
        if training and self.state is not None:
            # A recomputation sees the same input; the state it needs is the one before this call.
            self._replays.add(x, self.state.snapshot())
        codec, state = (self.codec, self.state) if training else self.codec.for_evaluation(self.state)
        y = roundtrip(codec, x, state, self.found)
        seconds = time.perf_counter() - began
        nbytes = codec.sent_nbytes(tuple(x.shape), x.dtype, state)
        self._tell(x, y, raw_nbytes(x.shape, x.dtype), nbytes, seconds=seconds)
        self.found.check_at_once(x)
        return y

    def replay(self, x: Tensor) -> Tensor:
        """The value of an earlier call again, for a forward pass that activation checkpointing recomputes."""
        x = dense(x)
        state = self._replays.find(x) or self.state
        return roundtrip(self.codec, x, None if state is None else state.snapshot())

    @contextlib.contextmanager
    def isolated(self, *listeners: Listener) -> Iterator[None]:
        """While the context lasts, the channel works on a copy of its state and tells these listeners only."""
        before = self.state, self._replays, self.listeners, self.found
        self.state = None if self.state is None else self.state.snapshot()
        self._replays, self.listeners, self.found = copy.copy(self._replays), list(listeners), Nonfinite(self.name)
        try:
            yield
        finally:
            self.state, self._replays, self.listeners, self.found = before

    def _tell(self, x: Tensor, y: Tensor, raw: int, payload: int, **more: Any) -> None:
        event = Event("boundary", self.layer, self.direction, raw, payload, self.codec, x, lambda: y,
                      nonfinite=self.found, **more)  # fmt: skip
        for listener in self.listeners:
            listener(event)


class Candidate(Channel):
    """A channel for measurements: `codec` starts from fresh state in every call; without one tensors pass exactly.

    So a pass that activation checkpointing recomputes sees the same values.
    """

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel.layer, channel.direction, channel.codec, seed=channel.seed)
        self.codec: Codec | None = None  # type: ignore[assignment]

    def __call__(self, x: Tensor, training: bool = True) -> Tensor:
        if self.codec is None or x.numel() == 0:
            return x.clone()
        x = dense(x)
        y = roundtrip(self.codec, x, self.codec.init_state(self.name, self.seed), self.found)
        shape = tuple(x.shape)
        self._tell(x, y, raw_nbytes(shape, x.dtype), self.codec.payload_nbytes(shape, x.dtype))
        return y

    def replay(self, x: Tensor) -> Tensor:
        return self(x)


class Replays:
    """The states before the last calls, for a forward pass that activation checkpointing recomputes.

    Which call is computed again is told by its input.  On a GPU reading about 64 values would make each step wait, so
    they stay there, and are read only where more than one call of that shape has not been computed again since: with a
    forward and a backward pass in turn there is one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._calls: list[_Call] = []

    def __copy__(self) -> Replays:
        other = Replays(self.limit)
        other._calls = [copy.copy(call) for call in self._calls]
        return other

    def add(self, x: Tensor, state: CodecState) -> None:
        self._calls = [*self._calls, _Call(tuple(x.shape), _sampled(x), state)][-self.limit :]

    def find(self, x: Tensor) -> CodecState | None:
        """The state before the call with this input."""
        calls = [call for call in reversed(self._calls) if call.shape == tuple(x.shape)]
        if x.device.type != "cpu":
            calls = [call for call in calls if call.open] or calls
        found = calls[0] if x.device.type != "cpu" and len(calls) == 1 else _same(calls, x)
        if found is None:
            return None
        found.open = False
        return found.state


@dataclass
class _Call:
    shape: tuple[int, ...]
    sample: Tensor  # of its input
    state: CodecState
    open: bool = True  # not computed again yet


def _same(calls: list[_Call], x: Tensor) -> _Call | None:
    """The one with the input `x`; waits for the device."""
    own = _sampled(x).tolist()
    return next((call for call in calls if call.sample.tolist() == own), None)


def _sampled(x: Tensor) -> Tensor:
    """The bits of about 64 values: two different activations of a training run do not share them."""
    return strided_sample(x.detach(), 64).view(torch.int32).clone()


def roundtrip(codec: Codec, x: Tensor, state: CodecState | None, found: Nonfinite | None = None) -> Tensor:
    """codec.roundtrip of a dense tensor, with its strides."""
    y = codec.roundtrip(x, state, nonfinite=None if found is None else found.on(x.device))
    # Convolutions choose their algorithm, and so their last bits, by memory format.
    y = y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)
    return y.data if y._is_view() else y  # autograd lets nobody change a view in place that a Function returns
