"""Takes the records: on a sampled training step the batch is run twice on the side, without compression and with it.

    model(batch) ──▶ [probe] ──▶ plain pass, plain gradient          what the run computes afterwards
                         └─────▶ compressed pass, its gradient       is what it would have computed
                                  └▶ every site tells what it makes of each tensor

Both passes draw the random numbers that the run's own will draw, and codecs work on copies of their state, so the
second is the run's own step.  Random numbers, statistics of batch norms, gradients, meters and states are put back:
losses stay the same to the last bit.  The handle of the model is handed in; no site knows the probe.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import raw_nbytes
from ..models.hooks import outside_of_graphs
from ..models.replay import few_rows, gradients, loss_of, on_the_side, undisturbed
from .events import Event
from .measures import Sums, described, read, sketch, sums_of
from .records import row
from .sensitivity import by_layer

EVERY = 100  # steps between samples: two passes more in a hundred
SHARE = 8  # of a batch's rows one in so many is taken where the saved tensors are compressed: the plain pass must fit


class Probe:
    """A forward pre-hook of the whole model.

    handle: the Handle of the model.
    every: samples the first of so many training passes; `arm` says it from outside instead.
    write: called with the rows of each sample; by default they are gathered in `rows`.
    """

    def __init__(self, handle: Any, every: int = EVERY) -> None:
        outside_of_graphs(Probe)
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
        model = self.handle.model
        if self.handle.saved is not None:
            args, kwargs, _ = few_rows(args, kwargs, _rows(args, kwargs))
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        parameters = [p for _, p in named]

        def run() -> tuple[Tensor, list[Tensor | None]]:
            with undisturbed(model):
                loss = loss_of(module(*args, **kwargs))
                return loss.detach(), gradients(loss, parameters)

        with self.handle.disabled():
            plain_loss, exact = run()
        tensors = TensorRows({name: layer.index for name, layer in self.handle.cuts.items()})
        with self.handle.isolated(tensors):
            loss, found = run()
        rows, sums = tensors.rows(), sums_of(exact, found)
        groups = [(None, list(range(len(named)))), *by_layer(self.handle.layers, [name for name, _ in named])]
        measured = [sum((sums[i] for i in chosen), Sums()).measures() for _, chosen in groups]
        for (layer, chosen), values in zip(groups, measured, strict=True):
            rows.append({
                "site": "parameters", "layer": layer and layer.index, "name": layer.name if layer else "",
                "direction": "gradient", "codec": "", "call": 0,
                "numel": sum(parameters[i].numel() for i in chosen), **values,
            })  # fmt: skip
        about = {
            "model": self.model, "step": self.step, "epoch": self.epoch, "loss": float(loss),
            "plain_loss": float(plain_loss), "grad_cosine": measured[0]["cosine"],
            "grad_error": measured[0]["rel_error"],
        }  # fmt: skip
        return [row(**about, **values) for values in rows]


class TensorRows:
    """A listener that makes a row of every tensor that goes through a codec.

    layers: index of each layer by name.
    """

    def __init__(self, layers: dict[str, int]) -> None:
        self.layers = layers
        self._found: list[tuple[dict[str, Any], Tensor]] = []
        self._calls: Counter[tuple[str, str, str]] = Counter()

    def __call__(self, event: Event) -> None:
        if event.codec is None or event.x is None:
            return
        place, raw = (event.site, event.name, event.direction), raw_nbytes(event.x.shape, event.x.dtype)
        self._found.append(({
            "site": event.site, "layer": self.layers.get(event.name) if event.site == "boundary" else None,
            "name": event.name, "direction": event.direction, "call": self._calls[place], "codec": str(event.codec),
            "numel": event.x.numel(), "ratio": raw / event.payload_bytes if event.payload_bytes else None,
        }, sketch(event.x, event.decode())))  # fmt: skip
        self._calls[place] += 1

    def rows(self) -> list[dict[str, Any]]:
        """Waits once for the device."""
        numbers = read([values for _, values in self._found])
        return [about | described(values) for (about, _), values in zip(self._found, numbers, strict=True)]


def identity_of(model: nn.Module) -> str:
    """Class and a number that another architecture or size does not share."""
    shapes = ";".join(f"{name}{tuple(p.shape)}" for name, p in model.named_parameters())
    return f"{type(model).__name__}-{zlib.crc32(shapes.encode()):08x}"


def _rows(args: tuple, kwargs: dict[str, Any]) -> int:
    sizes = [t.shape[0] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    return max(4, sizes[0] // SHARE) if sizes else 4
