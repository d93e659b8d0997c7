"""Targets of automatic choices: `codec="auto:ratio=8"`, `codec="auto:error=0.1"`, `saved="auto:budget=0.15"`,
`saved="auto:memory=8GB"`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

START = "block:bits=4"  # codec until the first training batch has been measured

CODECS = (
    "The automatic choice of codecs takes a ratio above 1 to reach over all boundaries and both directions, "
    "codec='auto:ratio=8', or a relative error of the parameters' gradient to stay within, codec='auto:error=0.1'."
)
SAVED = (
    "The automatic choice of bits takes a budget between 0 and 1, the share of the uncompressed bytes that may be "
    "held between forward and backward, saved='auto:budget=0.15', or the bytes, saved='auto:memory=8GB'."
)
UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Target:
    """Either `ratio` (bytes without compression over bytes with it) or `error` (of the gradient, relative)."""

    ratio: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.error is None):
            raise ValueError("auto takes either ratio or error.")
        _check("ratio", self.ratio, 1, 1e6)
        _check("error", self.error, 0, 10)

    @classmethod
    def parse(cls, spec: str) -> Target:
        """From "auto:ratio=8" or "auto:error=0.1"; ValueError for anything else."""
        return _parse(cls, spec, "codec", CODECS)

    def __str__(self) -> str:
        return f"auto:ratio={self.ratio:g}" if self.ratio is not None else f"auto:error={self.error:g}"


@dataclass(frozen=True)
class SavedTarget:
    """Either `budget`, the share of the bytes of the saved tensors without compression, in (0, 1), or `memory`, bytes
    as "8GB" or "500MiB"."""

    budget: float | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.memory is None):
            raise ValueError("auto takes either budget or memory.")
        _check("budget", self.budget, 0, 1)
        if self.memory is not None:
            _bytes(self.memory)

    @classmethod
    def parse(cls, spec: str) -> SavedTarget:
        """From "auto:budget=0.15" or "auto:memory=8GB"; ValueError for anything else."""
        return _parse(cls, spec, "saved", SAVED)

    def nbytes(self, raw: int) -> float:
        """Bytes that may be held of `raw`."""
        return raw * self.budget if self.budget is not None else _bytes(str(self.memory))

    def __str__(self) -> str:
        if self.budget is not None:
            return f"auto:budget={self.budget:g}"
        return f"auto:memory={str(self.memory).upper().replace('IB', 'iB')}"


def is_auto(spec: object) -> bool:
    """Whether a spec asks for an automatic choice."""
    return isinstance(spec, str) and spec.strip().lower().split(":")[0] == "auto"


T = TypeVar("T")


def _parse(cls: type[T], spec: str, option: str, help: str) -> T:
    from ..codecs.spec import build, split_spec  # loads torch, which the command line's help does without

    try:
        name, options = split_spec(spec.lower())
        if not options:
            raise ValueError("auto needs a target.")
        return build(cls, name, options, spec)
    except ValueError as error:
        raise ValueError(f"{option}={spec!r}: {error} {help}") from None


def _bytes(text: str) -> float:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+) *([a-z]+)", text.strip().lower())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise ValueError(f"memory={text!r} is no size; write it as 8GB, 500MB or 2GiB.")
    return float(found[1]) * UNITS[found[2]]


def _check(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and low < value < high):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} is not between {low} and {high:g}.")
