"""Counters of one site: bytes of every call, error of sampled calls.

A meter is a listener (events.py); whoever compresses without a site's events calls `count` and `sample`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .events import Event
from .measures import distance, pick


@dataclass
class Meter:
    """Counters of one direction of one boundary, or of the saved tensors.

    Bytes are counted at every call; the error is measured at every `every`-th call on an evenly spaced sample of
    about 16k values, so that metering costs far less than 1 % of a training step.
    """

    every: int = 10
    calls: int = 0
    raw_bytes: int = 0
    payload_bytes: int = 0
    nonfinite: int = 0
    seconds: float = 0.0
    # sums over the sampled calls
    samples: int = 0
    error: float = 0.0
    cosine: float = 0.0

    def __call__(self, event: Event) -> None:
        self.nonfinite += event.nonfinite
        if self.due() and event.x is not None and event.x.numel() and not event.nonfinite:
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
        """Relative error |y - x| / |x| and cosine of the two, both 1-D samples of the same places."""
        error, cosine = distance(x, y)
        self.samples += 1
        self.error += error
        self.cosine += cosine

    def since(self, earlier: Meter) -> Meter:
        """The counters of the calls after `earlier`, a copy of this meter."""
        now, before = asdict(self), asdict(earlier)
        return Meter(**{k: v if k == "every" else v - before[k] for k, v in now.items()})

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
