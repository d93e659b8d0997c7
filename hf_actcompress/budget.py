"""Bits for every saved tensor under a budget: `saved="auto:budget=0.15"`.

How much the gradient of the parameters suffers from the rounding of one saved tensor is measured, not guessed: on a
few rows of a batch one forward pass keeps everything exact, and for each tensor a backward pass is run in which only
that one is rounded.  Rounding noise of different tensors is independent, so while it is small their squared errors add
up, and each bit more divides one by four; the bits that make the sum least are then found greedily, which is optimal
because every further bit of a tensor gains less than the one before.  Where bits are few, errors multiply and a tensor
at one bit can spoil all that comes after it: so several allotments, with one, two, three bits as the least, are tried
on the same rows, and the one with the least error of the whole gradient is taken.
Source: the adaptive bits of GACT (Liu et al., 2022), which shifts seeds where this rounds and leaves exact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from .packed import Slopes
from .trials import few_rows, gradients, loss_of, normed, undisturbed

logger = logging.getLogger(__name__)

CHOICES = (1, 2, 3, 4, 5, 6, 8)
LEAST = (1, 2, 3)  # bits that every tensor gets, in the allotments that are tried
REFERENCE = 4  # bits at which errors are measured
REFRESH = 500  # forward passes between measurements
COST = 5.0  # a measurement stops after about so many steps' worth of time: 1 % of REFRESH
ROWS = 2  # of a batch that a measurement takes; twice as many where there is batch normalisation


@dataclass
class Slot:
    """A place in the model where a tensor is saved, with what all its forward passes have in common.

    raw: bytes without compression.  numel: its elements.  overhead: bytes of scales, whatever the bits.
    error: squared error of the parameters' gradient, relative, if this alone is rounded to REFERENCE bits; None where
        not measured.
    """

    name: str
    raw: int
    numel: int
    overhead: int
    error: float | None = None
    bits: int = REFERENCE

    def nbytes(self, bits: int) -> int:
        return self.numel * bits // 8 + self.overhead


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
        found = measure(saved, model, args, kwargs, self.around, self.budget)
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


class Held:
    """A tensor of a trial: itself, and what rounds it."""

    def __init__(self, trial: "Trial", slot: Slot, exact: Tensor, encode: Callable[[Any], Any], nbytes: int) -> None:
        self.trial, self.slot, self.exact, self.encode, self.nbytes = trial, slot, exact, encode, nbytes

    def unpack(self) -> Tensor:
        bits = self.trial.rounded.get(self.slot.name)
        coded = None if bits is None else self.encode(dataclasses.replace(self.trial.codec, bits=bits))
        return self.exact if coded is None else coded.unpack()


class Trial:
    """One forward pass on a few rows, with everything kept exact.

    scale: rows of the batch over rows that are taken.
    """

    def __init__(self, scale: float, codec: Any) -> None:
        self.scale, self.codec = scale, codec
        self.slots: dict[str, Slot] = {}
        self.fixed: Counter[str] = Counter()  # bytes of what is held exactly
        self.raw = 0
        self.strange = False  # whether a tensor could not be coded, so that nothing can be said about errors
        self.rounded: dict[str, int] = {}  # bits of what is rounded in the next backward pass

    def hold(self, name: str, run: Tensor, encode: Callable[[Any], Any]) -> Held | None:
        coded = encode(self.codec)
        if coded is None:
            return None
        overhead = coded.nbytes - run.numel() * coded.bits // 8 if isinstance(coded, Slopes) else (
            coded.nbytes - run.numel() * REFERENCE // 8)  # fmt: skip
        raw = run.numel() * run.element_size()
        sizes = (int(size * self.scale) for size in (raw, run.numel(), max(0, overhead)))
        slot = Slot(name, *sizes)
        self.slots[name] = slot
        return Held(self, slot, run, encode, coded.nbytes)

    def count(self, name: str, raw: int, kept: int, exact: bool) -> None:
        self.raw += int(raw * self.scale)
        if exact and name not in self.slots:
            self.fixed[name] += int(kept * self.scale)


def measure(
    saved: Any, model: nn.Module, args: tuple, kwargs: dict[str, Any], around: Callable[[], Any], budget: float
) -> list[Slot] | None:  # fmt: skip
    """The slots with their errors and bits, found on a few rows of this batch.  Leaves gradients, buffers and random
    numbers alone.  None where a tensor holds NaN or Inf.  Raises ValueError for a budget that cannot be met."""
    args, kwargs, scale = few_rows(args, kwargs, ROWS * (2 if normed(model) else 1))
    trial = saved.trial = Trial(scale, saved.codec)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        with around(), undisturbed(model):
            began = time.perf_counter()
            loss = loss_of(model(*args, **kwargs))
            if trial.strange:
                return None

            def error(rounded: dict[str, int]) -> float:
                trial.rounded = rounded
                found = gradients(loss, parameters, again=True)
                return sum(
                    float((a.float() - b.float()).square().sum())
                    for a, b in zip(exact, found, strict=True) if a is not None and b is not None
                ) / norm  # fmt: skip

            exact = gradients(loss, parameters, again=True)
            stop = time.perf_counter() + COST * scale * (time.perf_counter() - began)
            norm = sum(float(g.float().square().sum()) for g in exact if g is not None) or 1.0
            for name in _order(trial.slots):
                if time.perf_counter() > stop:
                    break
                trial.slots[name].error = error({name: REFERENCE})
            fill_in(list(trial.slots.values()))
            found = [bits for least in LEAST if (bits := allot(trial, budget, least)) is not None]
            # Noise is drawn anew: of nearly equal ones any may win, which does no harm.
            best = found[0] if len(found) == 1 else min(found, key=error)
    finally:
        saved.trial = None
    for name, bits in best.items():
        trial.slots[name].bits = bits
    return list(trial.slots.values())


def _order(slots: dict[str, Slot]) -> list[str]:
    """The first slot of every kind, large ones first, then the last, then one between, then all others: what is not
    measured in time takes the error of its nearest relative."""
    kinds: dict[str, list[str]] = {}
    for name in slots:
        kinds.setdefault(_kind(name), []).append(name)
    ranked = sorted(kinds.values(), key=lambda names: -sum(slots[n].raw for n in names))
    picks = [names[at(len(names))] for at in (lambda n: 0, lambda n: n - 1, lambda n: n // 2) for names in ranked]
    return list(dict.fromkeys([*picks, *(name for names in ranked for name in names)]))


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def fill_in(slots: list[Slot]) -> None:
    """Errors of what was not measured: of the nearest slot of the same kind, in proportion to nothing else."""
    places = {id(slot): i for i, slot in enumerate(slots)}
    measured = [slot for slot in slots if slot.error is not None]
    for slot in slots:
        if slot.error is None:
            kin = [m for m in measured if _kind(m.name) == _kind(slot.name)] or measured
            nearest = min(kin, key=lambda m: abs(places[id(m)] - places[id(slot)]), default=None)
            slot.error = 1.0 if nearest is None else nearest.error


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
