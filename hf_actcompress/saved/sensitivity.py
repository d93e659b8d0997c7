"""How much the gradient of the parameters suffers from the rounding of each saved tensor.

It is measured, not guessed: on some rows of a batch one forward pass keeps everything exact, and then backward passes
are run in which only one tensor is rounded.  What a linear layer or a convolution saves goes into the gradient of its
own weight and nowhere else, so one pass rounds all of those at once and the errors are read off weight by weight.
This file knows codecs and modules, not budgets.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..models.replay import few_rows, gradients, loss_of, normed, undisturbed
from .forms import Slopes
from .rules import weight_of

REFERENCE = 4  # bits at which errors are measured
COST = 5.0  # a measurement stops after about so many steps' worth of time
ROWS = 2  # of a batch that a measurement takes, which is little beside what is held; twice as many with batch norms
# Values of a channel after which the means in a batch norm's backward pass are no longer mostly chance: on 4 rows of
# 64 its errors come out 33 times too large at 36 values, 7 at 144, 2 at 576, and with this 3, 1.4 and 1
# (EfficientNet-Lite0, medians; benchmarks/batch_norm_rows.py).
SETTLED = 1000


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
        self._uses: dict[str, list[nn.Module | None]] = {}  # the modules that saved a slot's tensor

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

    def use(self, core: Any, module: nn.Module | None) -> None:
        """`module` saved what is held as `core`, perhaps as one of several."""
        if isinstance(core, Held):
            self._uses.setdefault(core.slot.name, []).append(module)

    def local(self) -> dict[str, list[int]]:
        """Slots that reach the gradients of weights only that no other slot reaches, with the ids of these weights."""
        found = {name: [id(weight_of(module)) for module in uses] for name, uses in self._uses.items()}
        reached = Counter(weight for weights in found.values() for weight in set(weights))
        return {name: list(dict.fromkeys(weights)) for name, weights in found.items()
                if id(None) not in weights and all(reached[weight] == 1 for weight in weights)}  # fmt: skip

    def of_all_rows(self, name: str, errors: dict[int, float]) -> float:
        """The sum of the errors by parameter that this slot causes, as it would be on the whole batch.

        Relative errors hardly depend on the number of rows, but for batch norms.  Their backward pass goes through the
        mean of gradient times normalised input, which is chance in the few values of a few rows, and the more values
        there are the less is left of that (SETTLED).
        """
        total, uses = sum(errors.values()), self._uses.get(name, [])
        if not uses or not all(isinstance(use, nn.modules.batchnorm._BatchNorm) for use in uses):
            return total
        own = sum(errors.get(id(use.weight), 0.0) for use in uses)  # type: ignore[union-attr]
        values = self.slots[name].numel / uses[0].num_features  # type: ignore[union-attr]
        return own + (total - own) * (1 + SETTLED / values) / (1 + SETTLED * self.scale / values)

    def count(self, name: str, raw: int, kept: int, exact: bool) -> None:
        self.raw += int(raw * self.scale)
        if exact and name not in self.slots:
            self.fixed[name] += int(kept * self.scale)


def measure(
    saved: Any, model: nn.Module, args: tuple, kwargs: dict[str, Any], around: Callable[[], Any],
    choose: Callable[[Trial, Callable[[dict[str, int]], float]], dict[str, int]],
) -> list[Slot] | None:  # fmt: skip
    """The slots with their errors and bits, found on some rows of this batch.  Leaves gradients, buffers and random
    numbers alone.

    choose: from the trial, whose slots have errors, and a function that measures the error of the gradient with given
        bits for each slot, to the bits that are taken.
    Returns None where a tensor holds NaN or Inf.
    """
    args, kwargs, scale = few_rows(args, kwargs, ROWS * (2 if normed(model) else 1))
    trial = saved.trial = Trial(scale, saved.codec)
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        with around(), undisturbed(model):
            began = time.perf_counter()
            loss = loss_of(model(*args, **kwargs))
            if trial.strange:
                return None

            def errors(rounded: dict[str, int]) -> dict[int, float]:
                """Squared error by parameter, relative to all of the gradient."""
                trial.rounded = rounded
                found = gradients(loss, parameters, again=True)
                return {
                    id(p): float((a.float() - b.float()).square().sum()) / norm
                    for p, a, b in zip(parameters, exact, found, strict=True) if a is not None and b is not None
                }  # fmt: skip

            def error(rounded: dict[str, int]) -> float:
                return sum(errors(rounded).values())

            exact = gradients(loss, parameters, again=True)
            stop = time.perf_counter() + COST * scale * (time.perf_counter() - began)
            norm = sum(float(g.float().square().sum()) for g in exact if g is not None) or 1.0
            slots, local = trial.slots, trial.local()
            if local:
                found = errors(dict.fromkeys(local, REFERENCE))
                for name, weights in local.items():
                    slots[name].error = sum(found.get(weight, 0.0) for weight in weights)
            for name in _order({name: slot for name, slot in slots.items() if name not in local}):
                if time.perf_counter() > stop:
                    break
                slots[name].error = trial.of_all_rows(name, errors({name: REFERENCE}))
            fill_in(list(slots.values()))
            best = choose(trial, error)
    finally:
        saved.trial = None
    for name, bits in best.items():
        slots[name].bits = bits
    return list(slots.values())


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
