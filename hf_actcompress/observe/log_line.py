"""What a Trainer's log line says of compression: the meters' counts since the line before.

It gets the handle handed in, and knows no trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..codecs import Codec
from .meter import Counts

LIMIT = 8  # numbers in a line
# The most important first: what does not fit in is in `handle.stats()`, with everything by layer.
KEYS = (
    "nonfinite", "saved/nonfinite", "worst_error", "grad_error", "saved/held_mb", "saved/plain_mb", "forward_ratio",
    "backward_ratio", "forward_error", "backward_error", "grad_cosine", "saved/mean_bits", "saved_mb",
    "saved/peak_mb", "saved/ratio",
)  # fmt: skip


class LogLine:
    """Numbers for the next log line of a run.

    handle: its `boundaries`, `channels(name)`, `meters`, `saved` and `budget` are read.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.errors: dict[tuple[str, str], float] = {}  # of the last line, by (boundary, direction)
        self._last: dict[str, Counts] = {}  # of the meters as of the last line

    def restore(self, meters: dict[str, dict[str, Any]]) -> None:
        """Go on from the meters of a checkpoint, which were logged then."""
        for name, values in meters.items():
            if (meter := self.handle.meters.get(name)) is not None:
                meter.load_state_dict(values)
                self._last[name] = meter.counts()

    def metrics(self, more: Mapping[str, float] | None = None) -> dict[str, float]:
        """At most LIMIT numbers about the time since this was last called, whatever the depth of the model: over all
        boundaries the ratio and the mean error of each direction, the largest error of a boundary and direction, and
        the MB saved since the run began; of saved tensors the MB without and with compression of a forward pass.

        more: further numbers, by the names of KEYS.  `errors` then holds the error of each boundary.
        """
        found = {**self._of_boundaries(), **(more or {})}
        if self.handle.saved is not None:
            found |= self._of_saved(self._since_last("saved"))
        keys = [key for key in KEYS if found.get(key) is not None][:LIMIT]
        return {f"compress/{key}": found[key] for key in keys}

    def _of_boundaries(self) -> dict[str, float]:
        result: dict[str, float] = {}
        self.errors, saved, nonfinite = {}, 0, 0
        for direction in ("forward", "backward"):
            total = Counts()
            for name in self.handle.boundaries:
                counts, meter = self._since_last(f"{name}/{direction}"), self.handle.meters[f"{name}/{direction}"]
                total, saved = total + counts, saved + meter.raw_bytes - meter.payload_bytes
                if counts.samples:
                    self.errors[name, direction] = counts.error / counts.samples
            record, nonfinite = total.record(), nonfinite + total.nonfinite
            for key, value in (("ratio", record["ratio"]), ("error", record["rel_error"])):
                if value is not None:
                    result[f"{direction}_{key}"] = round(value, 5)
        if self.handle.boundaries:
            result["saved_mb"] = round(saved / 1e6, 3)
        if self.errors:
            result["worst_error"] = round(max(self.errors.values()), 5)
        if nonfinite:
            result["nonfinite"] = nonfinite
        return result

    def codecs(self) -> dict[tuple[str, str], Codec]:
        """The codec in use by (boundary, direction)."""
        return {(name, direction): channel.codec for name in self.handle.boundaries
                for direction, channel in self.handle.channels(name)}  # fmt: skip

    def _since_last(self, name: str) -> Counts:
        earlier, self._last[name] = self._last.get(name, Counts()), self.handle.meters[name].counts()
        return self._last[name] - earlier

    def _of_saved(self, found: Counts) -> dict[str, float]:
        result: dict[str, float] = {}
        if found.calls:
            result["saved/plain_mb"] = round(found.raw_bytes / found.calls / 1e6, 3)
            result["saved/held_mb"] = round(found.payload_bytes / found.calls / 1e6, 3)
        if found.payload_bytes:
            result["saved/ratio"] = round(found.raw_bytes / found.payload_bytes, 3)
        if found.nonfinite:
            result["saved/nonfinite"] = found.nonfinite
        if torch.accelerator.is_available():
            # Since the process began or the user reset it: these statistics are the user's.
            result["saved/peak_mb"] = round(torch.accelerator.max_memory_allocated() / 1e6, 3)
        if self.handle.budget is not None:
            result["saved/mean_bits"] = round(self.handle.budget.mean_bits(), 3)
        return result
