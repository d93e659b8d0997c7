"""What a Trainer's log line says of compression: the meters' counts since the line before.

It gets the handle handed in, and knows no trainer.
"""

from __future__ import annotations

from typing import Any

import torch

from ..codecs import Codec
from .meter import Counts


class LogLine:
    """Numbers for the next log line of a run.

    handle: its `boundaries`, `channels(name)`, `meters`, `saved` and `budget` are read.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self._last: dict[str, Counts] = {}  # of the meters as of the last line

    def restore(self, meters: dict[str, dict[str, Any]]) -> None:
        """Go on from the meters of a checkpoint, which were logged then."""
        for name, values in meters.items():
            if (meter := self.handle.meters.get(name)) is not None:
                meter.load_state_dict(values)
                self._last[name] = meter.counts()

    def metrics(self) -> dict[str, float]:
        """Ratio, error and cosine of every boundary and direction since this was last asked for, MB saved since the
        run began, and of saved tensors the MB without and with compression of a forward pass."""
        result: dict[str, float] = {}
        for name in self.handle.boundaries:
            saved = 0
            for direction, channel in self.handle.channels(name):
                record = self._since_last(channel.name).record()
                meter = self.handle.meters[channel.name]
                saved += meter.raw_bytes - meter.payload_bytes
                for key, label in (("ratio", "ratio"), ("rel_error", "error"), ("cosine", "cosine")):
                    if record[key] is not None:
                        result[f"compress/{name}/{direction}_{label}"] = round(record[key], 5)
                if record["nonfinite"]:
                    result[f"compress/{name}/{direction}_nonfinite"] = record["nonfinite"]
            result[f"compress/{name}/saved_mb"] = round(saved / 1e6, 3)
        if self.handle.saved is not None:
            result |= self._of_saved(self._since_last("saved"))
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
            result["compress/saved/plain_mb"] = round(found.raw_bytes / found.calls / 1e6, 3)
            result["compress/saved/held_mb"] = round(found.payload_bytes / found.calls / 1e6, 3)
        if found.payload_bytes:
            result["compress/saved/ratio"] = round(found.raw_bytes / found.payload_bytes, 3)
        if found.nonfinite:
            result["compress/saved/nonfinite"] = found.nonfinite
        if torch.accelerator.is_available():
            # Since the process began or the user reset it: these statistics are the user's.
            result["compress/saved/peak_mb"] = round(torch.accelerator.max_memory_allocated() / 1e6, 3)
        if self.handle.budget is not None:
            result["compress/saved/mean_bits"] = round(self.handle.budget.mean_bits(), 3)
        return result
