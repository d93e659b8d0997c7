"""Error feedback: what a codec lost is added to the next input of that site."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Codec, CodecState, Payload, Traits


class FeedbackState(CodecState):
    """The inner codec's state, and the error of the last call (of the tensor's shape and dtype; None at first)."""

    def __init__(self, inner: CodecState | None) -> None:
        self.inner = inner
        self.error: Tensor | None = None

    def snapshot(self) -> "FeedbackState":
        copy = FeedbackState(None if self.inner is None else self.inner.snapshot())
        copy.error = self.error
        return copy

    def restore(self, other: CodecState) -> None:
        if self.inner is not None:
            self.inner.restore(other.inner)  # type: ignore[attr-defined]
        self.error = other.error  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"error": self.error, "inner": None if self.inner is None else self.inner.state_dict()}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._check_entries(values, ("error", "inner"))
        if self.inner is None:
            self._check_entries(values["inner"] or {}, ())
        else:
            self.inner.load_state_dict(values["inner"] or {})
        self.error = values["error"]


@dataclass(frozen=True)
class Feedback(Codec):
    """`ef+codec`: encodes x + error; the error of that encoding is added to the next x.

    The error is used only by a tensor of the same shape: with batches of changing length (padding to the longest)
    it is dropped whenever the shape changes.  Costs one tensor of memory per site and direction.
    Payload: that of the inner codec.
    Source: Seide et al., 2014; Karimireddy et al., "Error feedback fixes SignSGD", 2019.
    """

    inner: Codec
    name: ClassVar[str] = "ef"

    def __post_init__(self) -> None:
        if isinstance(self.inner, Feedback):
            raise ValueError(f"ef+{self.inner}: error feedback is applied once; write {self.inner}.")
        if self.inner.traits.per_sample:
            raise ValueError(f"ef+{self.inner}: delta makes up for errors by itself; write {self.inner}.")

    def __str__(self) -> str:
        return f"ef+{self.inner}"

    @functools.cached_property
    def traits(self) -> Traits:
        inner = self.inner.traits
        reason = f"error feedback would add what one saved tensor lost to another one. Use {str(self.inner)!r}."
        return dataclasses.replace(inner, stateful=True, keeps_tensors=True, unfit={**inner.unfit, "saved": reason})

    def for_evaluation(self, state: CodecState | None) -> tuple[Codec, CodecState | None]:
        """The error of a training batch is none of evaluation's data."""
        return self.inner.for_evaluation(getattr(state, "inner", None))

    def with_bits(self, bits: int) -> Codec:
        return Feedback(self.inner.with_bits(bits))

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return FeedbackState(self.inner.init_state(site, seed))

    def _corrected(self, x: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState | None]:
        if not isinstance(state, FeedbackState):
            return x, None
        if state.error is not None and state.error.shape == x.shape:
            corrected = x + state.error.to(x.device, x.dtype)
            # An overflow by the correction must not lose a finite value.
            return torch.where(corrected.isfinite(), corrected, x), state.inner
        return x, state.inner

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        corrected, inner = self._corrected(x, state)
        payload = self.inner.encode(corrected, inner)
        if isinstance(state, FeedbackState):
            state.error = _lost(corrected, self.inner.decode(payload))
        return payload

    def _decode(self, payload: Payload) -> Tensor:
        return self.inner.decode(payload)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        corrected, inner = self._corrected(x, state)
        y = self.inner.roundtrip(corrected, inner)
        if isinstance(state, FeedbackState):
            state.error = _lost(corrected, y)
        return y

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return self.inner.payload_nbytes(shape, dtype)


def _lost(x: Tensor, y: Tensor) -> Tensor:
    """x - y; nothing where that is not finite, so that the next tensor is as finite as it was."""
    return (x - y).nan_to_num_(0.0, 0.0, 0.0)
