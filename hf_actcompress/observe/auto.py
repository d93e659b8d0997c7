"""Chooses codecs for every boundary and direction: `codec="auto:ratio=8"` or `codec="auto:error=0.1"`.

What each candidate does to the gradient of the parameters is measured on a training batch, one boundary and direction
at a time (`sensitivity.py`): the root mean square over layers of the relative error of each layer's own gradient,
because Adam steps as far in layers with small gradients as in others.  The whole batch is used: the gradients of a
few rows have so low a rank that a rotation keeps all of them, and looks ten times as good as it is.  Errors of
different places are nearly independent, so their squares add up; of all combinations that keep the target the best one
is taken.  Later measurements leave out candidates that were far from the best.  Another choice must be clearly better
to replace the one in use, because a new codec starts with fresh state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..codecs import Codec, parse_codec
from ..models.hooks import outside_of_graphs
from .allocation import Option, best_combination
from .sensitivity import DIRECTIONS, sensitivity
from .target import Target
from .tuner import Tuner

logger = logging.getLogger(__name__)

CANDIDATES = (
    "identity", "block:bits=8", "block:bits=6", "block:bits=4", "block:bits=3", "block:bits=2",
    "rotated:bits=6", "rotated:bits=4", "rotated:bits=3", "rotated:bits=2", "rotated:bits=1",
    "kmeans:bits=4", "kmeans:bits=3", "kmeans:bits=2", "topk:ratio=0.1|block:bits=8", "topk:ratio=0.05|block:bits=8",
)  # fmt: skip
NEAR = 1.5  # candidates with more than this times the error of the best one of at most their size are left out later
BETTER = 0.9  # another choice replaces the one in use if its error is below this share of it


class AutoCodec(Tuner):
    """A forward pre-hook of the whole model that sets the codecs of boundaries.

    handle: the Handle of the model.
    names: of its boundaries, those that are chosen for.
    backward: whether the gradients' codecs are chosen too (else they are fixed).
    """

    every, early = 1000, (100,)

    def __init__(self, handle: Any, target: Target, names: Sequence[str], backward: bool) -> None:
        super().__init__(handle)
        outside_of_graphs(AutoCodec)
        self.target, self.names = target, list(names)
        self.directions = DIRECTIONS if backward else DIRECTIONS[:1]
        self.chosen: dict[str, dict[str, str]] = {}  # name -> direction -> spec
        self.table: list[dict[str, Any]] = []  # of the last measurement
        self._near: dict[tuple[str, str], set[str]] = {}  # (name, direction) -> specs worth measuring again

    def applies(self, module: nn.Module) -> bool:
        return module.training

    def measure(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
        fits, rows = self._fitting(), []
        for name in self.names:
            codecs = {d: [c for c in fits if self._worth_measuring(name, d, str(c))] for d in self.directions}
            rows += sensitivity(self.handle, module, args, kwargs, codecs, [name])
        if any(row["layer_error"] is None for row in rows if row["codec"] == "identity"):
            return False  # NaN
        self.table = rows
        keys = [(name, direction) for name in self.names for direction in self.directions]
        places = [[_option(row) for row in rows if (row["name"], row["direction"]) == key] for key in keys]
        self._near = {key: _near(options) for key, options in zip(keys, places, strict=True)}
        best = best_combination(places, self.target)
        if best is None:
            self._refuse(places)
            best = [min(range(len(options)), key=lambda i: options[i].error) for options in places]
        now = self._in_use(keys, places)
        if now is not None:
            (kept, score), (_, least) = self._rated(now, places), self._rated(best, places)
            best = now if kept and least >= BETTER * score else best
        self.set({
            name: {d: places[keys.index((name, d))][best[keys.index((name, d))]].spec for d in self.directions}
            for name in self.names
        })  # fmt: skip
        ratio = sum(o[0].raw for o in places) / sum(o[i].nbytes for o, i in zip(places, best, strict=True))
        logger.info(
            "%s chose, at training pass %d, a ratio of %.2f with a gradient error of about %.3f: %s", self.target,
            self.passes, ratio, math.sqrt(sum(o[i].error for o, i in zip(places, best, strict=True))),
            "; ".join(f"{name} {' and '.join(codecs.values())}" for name, codecs in self.chosen.items()),
        )  # fmt: skip
        return True

    def _fitting(self) -> list[Codec]:
        """Candidates that every boundary's output can take."""
        layers = [self.handle.cuts[name] for name in self.names]
        fits = []
        for codec in map(parse_codec, CANDIDATES):
            try:
                for layer in layers:
                    if layer.shape is not None:
                        codec.payload_nbytes(layer.shape, layer.dtype)
            except ValueError:
                continue
            fits.append(codec)
        return fits

    def _worth_measuring(self, name: str, direction: str, spec: str) -> bool:
        known = self._near.get((name, direction))
        return known is None or spec in known or spec == self.chosen.get(name, {}).get(direction)

    def _refuse(self, places: list[list[Option]]) -> None:
        if self.target.ratio is None:
            logger.warning("%s cannot be met by any codec here: the most exact ones are taken", self.target)
            return
        best = sum(o[0].raw for o in places) / sum(min(option.nbytes for option in o) for o in places)
        raise ValueError(
            f"codec={str(self.target)!r} cannot be met: the smallest candidates reach a ratio of {best:.1f} here. Ask "
            "for less, or name a codec such as topk:ratio=0.01."
        )

    def _in_use(self, keys: list[tuple[str, str]], places: list[list[Option]]) -> list[int] | None:
        """The choice in use, if there is one and all of it was measured."""
        choice = []
        for (name, direction), options in zip(keys, places, strict=True):
            spec = self.chosen.get(name, {}).get(direction)
            choice += [i for i, option in enumerate(options) if option.spec == spec]
        return choice if len(choice) == len(keys) else None

    def _rated(self, choice: list[int], places: list[list[Option]]) -> tuple[bool, float]:
        """Whether a choice keeps the target, and what it should have little of: error under a ratio, else bytes."""
        taken = [options[i] for options, i in zip(places, choice, strict=True)]
        nbytes, error = sum(o.nbytes for o in taken), sum(o.error for o in taken)
        if self.target.ratio is not None:
            return nbytes * self.target.ratio <= sum(o.raw for o in taken), error
        return math.sqrt(error) <= float(self.target.error or 0), nbytes

    # -- the choice -------------------------------------------------------------------------------------------------
    def set(self, chosen: dict[str, dict[str, str]]) -> None:
        """Take over a choice; boundaries that are not named keep theirs."""
        self.chosen = {name: dict(codecs) for name, codecs in chosen.items() if name in self.names}
        for name, codecs in self.chosen.items():
            boundary = self.handle.boundaries[name]
            forward = parse_codec(codecs["forward"])
            backward = parse_codec(codecs["backward"]) if "backward" in codecs else boundary.backward.codec
            boundary.set_codecs(forward, backward)

    def state_dict(self) -> dict[str, Any]:
        near = [[*key, sorted(specs)] for key, specs in self._near.items()]
        return {"passes": self.passes, "chosen": self.chosen, "near": near}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.passes = values["passes"]
        self._near = {(name, direction): set(specs) for name, direction, specs in values.get("near", [])}
        self.set(values["chosen"])


def _option(row: dict[str, Any]) -> Option:
    error = row["layer_error"]
    return Option(row["codec"], row["raw_bytes"], row["payload_bytes"], math.inf if error is None else error**2)


def _near(options: Sequence[Option]) -> set[str]:
    """The smallest option, no codec at all, and what no option of its size or less beats by far."""
    least = min(option.nbytes for option in options)
    kept = {option.spec for option in options if option.nbytes == least or option.spec == "identity"}
    for option in options:
        best = min(other.error for other in options if other.nbytes <= option.nbytes)
        if option.error <= NEAR**2 * best:
            kept.add(option.spec)
    return kept
