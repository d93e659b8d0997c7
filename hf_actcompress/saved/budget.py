"""Bits for every saved tensor under a budget: `saved="auto:budget=0.15"`.

How much the gradient of the parameters suffers from the rounding of one saved tensor is measured
(sensitivity.py).  Rounding noise of different tensors is independent, so while it is small their squared errors add
up, and each bit more divides one by four; the bits that make the sum least are then found greedily, which is optimal
because every further bit of a tensor gains less than the one before.  Where bits are few, errors multiply and a tensor
at one bit can spoil all that comes after it: so several allotments, with one, two, three bits as the least, are tried
on the same rows, and the one with the least error of the whole gradient is taken.
Source: the adaptive bits of GACT (Liu et al., 2022), which shifts seeds where this rounds and leaves exact.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn

from .sensitivity import REFERENCE, Slot, Trial, measure

logger = logging.getLogger(__name__)

CHOICES = (1, 2, 3, 4, 5, 6, 8)
LEAST = (1, 2, 3)  # bits that every tensor gets, in the allotments that are tried
REFRESH = 500  # forward passes between measurements, so that sensitivity.COST steps are 1 %


class Auto:
    """The allotment, and when it is measured anew.

    budget: share of the bytes without compression, in (0, 1).
    around: a context in which measurements run (so that boundaries do not see them).
    """

    def __init__(self, budget: float) -> None:
        if not isinstance(budget, (int, float)) or isinstance(budget, bool) or not 0 < budget < 1:
            raise ValueError(
                f"saved: budget={budget!r} is not between 0 and 1; it is the share of the uncompressed bytes that may "
                "be held, for example auto:budget=0.15."
            )
        self.budget = float(budget)
        self.around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.passes = 0
        self.slots: dict[str, Slot] = {}
        self.seconds = 0.0

    @classmethod
    def parse(cls, spec: str) -> "Auto":
        """From "auto:budget=0.15"."""
        found = re.fullmatch(r"auto:budget=([^,]+)", spec.strip().lower())
        try:
            return cls(float(found[1])) if found else cls(spec)  # type: ignore[arg-type]
        except ValueError:
            raise ValueError(
                f"saved={spec!r} is not known. The automatic choice of bits takes a budget between 0 and 1, the share "
                "of the uncompressed bytes that may be held: saved='auto:budget=0.15'."
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "around"}  # of the model that was attached to

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, around=contextlib.nullcontext)

    def __str__(self) -> str:
        return f"auto:budget={self.budget:g}"

    def bits_of(self, slot: str) -> int:
        """Of a tensor that was not there when it was measured: what the budget allows on average, rounded down."""
        known = self.slots.get(slot)
        return max(1, int(32 * self.budget)) if known is None else known.bits

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
        self.slots = {name: Slot(**slot) for name, slot in values["slots"].items()}

    # -- measuring ----------------------------------------------------------------------------------------------
    def before(self, saved: Any, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called before every forward pass of `model` with gradients; measures when it is time to."""
        due, self.passes = self.passes % REFRESH == 0, self.passes + 1
        if not due:
            return
        if any(type(p.data).__name__ == "DTensor" for p in model.parameters()):
            raise ValueError(
                f"saved={str(self)!r} measures gradients of whole parameters, and fully_shard or tensor parallelism "
                "has cut them. Use the same bits for all there, for example saved='block:bits=4'."
            )
        began = time.perf_counter()
        found = measure(saved, model, args, kwargs, self.around, choose(self.budget))
        self.seconds += time.perf_counter() - began
        if found is None:
            self.passes = 0  # the next batch may do
            return
        self.slots = {slot.name: slot for slot in found}
        counts = Counter(slot.bits for slot in self.slots.values())
        logger.info(
            "saved: %s allots %.2f bits on average (%s), measured in %.1f s", self, self.mean_bits(),
            ", ".join(f"{n} at {bits}" for bits, n in sorted(counts.items())), time.perf_counter() - began,
        )  # fmt: skip


def choose(budget: float) -> Callable[[Trial, Callable[[dict[str, int]], float]], dict[str, int]]:
    """Of the allotments with each of LEAST as the least bits, the one with the least error.  Raises as `allot`."""

    def best(trial: Trial, error: Callable[[dict[str, int]], float]) -> dict[str, int]:
        found = [bits for least in LEAST if (bits := allot(trial, budget, least)) is not None]
        # Noise is drawn anew: of nearly equal ones any may win, which does no harm.
        return found[0] if len(found) == 1 else min(found, key=error)

    return best


def allot(trial: Trial, budget: float, least: int = CHOICES[0]) -> dict[str, int] | None:
    """Bits for every slot, at least `least`, so that all that is held is at most `budget` of the raw bytes and the sum
    of errors is least; None where `least` bits for each are too many.

    Raises ValueError where one bit for each is too much already.
    """
    slots, first = list(trial.slots.values()), CHOICES.index(least)
    left = budget * trial.raw - sum(trial.fixed.values()) - sum(slot.nbytes(least) for slot in slots)
    if left < 0 and first > 0:
        return None
    if left < 0:
        held = Counter({name: size for name, size in trial.fixed.items()})
        held.update({slot.name: slot.nbytes(CHOICES[0]) for slot in slots})
        rows = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in held.most_common(5))
        least = sum(held.values())
        raise ValueError(
            f"saved: budget={budget:g} cannot be met: with one bit for every value {least / 1e6:.2f} MB of "
            f"{trial.raw / 1e6:.2f} MB are held, a share of {least / max(1, trial.raw):.3f}. The largest: {rows}. "
            "Use a larger budget, or activation checkpointing beside it."
        )

    def error(slot: Slot, bits: int) -> float:
        steps = (2**REFERENCE - 1) / (2**bits - 1)
        return float(slot.error or 0.0) * steps * steps

    def gain(slot: Slot, level: int) -> float:
        """Error that the step from CHOICES[level] to the next saves, by byte."""
        low, high = CHOICES[level], CHOICES[level + 1]
        return (error(slot, low) - error(slot, high)) / max(1, slot.nbytes(high) - slot.nbytes(low))

    heap = [(-gain(slot, first), i, first) for i, slot in enumerate(slots)]
    heapq.heapify(heap)
    bits = {slot.name: least for slot in slots}
    while heap:
        _, i, level = heapq.heappop(heap)
        more = slots[i].nbytes(CHOICES[level + 1]) - slots[i].nbytes(CHOICES[level])
        if more > left:
            continue
        left -= more
        bits[slots[i].name] = CHOICES[level + 1]
        if level + 2 < len(CHOICES):
            heapq.heappush(heap, (-gain(slots[i], level + 1), i, level + 1))
    return bits
