"""How much the gradient of the parameters suffers from the rounding of each saved tensor.

It is measured, not guessed: on some rows of a batch one forward pass keeps everything exact, and then backward passes
are run in which only one tensor is rounded.  What a linear layer or a convolution saves goes into the gradient of its
own weight and nowhere else, so one pass rounds all of those at once and the errors are read off weight by weight.
This file knows codecs and modules, not budgets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..codecs import Codec
from ..models.replay import few_rows, has_batch_norm, undisturbed
from ..observe.events import Event
from ..observe.gradients import ExactPass
from ..observe.nonfinite import Nonfinite

REFERENCE = 4  # bits at which errors are measured
COST = 5.0  # steps whose time the backward passes of a measurement may take
ROWS = 2  # of a batch that a measurement takes, which is little beside what is held; twice as many with batch norms
# Values of a channel after which the means in a batch norm's backward pass are no longer mostly chance: on 4 rows of
# 64 its errors come out 33 times too large at 36 values, 7 at 144, 2 at 576, and with this 3, 1.4 and 1
# (EfficientNet-Lite0, medians; benchmarks/batch_norm_rows.py).
SETTLED = 1000


# Products with a weight: what they save goes into its gradient and into no other.
PRODUCTS = ("Addmm", "Mm", "Convolution", "CudnnConvolution", "MkldnnConvolution", "MkldnnLinear", "Linear")


@dataclass
class Slot:
    """A place in the model where a tensor is saved, with what all its forward passes have in common.

    raw: bytes without compression.  numel: its elements.  overhead: bytes of scales, whatever the bits.
    error: squared error of the parameters' gradient, relative, if this tensor alone is rounded to REFERENCE bits; None
        where not measured.
    """

    name: str
    raw: int
    numel: int
    overhead: int
    error: float | None = None
    bits: int = REFERENCE

    def nbytes(self, bits: int) -> int:
        return self.numel * bits // 8 + self.overhead

    def error_at(self, bits: int) -> float:
        """`error` at other bits: noise is proportional to the square of the step."""
        steps = (2**REFERENCE - 1) / (2**bits - 1)
        return float(self.error or 0.0) * steps * steps


class Tried:
    """A tensor of a trial: the tensor itself, rounded in the backward passes in which the trial says so."""

    how, codec, place = "tried", None, ""

    def __init__(self, trial: Trial, slot: Slot, exact: Tensor, encode: Callable[[Codec], Any], nbytes: int) -> None:
        self.trial, self.slot, self.exact, self.encode, self.nbytes = trial, slot, exact, encode, nbytes
        self._rounded: tuple[dict[str, int], Tensor] | None = None

    def get(self) -> Tensor:
        """Flat, not to be changed by others; one rounding for all operations of a backward pass."""
        rounded = self.trial.rounded
        bits = rounded.get(self.slot.name)
        if bits is None:
            self._rounded = None
            return self.exact.reshape(-1).clone()
        if self._rounded is None or self._rounded[0] is not rounded:
            self._rounded = rounded, self.encode(self.trial.codec.with_bits(bits)).get()
        return self._rounded[1].clone()


class Trial:
    """One forward pass on a few rows, with everything kept exactly.  A listener of the saved site.

    scale: rows of the batch over rows that are taken.
    """

    def __init__(self, scale: float, codec: Codec) -> None:
        self.scale, self.codec = scale, codec
        self.slots: dict[str, Slot] = {}
        self.fixed: Counter[str] = Counter()  # bytes of what no codec takes
        self.raw = 0
        self.found = Nonfinite("saved")  # where there is any, nothing can be said about errors
        self.rounded: dict[str, int] = {}  # bits of what is rounded in the next backward pass
        self._users: dict[str, list[tuple[str, Any]]] = {}  # operations that saved a slot's tensor, with their weights

    def __call__(self, event: Event) -> None:
        self.raw += int(event.raw_bytes * self.scale)
        if event.payload_bytes and event.name not in self.slots:
            self.fixed[event.name] += int(event.payload_bytes * self.scale)

    def keep(self, name: str, run: Tensor, encode: Callable[[Codec], Any]) -> Tried:
        """The tensor of a slot."""
        coded = encode(self.codec)
        overhead = max(0, coded.nbytes - run.numel() * (self.codec.traits.bits or REFERENCE) // 8)
        sizes = (int(size * self.scale) for size in (run.numel() * run.element_size(), run.numel(), overhead))
        slot = self.slots[name] = Slot(name, *sizes)
        return Tried(self, slot, run.clone(), encode, coded.nbytes)

    def use(self, content: Any, operation: str, weight: Any) -> None:
        """An operation saved a tensor whose values are in `content`, perhaps as one of several."""
        tried = getattr(content, "codes", content)
        if isinstance(tried, Tried):
            self._users.setdefault(tried.slot.name, []).append((operation, weight))

    def local(self) -> dict[str, list[int]]:
        """Slots that reach the gradients of weights only that no other slot reaches, with the ids of these weights."""
        found = {name: [id(weight) if operation in PRODUCTS else id(None) for operation, weight in users]
                 for name, users in self._users.items()}  # fmt: skip
        reached = Counter(weight for weights in found.values() for weight in set(weights))
        return {name: list(dict.fromkeys(weights)) for name, weights in found.items()
                if id(None) not in weights and all(reached[weight] == 1 for weight in weights)}  # fmt: skip

    def of_all_rows(self, name: str, errors: dict[int, float]) -> float:
        """The sum of the errors by parameter that this slot causes, as it would be on the whole batch.

        Relative errors hardly depend on the number of rows, but for batch norms.  Their backward pass goes through the
        mean of gradient times normalised input, which is chance in the few values of a few rows, and the more values
        there are the less is left of that (SETTLED).
        """
        total, users = sum(errors.values()), self._users.get(name, [])
        if not users or not all("BatchNorm" in operation and weight is not None for operation, weight in users):
            return total
        # What follows the norm gets its error by the values; what comes before it through its backward pass.
        order, first = list(errors), min(list(errors).index(id(weight)) for _, weight in users)
        own = sum(errors[key] for key in order[first:])
        values = self.slots[name].numel / users[0][1].numel()
        return own + (total - own) * (1 + SETTLED / values) / (1 + SETTLED * self.scale / values)

    @property
    def passes(self) -> int:
        """Backward passes that take as long as COST steps: one is 2/3 of a step, on a part of the rows."""
        return round(COST * self.scale * 3 / 2)


Choose = Callable[[Trial, Callable[[dict[str, int]], float]], dict[str, int]]


def measure(handle: Any, model: nn.Module, args: tuple, kwargs: dict[str, Any], choose: Choose) -> list[Slot] | None:
    """The slots with their errors and bits, found on some rows of this batch.  Leaves gradients, buffers and random
    numbers as they are.

    handle: the Handle of the model.
    choose: from the trial, whose slots have errors, and a function that measures the error of the gradient with given
        bits for each slot, to the bits that are taken.
    Returns None where a tensor holds NaN or Inf.
    """
    args, kwargs, scale = few_rows(args, kwargs, ROWS * (2 if has_batch_norm(model) else 1))
    trial = Trial(scale, handle.saved.codec)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with handle.disabled(), handle.saved.trying(trial), undisturbed(model):
        exact = ExactPass(model, args, kwargs, parameters)
        if trial.found.total():
            return None
        power = exact.power or 1.0

        def errors(rounded: dict[str, int]) -> dict[int, float]:
            """Squared error by parameter, relative to all of the gradient."""
            trial.rounded = rounded
            return {id(p): sums.noise / power for p, sums in zip(parameters, exact.backward(), strict=True)}

        slots, local = trial.slots, trial.local()
        if local:
            found = errors(dict.fromkeys(local, REFERENCE))
            for name, weights in local.items():
                slots[name].error = sum(found.get(weight, 0.0) for weight in weights)
        others = in_order({name: slot for name, slot in slots.items() if name not in local})
        for name in others[: trial.passes]:
            slots[name].error = trial.of_all_rows(name, errors({name: REFERENCE}))
        fill_in(list(slots.values()))
        best = choose(trial, lambda bits: sum(errors(bits).values()))
    for name, bits in best.items():
        slots[name].bits = bits
    return list(slots.values())


def in_order(slots: dict[str, Slot]) -> list[str]:
    """The first slot of every kind, large ones first, then the last, then one between, then all others: what is not
    measured takes the error of the nearest one of its kind."""
    kinds: dict[str, list[str]] = {}
    for name in slots:
        kinds.setdefault(_kind(name), []).append(name)
    ranked = sorted(kinds.values(), key=lambda names: -sum(slots[n].raw for n in names))
    picks = [names[at(len(names))] for at in (lambda n: 0, lambda n: n - 1, lambda n: n // 2) for names in ranked]
    return list(dict.fromkeys([*picks, *(name for names in ranked for name in names)]))


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def fill_in(slots: list[Slot]) -> None:
    """Give what was not measured the error of the nearest slot of the same kind."""
    places = {id(slot): i for i, slot in enumerate(slots)}
    measured = [slot for slot in slots if slot.error is not None]
    for slot in slots:
        if slot.error is None:
            kin = [m for m in measured if _kind(m.name) == _kind(slot.name)] or measured
            nearest = min(kin, key=lambda m: abs(places[id(m)] - places[id(slot)]), default=None)
            slot.error = 1.0 if nearest is None else nearest.error
