"""One direction of a boundary: a codec, its state, and what a recomputed forward pass needs of it.

This file knows codecs and tensors, not models or trainers.  Who counts or measures is a listener (observe/events.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, CodecState, raw_nbytes
from ..observe.events import Event, Listener
from ..ops.layout import dense
from ..ops.reductions import representable, strided_sample


class Channel:
    """Replaces a tensor by what a receiver would decode of it.

    layer, direction: of the boundary; they and `seed` decide about random numbers.
    nonfinite: "pass" lets tensors with NaN, Inf or a magnitude above 2**48 through uncompressed; "raise" raises
        FloatingPointError.
    """

    def __init__(self, layer: str, direction: str, codec: Codec, *, seed: int = 0, nonfinite: str = "pass") -> None:
        self.layer, self.direction, self.seed, self.nonfinite = layer, direction, seed, nonfinite
        self.listeners: list[Listener] = []
        self.set_codec(codec)

    @property
    def name(self) -> str:
        return f"{self.layer}/{self.direction}"

    def set_codec(self, codec: Codec) -> None:
        """Use another codec from now on, with fresh state."""
        self.codec = codec
        self.state = codec.init_state(self.name, self.seed)
        self._replays: dict[tuple, CodecState] = {}

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
        if not representable(x):
            return self._pass_on(x)
        codec, state = (self.codec, self._state_for(x)) if training else self.codec.for_evaluation(self.state)
        y = roundtrip(codec, x, state)
        seconds = time.perf_counter() - began
        nbytes = codec.sent_nbytes(tuple(x.shape), x.dtype, state)
        self._tell(x, y, raw_nbytes(x.shape, x.dtype), nbytes, seconds=seconds)
        return y

    def replay(self, x: Tensor) -> Tensor:
        """The value of an earlier call again, for a forward pass that activation checkpointing recomputes."""
        x = dense(x)
        state = self._replays.get(_fingerprint(x)) or self.state
        return roundtrip(self.codec, x, None if state is None else state.snapshot(), check=True)

    @contextlib.contextmanager
    def isolated(self, *listeners: Listener) -> Iterator[None]:
        """While the context lasts, the channel works on a copy of its state and tells these listeners only."""
        before = self.state, self._replays, self.listeners
        self.state = None if self.state is None else self.state.snapshot()
        self._replays, self.listeners = dict(self._replays), list(listeners)
        try:
            yield
        finally:
            self.state, self._replays, self.listeners = before

    def _pass_on(self, x: Tensor) -> Tensor:
        y, raw = x.clone(), raw_nbytes(x.shape, x.dtype)
        self._tell(x, y, raw, raw, nonfinite=True)
        if self.nonfinite == "raise":
            raise FloatingPointError(
                f"{self.name}: NaN, Inf or a magnitude above 2**48 among the {x.numel()} values of a tensor of "
                f"shape {tuple(x.shape)}. With nonfinite='pass' it would be passed on uncompressed and counted."
            )
        return y

    def _tell(self, x: Tensor, y: Tensor, raw: int, payload: int, **more: Any) -> None:
        event = Event("boundary", self.layer, self.direction, raw, payload, self.codec, x, lambda: y, **more)
        for listener in self.listeners:
            listener(event)

    def _state_for(self, x: Tensor) -> CodecState | None:
        if self.state is not None:
            # A recomputation sees the same input; the state it needs is the one before this call.
            self._replays[_fingerprint(x)] = self.state.snapshot()
            while len(self._replays) > (2 if self.codec.traits.keeps_tensors else 32):
                del self._replays[next(iter(self._replays))]
        return self.state


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
        y = roundtrip(self.codec, x, self.codec.init_state(self.name, self.seed), check=True)
        shape = tuple(x.shape)
        self._tell(x, y, raw_nbytes(shape, x.dtype), self.codec.payload_nbytes(shape, x.dtype))
        return y

    def replay(self, x: Tensor) -> Tensor:
        return self(x)


def roundtrip(codec: Codec, x: Tensor, state: CodecState | None, check: bool = False) -> Tensor:
    """codec.roundtrip of a dense tensor, with its strides.  check: x may hold NaN or Inf."""
    y = codec.roundtrip(x, state, check=check)
    # Convolutions choose their algorithm, and so their last bits, by memory format.
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def _fingerprint(x: Tensor) -> tuple:
    """A key that two different activations of a training run do not share: shape and about 64 values."""
    return (tuple(x.shape), *strided_sample(x.detach(), 64).tolist())
