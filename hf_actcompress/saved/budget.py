"""Bits for every saved tensor under a budget: `saved="auto:budget=0.15"`, `saved="auto:memory=8GB"`.

How much the gradient of the parameters suffers from the rounding of one saved tensor is measured (sensitivity.py).
Rounding noise of different tensors is independent, so while it is small their squared errors add up, and each bit more
divides one by four; the bits that make the sum least are then found greedily.  Where bits are few, errors multiply and
a tensor at one bit can spoil everything after it: so several allotments, with at least one, two or three bits each,
are tried on the same rows, and the one with the smallest error of the whole gradient is taken.
Source: the adaptive bits of GACT (Liu et al., 2022), which shifts seeds where this rounds and leaves exact.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from ..codecs import Block
from ..observe.allocation import Option, greedy
from ..observe.target import SavedTarget
from ..observe.tuner import Tuner
from .sensitivity import Slot, Trial, measure
from .tensors import SavedTensors

logger = logging.getLogger(__name__)

CHOICES = (1, 2, 3, 4, 5, 6, 8)
LEAST = (1, 2, 3)  # bits that every tensor gets, in the allotments that are tried
CODEC = Block()


class Allotment(dict[str, int]):
    """Bits by the name of the tensor; `default` for one that was not there when it was measured."""

    default: int

    def __missing__(self, name: str) -> int:
        return self.default


class Budget(Tuner):
    """A forward pre-hook of the whole model that chooses the bits of its saved tensors.

    handle: the Handle of the model.
    bits: the choice, for SavedTensors; before the first measurement what a share allows on average, rounded down, and
        one bit where bytes are given.
    """

    every = 500  # passes, so that the cost of a measurement (sensitivity.COST steps) is 1 %

    def __init__(self, handle: Any, target: SavedTarget) -> None:
        super().__init__(handle)
        self.target = target
        self.slots: dict[str, Slot] = {}
        self.bits = Allotment()
        self.bits.default = max(1, int(32 * (target.budget or 0)))

    def __str__(self) -> str:
        return str(self.target)

    def mean_bits(self) -> float:
        """Per element, over what is not held exactly."""
        total = sum(slot.numel for slot in self.slots.values())
        return sum(slot.bits * slot.numel for slot in self.slots.values()) / max(1, total)

    def table(self) -> list[dict[str, Any]]:
        """One row per place: name, raw bytes, bits, error."""
        return [asdict(slot) for slot in self.slots.values()]

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "slots": {name: asdict(slot) for name, slot in self.slots.items()}}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.passes = values["passes"]
        self._set([Slot(**slot) for slot in values["slots"].values()])

    def _set(self, slots: list[Slot]) -> None:
        self.slots = {slot.name: slot for slot in slots}
        self.bits.clear()
        self.bits.update({slot.name: slot.bits for slot in slots})

    def applies(self, module: nn.Module) -> bool:
        saved: SavedTensors = self.handle.saved
        return saved.enabled and not saved.active

    def measure(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        if any(type(p.data).__name__ == "DTensor" for p in module.parameters()):
            raise ValueError(
                f"saved={str(self)!r} measures gradients of whole parameters, and fully_shard or tensor parallelism "
                "has sharded them. Use the same bits for all there, for example saved='block:bits=4'."
            )
        found = measure(self.handle, module, args, kwargs, choose(self.target))
        if found is None:
            return False
        self._set(found)
        counts = Counter(slot.bits for slot in found)
        logger.info(
            "saved: %s allots %.2f bits on average (%s)", self, self.mean_bits(),
            ", ".join(f"{n} at {bits}" for bits, n in sorted(counts.items())),
        )  # fmt: skip
        return True


def choose(target: SavedTarget) -> Callable[[Trial, Callable[[dict[str, int]], float]], dict[str, int]]:
    """Of the allotments with each of LEAST as the least bits, the one with the least error.  Raises as `allot`."""

    def best(trial: Trial, error: Callable[[dict[str, int]], float]) -> dict[str, int]:
        found = [bits for least in LEAST if (bits := allot(trial, target, least)) is not None]
        # Noise is drawn anew: of nearly equal ones any may win, which does no harm.
        return found[0] if len(found) == 1 else min(found, key=error)

    return best


def allot(trial: Trial, target: SavedTarget, least: int = CHOICES[0]) -> dict[str, int] | None:
    """Bits for every slot, at least `least`, with the smallest sum of errors that the bytes of `target` allow; None
    where `least` bits for each are too many.

    Raises ValueError where one bit for each is too much already.
    """
    slots, choices = list(trial.slots.values()), CHOICES[CHOICES.index(least) :]
    spare = target.nbytes(trial.raw) - sum(trial.fixed.values()) - sum(slot.nbytes(least) for slot in slots)
    if spare >= 0:
        places = [
            [Option(str(bits), slot.raw, slot.nbytes(bits), slot.error_at(bits)) for bits in choices] for slot in slots
        ]
        found = greedy(places, spare)
        return {slot.name: choices[i] for slot, i in zip(slots, found, strict=True)}
    if least > CHOICES[0]:
        return None
    held = Counter(trial.fixed)
    held.update({slot.name: slot.nbytes(least) for slot in slots})
    rows, total = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in held.most_common(5)), sum(held.values())
    raise ValueError(
        f"saved: {str(target).removeprefix('auto:')} cannot be met: with one bit for every value {total / 1e6:.2f} MB "
        f"of {trial.raw / 1e6:.2f} MB are held, a share of {total / max(1, trial.raw):.3f}. The largest: {rows}. "
        "Use a larger one, or activation checkpointing beside it."
    )
