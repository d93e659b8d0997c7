"""What compression did at one site: bytes of every call, error and time of sampled calls.

A leaf module: it knows tensors and numbers, no codec, module or trainer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLE = 1 << 14


@dataclass
class Meter:
    """Counters of one direction of one boundary.

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

    def due(self) -> bool:
        """Whether the coming call should be sampled."""
        return self.every > 0 and self.calls % self.every == 0

    def count(self, raw_bytes: int, payload_bytes: int, seconds: float) -> None:
        self.calls += 1
        self.raw_bytes += raw_bytes
        self.payload_bytes += payload_bytes
        self.seconds += seconds

    def sample(self, x: Tensor, y: Tensor) -> None:
        """Relative error |y - x| / |x| and cosine of the two, both 1-D samples of the same places."""
        error, cosine = distance(x, y)
        self.samples += 1
        self.error += error
        self.cosine += cosine

    def since(self, earlier: "Meter") -> "Meter":
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


def pick(x: Tensor, size: int = SAMPLE) -> Tensor:
    """An evenly spaced sample of a tensor, fp32 and 1-D, without copying a strided tensor as a whole."""
    if x.numel() <= size:
        return x.detach().float().reshape(-1)
    flat = x.detach().reshape(-1) if x.is_contiguous() else _in_memory_order(x.detach()).reshape(-1)
    return flat[:: (flat.numel() // size) | 1].float()


def _in_memory_order(x: Tensor) -> Tensor:
    """A view of the same values in the order in which they lie (channels_last and transposed tensors)."""
    return x.permute(sorted(range(x.dim()), key=lambda d: -x.stride(d)))


def distance(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(|y - x| / |x|, cosine) in double precision; (0, 1) where both are zero."""
    x, y = x.double(), y.double()
    xx, yy, xy = (float(v) for v in (x @ x, y @ y, x @ y))
    if xx == 0:
        return (0.0, 1.0) if yy == 0 else (math.inf, 0.0)
    error = float(torch.linalg.vector_norm(y - x)) / math.sqrt(xx)
    return error, xy / math.sqrt(xx * yy) if yy > 0 else 0.0
