"""Takes the records: on a sampled training step the batch is run twice on the side, without compression and with it.

    model(batch) ──▶ [probe] ──▶ plain pass, plain gradient          what the run computes afterwards
                         └─────▶ compressed pass, its gradient       is what it would have computed
                                  └▶ every channel compares its input with what is decoded

Both passes draw the random numbers that the run's own will draw, and codecs work on copies of their state, so the
second is the run's own step.  Random numbers, statistics of batch norms, gradients, meters and states are put back:
losses stay the same to the last bit.  This file knows handles and sites, not trainers.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..boundary.boundary import Channel
from ..codecs import raw_nbytes
from ..models.replay import few_rows, gradients, loss_of, on_the_side, undisturbed
from ..ops.layout import dense
from ..saved.forms import Coded
from ..saved.tensors import Record, SavedTensors
from .measures import Sums, compare, sums_of
from .meter import Meter
from .records import row
from .sensitivity import by_layer

if TYPE_CHECKING:
    from ..attach import Handle

EVERY = 100  # steps between samples: two passes more in a hundred
SHARE = 8  # of a batch's rows one in so many is taken where the saved tensors are compressed: the plain pass must fit


class Probe:
    """A forward pre-hook of the whole model.

    every: samples the first of so many training passes; `arm` says it from outside instead.
    write: called with the rows of each sample; by default they are gathered in `rows`.
    """

    def __init__(self, handle: Handle, every: int = EVERY) -> None:
        if not hasattr(Probe.__call__, "hidden"):  # a break in a compiled graph, as at boundaries
            Probe.__call__ = torch.compiler.disable(Probe.__call__)  # type: ignore[method-assign]
            Probe.__call__.hidden = True  # type: ignore[attr-defined]
        self.handle, self.every = handle, every
        self.rows: list[dict[str, Any]] = []
        self.write: Callable[[list[dict[str, Any]]], None] = self.rows.extend
        self.model = identity_of(handle.model)
        self.step, self.epoch, self.armed = 0, None, False
        self.counts = True  # passes are counted here, as long as nobody calls `arm`

    def __getstate__(self) -> dict[str, Any]:
        return {"handle": None}  # a copy of the model is another model: nothing is measured there

    def arm(self, step: int, epoch: float | None = None) -> None:
        """Measure the next training pass if the step is one to be sampled."""
        self.counts = False
        self.step, self.epoch, self.armed = step, epoch, step % self.every == 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.handle is None or on_the_side() or not module.training or not torch.is_grad_enabled():
            return
        if self.counts:
            self.armed = self.step % self.every == 0
        if self.armed:
            self.armed = False
            self.write(self.sample(module, args, kwargs))
        self.step += self.counts

    def sample(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows of one batch."""
        saved, model = self.handle.saved, self.handle.model
        if saved is not None:
            args, kwargs, _ = few_rows(args, kwargs, _rows(args, kwargs))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]
        rows: list[dict[str, Any]] = []

        def run() -> tuple[float, list[Tensor | None]]:
            with undisturbed(model):
                loss = loss_of(module(*args, **kwargs))
                return float(loss.detach()), gradients(loss, parameters)

        with _without(self.handle):
            plain_loss, exact = run()
        with watched(self.handle, lambda **values: rows.append(values)):
            loss, found = run()
        sums = sums_of(exact, found)
        whole = sum(sums, Sums()).measures()
        groups = [(None, list(range(len(named)))), *by_layer(self.handle.layers, [name for name, _ in named])]
        for layer, chosen in groups:
            values = sum((sums[i] for i in chosen), Sums()).measures()
            rows.append({
                "site": "parameters", "layer": layer and layer.index, "name": layer.name if layer else "",
                "direction": "gradient", "codec": "", "call": 0,
                "numel": sum(parameters[i].numel() for i in chosen), **values,
            })  # fmt: skip
        about = {
            "model": self.model, "step": self.step, "epoch": self.epoch, "loss": loss, "plain_loss": plain_loss,
            "grad_cosine": whole["cosine"], "grad_error": whole["rel_error"],
        }  # fmt: skip
        return [row(**about, **values) for values in rows]


def identity_of(model: nn.Module) -> str:
    """Class and a number that another architecture or size does not share."""
    shapes = ";".join(f"{name}{tuple(p.shape)}" for name, p in model.named_parameters())
    return f"{type(model).__name__}-{zlib.crc32(shapes.encode()):08x}"


class Watched(Channel):
    """A channel that works on a copy of another one's state and reports what it does."""

    def __init__(self, channel: Channel, note: Callable[..., None]) -> None:
        self.__dict__.update(channel.__dict__)
        self.state = None if channel.state is None else channel.state.snapshot()
        self.meter, self._replays = Meter(every=0), dict(channel._replays)
        self.note, self.calls = note, 0

    def __call__(self, x: Tensor, remember: bool = False, learn: bool = True) -> Tensor:
        x = dense(x)
        y = super().__call__(x, remember, learn)
        payload = self.meter.payload_bytes
        self.meter.payload_bytes = 0
        ratio = raw_nbytes(x.shape, x.dtype) / payload if payload else None
        self.note(call=self.calls, codec=str(self.codec), numel=x.numel(), ratio=ratio, **compare(x, y))
        self.calls += 1
        return y


@contextlib.contextmanager
def watched(handle: Handle, note: Callable[..., None]) -> Iterator[None]:
    """Compression as the run's next pass would do it, on copies of all that it remembers; `note` gets a row for each
    tensor that is compressed."""
    before = {name: (boundary.forward, boundary.backward) for name, boundary in handle.boundaries.items()}
    for name, boundary in handle.boundaries.items():
        for direction in ("forward", "backward"):
            head = {"site": "boundary", "layer": handle.cuts[name].index, "name": name, "direction": direction}
            setattr(boundary, direction, Watched(getattr(boundary, direction), _with(note, head)))
    try:
        with contextlib.nullcontext() if handle.saved is None else _watched_saved(handle.saved, note):
            yield
    finally:
        for name, boundary in handle.boundaries.items():
            boundary.forward, boundary.backward = before[name]


@contextlib.contextmanager
def _watched_saved(saved: SavedTensors, note: Callable[..., None]) -> Iterator[None]:
    encode, state, record, auto = saved._encode, saved.state, saved.record, saved.auto
    counts: Counter[str] = Counter()

    def noted(slot: str, run: Tensor, *more: Any, **options: Any) -> Any:
        core = encode(slot, run, *more, **options)
        if isinstance(core, Coded):
            note(
                site="saved", layer=None, name=slot, direction="saved", codec=str(core.codec), call=counts[slot],
                numel=run.numel(), ratio=raw_nbytes(run.shape, run.dtype) / core.nbytes, **compare(run, core.unpack()),
            )  # fmt: skip
            counts[slot] += 1
        return core

    saved._encode = noted  # type: ignore[method-assign]
    saved.state, saved.record = None if state is None else state.snapshot(), Record()
    if auto is not None:
        auto.before = lambda *args: None  # type: ignore[method-assign]  # it measures in the run's own pass
    try:
        yield
    finally:
        del saved._encode
        saved.state, saved.record = state, record
        if auto is not None:
            del auto.before


@contextlib.contextmanager
def _without(handle: Handle) -> Iterator[None]:
    saved = handle.saved
    enabled = saved is not None and saved.enabled
    with handle.disabled():
        if saved is not None:
            saved.enabled = False
        try:
            yield
        finally:
            if saved is not None:
                saved.enabled = enabled


def _with(note: Callable[..., None], head: dict[str, Any]) -> Callable[..., None]:
    return lambda **values: note(**head, **values)


def _rows(args: tuple, kwargs: dict[str, Any]) -> int:
    sizes = [t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    return max(4, sizes[0] // SHARE) if sizes else 4
