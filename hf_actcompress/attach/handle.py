"""What compress_model returns: statistics, state, switches, and the way back."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ..boundary.channel import Channel
from ..boundary.hook import Boundary
from ..config import ActCompressConfig
from ..models.layers import Layer
from ..observe.auto import AutoCodec
from ..observe.events import Listener
from ..observe.meter import Meter
from ..observe.nonfinite import check
from ..observe.probe import Probe
from ..saved.budget import Budget
from ..saved.tensors import SavedTensors

if TYPE_CHECKING:
    from ..reduce.hook import Reduction

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _switched_off(sites: Iterable[Any]) -> Iterator[None]:
    before = [(site, site.enabled) for site in sites]
    for site, _ in before:
        site.enabled = False
    try:
        yield
    finally:
        for site, enabled in before:
            site.enabled = enabled


class Handle:
    """Compression attached to a model.  A context manager: leaving it removes the hooks."""

    def __init__(self, model: nn.Module, config: ActCompressConfig, layers: list[Layer]) -> None:
        self.model, self.config, self.layers = model, config, layers
        self.boundaries: dict[str, Boundary] = {}
        self.cuts: dict[str, Layer] = {}
        self.saved: SavedTensors | None = None
        self.reduction: Reduction | None = None
        self.probe: Probe | None = None
        self.auto: AutoCodec | None = None
        self.budget: Budget | None = None
        self.meters: dict[str, Meter] = {}  # by "<boundary>/forward", "<boundary>/backward" and "saved"
        self._removers: list[Any] = []
        self._named: set[str] = set()  # boundaries whose codec `layers` fixes: the schedule leaves them alone
        self.epoch = 0

    def __enter__(self) -> "Handle":
        if not self._removers:
            raise ValueError("This compression was removed from its model. Call compress_model again.")
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    @property
    def sites(self) -> list[Boundary | SavedTensors]:
        """Every boundary, and the saved tensors if they are compressed."""
        return [*self.boundaries.values(), *([] if self.saved is None else [self.saved])]

    def remove(self) -> None:
        """Take every hook off and undo every setting.  Statistics stay readable.  Calling it again does nothing."""
        while self._removers:
            self._removers.pop().remove()
        for site in self.sites:
            site.enabled = False  # a graph that was compiled while the hooks were there may still call them

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run without any compression for a while, hooks staying in place."""
        with _switched_off([*self.sites, *([] if self.reduction is None else [self.reduction])]):
            yield

    @contextlib.contextmanager
    def saving(self) -> Iterator[list[Any]]:
        """Compress what autograd saves within this context, for passes that do not go through the model's forward:
        `model.encode(...)`, `model.get_text_features(...)`, a loss that is computed outside of it.

            with handle.saving() as outputs:
                loss = loss_of(model.encode(batch))
                outputs.append(loss)

        What is appended tells where the pass ends; without it the last operations are kept exactly.
        Raises ValueError where `saved=` is not configured.
        """
        if self.saved is None:
            raise ValueError(
                "handle.saving() compresses saved tensors, and saved= is not set; give it to ActCompressConfig."
            )
        outputs: list[Any] = []
        with self.saved.running(outputs):
            yield outputs

    def report(self) -> list[dict[str, Any]]:
        """What the last pass saved: one record per operation and way of keeping it, the most held bytes first.

        Each has operation, kept ("codes", "normalised", "made again", "one bit", "shape", "integers" or "exactly"),
        tensors, raw_bytes (what autograd would hold, memory that is shared counted once) and held_bytes.
        """
        return [] if self.saved is None else list(self.saved.rows)

    @contextlib.contextmanager
    def isolated(self, *listeners: Listener) -> Iterator[None]:
        """Run with compression on copies of all that it remembers, for a measurement.

        Only `listeners` are told of what the sites do (observe/events.py); states and meters are as before afterwards.
        """
        with contextlib.ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(site.isolated(*listeners))
            yield

    def check_finite(self) -> None:
        """With nonfinite="raise": raises FloatingPointError where NaN or Inf came up since the last check.

        Waits for a GPU.
        """
        channels = [channel for name in self.boundaries for _, channel in self.channels(name)]
        check([site.found for site in (*channels, *([] if self.saved is None else [self.saved]))])

    def set_epoch(self, epoch: int) -> bool:
        """Switch codecs as `schedule` says; returns whether any changed."""
        if not self.boundaries or self.auto is not None:
            self.epoch = epoch
            return False
        codecs = self.config.scheduled(epoch)
        changed = codecs != self.config.scheduled(self.epoch)
        self.epoch = epoch
        for name, boundary in self.boundaries.items():
            if name not in self._named:
                boundary.set_codecs(*codecs)
        if changed:
            logger.info("epoch %d: boundaries now use %s forward and %s backward", epoch, *codecs)
        return changed

    def stats(self) -> list[dict[str, Any]]:
        """One record per boundary and direction: codec, calls, ratio, rel_error, cosine, bytes, seconds."""
        rows = []
        for name, layer in self.cuts.items():
            for direction, channel in self.channels(name):
                head = {"boundary": name, "layer": layer.index, "direction": direction, "codec": str(channel.codec)}
                rows.append(head | self.meters[channel.name].record())
        if self.saved is not None:
            head = {"boundary": "saved for backward", "layer": None, "direction": "saved", "codec": self._saved_spec}
            rows.append(head | self.meters["saved"].record() | {"seconds": None})
        if self.reduction is not None:
            head = {"boundary": "gradients of all processes", "layer": None, "direction": "reduce",
                    "codec": str(self.reduction.codec)}  # fmt: skip
            rows.append(head | self.meters["reduce"].record() | {"seconds": None})
        return rows

    @property
    def _saved_spec(self) -> str:
        assert self.saved is not None
        return str(self.budget or self.saved.codec)

    def channels(self, name: str) -> list[tuple[str, Channel]]:
        boundary = self.boundaries[name]
        return [("forward", boundary.forward), ("backward", boundary.backward)]

    # -- state ------------------------------------------------------------------------------------------------
    @property
    def _saved_remembers(self) -> bool:
        return self.saved is not None and self.saved.state is not None or self.budget is not None

    def state_dict(self) -> dict[str, Any]:
        """What codecs remember, by boundary and direction: warm starts, noise counters, error feedback."""
        result: dict[str, Any] = {} if self.auto is None else {"auto": self.auto.state_dict()}
        for name in self.boundaries:
            for direction, channel in self.channels(name):
                if channel.state is not None:
                    result[f"{name}/{direction}"] = {"codec": str(channel.codec), "state": channel.state.state_dict()}
        if self.saved is not None and self._saved_remembers:
            state = None if self.saved.state is None else self.saved.state.state_dict()
            result["saved"] = {"codec": self._saved_spec, "state": state}
            if self.budget is not None:
                result["saved"]["budget"] = self.budget.state_dict()
        if self.reduction is not None:
            result["reduce"] = {"codec": str(self.reduction.codec), "state": self.reduction.state_dict()}
        return result

    def load_state_dict(self, values: dict[str, Any]) -> list[str]:
        """Take over the state of sites that have the same codec; returns the names of those that did not.

        Raises ValueError for what `state_dict` does not return.
        """
        whole = isinstance(values, dict) and all(
            key == "auto" or isinstance(entry, dict) and {"codec", "state"} <= entry.keys()
            for key, entry in values.items()
        )
        if not whole:
            found = f"a dict of {sorted(map(str, values))}" if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"load_state_dict got {found}; give it what handle.state_dict() returned.")
        missed = []
        if self.auto is not None and "auto" in values:
            self.auto.load_state_dict(values["auto"])
        for name in self.boundaries:
            for direction, channel in self.channels(name):
                if channel.state is None:
                    continue
                entry = values.get(f"{name}/{direction}")
                if entry is None or entry["codec"] != str(channel.codec):
                    missed.append(f"{name}/{direction}")
                else:
                    channel.state.load_state_dict(entry["state"])
        if self.saved is not None and self._saved_remembers:
            entry = values.get("saved")
            if entry is None or entry["codec"] != self._saved_spec:
                missed.append("saved")
            else:
                if self.saved.state is not None:
                    self.saved.state.load_state_dict(entry["state"])
                if self.budget is not None and "budget" in entry:  # not in checkpoints of version 0.1
                    self.budget.load_state_dict(entry["budget"])
        if self.reduction is not None:
            entry = values.get("reduce")
            if entry is None or entry["codec"] != str(self.reduction.codec):
                missed.append("reduce")
            else:
                self.reduction.load_state_dict(entry["state"])
        return missed
