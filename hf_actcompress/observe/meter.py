"""Counters of one site: bytes of every call, error of sampled calls.

A meter is a listener (events.py).  Errors and counts of NaN stay on the device of the tensors until `counts` is
called, for a log line or a record: a training step does not wait for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .events import Event
from .measures import distances, pick, products
from .nonfinite import Nonfinite

MANY = 64  # samples that wait to be added up


@dataclass(frozen=True)
class Counts:
    """What a meter has counted; differences of two are the counts of the calls between."""

    calls: int = 0
    raw_bytes: int = 0
    payload_bytes: int = 0
    nonfinite: int = 0
    seconds: float = 0.0
    # sums over the sampled calls
    samples: int = 0
    error: float = 0.0
    cosine: float = 0.0

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(*(now - before for now, before in zip(_values(self), _values(earlier), strict=True)))

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(one + more for one, more in zip(_values(self), _values(other), strict=True)))

    def record(self) -> dict[str, Any]:
        """Plain numbers; None where nothing was sampled yet."""
        return {
            "calls": self.calls,
            "ratio": self.raw_bytes / self.payload_bytes if self.payload_bytes else None,
            "rel_error": self.error / self.samples if self.samples else None,
            "cosine": self.cosine / self.samples if self.samples else None,
            "raw_bytes": self.raw_bytes,
            "payload_bytes": self.payload_bytes,
            "bytes_saved": self.raw_bytes - self.payload_bytes,
            "nonfinite": self.nonfinite,
            "seconds": round(self.seconds, 6),
        }


class Meter:
    """Counters of one direction of one boundary, or of the saved tensors.

    Bytes are counted at every call; the error is measured at every `every`-th call on an evenly spaced sample of
    about 16k values, so that metering costs far less than 1 % of a training step.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.calls, self.raw_bytes, self.payload_bytes, self.seconds = 0, 0, 0, 0.0
        self._before = Counts()  # of a checkpoint
        self._sampled: list[Tensor] = []  # products, on the device
        self._sums: Tensor | None = None  # fp64 [3]: samples, errors, cosines
        self._found: Nonfinite | None = None

    def __call__(self, event: Event) -> None:
        self._found = event.nonfinite or self._found
        if self.due() and event.x is not None and event.x.numel():
            self.sample(pick(event.x), pick(event.decode()))
        self.count(event.raw_bytes, event.payload_bytes, event.seconds, event.calls)

    def due(self) -> bool:
        """Whether the error of the coming call should be measured."""
        return self.every > 0 and self.calls % self.every == 0

    def count(self, raw_bytes: int, payload_bytes: int, seconds: float, calls: int = 1) -> None:
        self.calls += calls
        self.raw_bytes += raw_bytes
        self.payload_bytes += payload_bytes
        self.seconds += seconds

    def sample(self, x: Tensor, y: Tensor) -> None:
        """Relative error |y - x| / |x| and cosine of two 1-D samples of the same places.  Those with NaN or Inf do not
        count."""
        self._sampled.append(products(x, y))
        if len(self._sampled) == MANY:
            self._add_up()

    def _add_up(self) -> None:
        """Of many samples at once, which takes few kernels."""
        if self._sampled:
            found = distances(torch.stack(self._sampled))
            found = torch.cat([torch.ones_like(found[:, :1]), found], 1)
            own = torch.where(found.isnan().any(1, keepdim=True), 0.0, found).sum(0)
            self._sums = own if self._sums is None else self._sums + own
            self._sampled.clear()

    def counts(self) -> Counts:
        """All counts so far.  Waits for the device."""
        self._add_up()
        samples, error, cosine = (0, 0.0, 0.0) if self._sums is None else self._sums.tolist()
        before = self._before
        return Counts(
            self.calls, self.raw_bytes, self.payload_bytes,
            before.nonfinite + (0 if self._found is None else self._found.total()), self.seconds,
            before.samples + int(samples), before.error + error, before.cosine + cosine,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        return self.counts().record()

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.counts())

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Go on from those counts."""
        known = {field.name for field in fields(Counts)}
        before = Counts(**{name: value for name, value in values.items() if name in known})  # 0.1 wrote `every`, too
        self.calls, self.raw_bytes, self.payload_bytes = before.calls, before.raw_bytes, before.payload_bytes
        self.seconds, self._before, self._sums = before.seconds, before, None
        self._sampled.clear()


def _values(counts: Counts) -> list[Any]:
    return [getattr(counts, field.name) for field in fields(counts)]
