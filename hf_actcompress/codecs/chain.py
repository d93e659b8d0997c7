"""Chains: the second codec compresses the floats that the first one leaves."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, CodecState, LeafShapes, Payload, Traits


class ChainState(CodecState):
    """The state of the first codec, and one of the second for each tensor it compresses."""

    def __init__(self, states: dict[str, CodecState | None]) -> None:
        self.states = states

    def snapshot(self) -> "ChainState":
        return ChainState({k: None if s is None else s.snapshot() for k, s in self.states.items()})

    def restore(self, other: CodecState) -> None:
        for name, state in self.states.items():
            if state is not None:
                state.restore(other.states[name])  # type: ignore[attr-defined]

    def state_dict(self) -> dict:
        return {k: s.state_dict() for k, s in self.states.items() if s is not None}

    def load_state_dict(self, values: dict) -> None:
        states = {name: state for name, state in self.states.items() if state is not None}
        self._check_entries(values, states)
        for name, state in states.items():
            state.load_state_dict(values[name])


@dataclass(frozen=True)
class Chain(Codec):
    """`first|second`: top-k values then quantized, low-rank factors then quantized.

    Payload: what `first` keeps besides its leaves (positions), and the payloads of `second` for the leaves.
    Raises ValueError if `first` leaves nothing to compress (a quantizer leaves integers).
    """

    first: Codec
    second: Codec
    name: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        if not self.first.leaves:
            raise ValueError(
                f"{self.first}|{self.second}: {self.first.name} leaves only integer codes, so nothing is left for "
                f"{self.second.name} to compress. Chains start with topk, lowrank or identity."
            )
        if self.second.traits.per_sample:
            raise ValueError(f"{self.first}|{self.second}: delta goes around the chain: write delta+{self.first}|...")

    def __str__(self) -> str:
        return f"{self.first}|{self.second}"

    @functools.cached_property
    def traits(self) -> Traits:
        one, two = self.first.traits, self.second.traits
        return Traits(
            stateful=one.stateful or two.stateful, stochastic=one.stochastic or two.stochastic,
            keeps_tensors=one.keeps_tensors or two.keeps_tensors, bits=two.bits, unfit={**one.unfit, **two.unfit},
        )  # fmt: skip

    def for_evaluation(self, state: CodecState | None) -> tuple[Codec, CodecState | None]:
        states = state.states if isinstance(state, ChainState) else {}
        first, own = self.first.for_evaluation(states.get("first"))
        second = self.second.for_evaluation(None)[0]
        found = {leaf: self.second.for_evaluation(states.get(leaf))[1] for leaf in self.first.leaves}
        return Chain(first, second), ChainState({"first": own, **found}) if states else None

    def with_bits(self, bits: int) -> Codec:
        return Chain(self.first, self.second.with_bits(bits))

    @property
    def leaves(self) -> tuple[str, ...]:  # type: ignore[override]
        return ()

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        states = {"first": self.first.init_state(site, seed)}
        for leaf in self.first.leaves:
            states[leaf] = self.second.init_state(f"{site}/{leaf}", seed)
        return ChainState(states) if any(s is not None for s in states.values()) else None

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        states = state.states if isinstance(state, ChainState) else {}
        inner = self.first.encode(x, states.get("first"))
        parts = {leaf: self.second.encode(inner.tensors[leaf], states.get(leaf)) for leaf in self.first.leaves}
        rest = {name: t for name, t in inner.tensors.items() if name not in parts}
        return self._payload(x, rest, parts)

    def _decode(self, payload: Payload) -> Tensor:
        leaves = {name: self.second.decode(part) for name, part in payload.parts.items()}
        return self.first.decode(dataclasses.replace(payload, tensors={**payload.tensors, **leaves}, parts={}))

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        leaves = self.leaf_shapes(shape, dtype)
        total = self.first.payload_nbytes(shape, dtype)
        for leaf_shape, leaf_dtype in leaves.values():
            raw = leaf_dtype.itemsize
            for size in leaf_shape:
                raw *= size
            total += self.second.payload_nbytes(leaf_shape, leaf_dtype) - raw
        return total

    def leaf_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> LeafShapes:
        if hasattr(self.first, "leaf_shapes"):
            return self.first.leaf_shapes(shape, dtype)
        return {leaf: (tuple(shape), dtype) for leaf in self.first.leaves}
