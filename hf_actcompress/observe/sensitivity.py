"""How much a model's gradient, loss and outputs suffer from one codec at one boundary, all others left exact.

    forward:   one pass without compression; then for each layer and codec a pass with that alone
    backward:  the graph of the plain pass is kept, and for each layer and codec only the way back is run again

The measure is the gradient of the parameters, because that is all that training takes from a batch.  Nothing is left
behind: gradients, statistics, random numbers and states of codecs stay as they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..boundary.boundary import roundtrip
from ..codecs import Codec, raw_nbytes
from ..models.layers import Layer
from ..models.replay import gradients, loss_of, undisturbed
from ..ops.layout import dense
from .measures import Sums, compare, rms_error, sums_of

if TYPE_CHECKING:
    from ..attach import Handle

DIRECTIONS = ("forward", "backward")


class Exchange:
    """Stands in for a channel: hands tensors on as they are, or as `codec` leaves them, from a fresh state each time,
    so that a recomputed pass sees the same."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        self.codec: Codec | None = None
        self.look: Callable[[Tensor, Tensor], None] | None = None
        self.row: dict[str, Any] = {}

    def __call__(self, x: Tensor, remember: bool = False, learn: bool = True) -> Tensor:
        if self.codec is None or x.numel() == 0:
            return x.clone()
        x = dense(x)
        y = roundtrip(self.codec, x, self.codec.init_state(self.name, self.seed), check=True)
        raw, nbytes = raw_nbytes(x.shape, x.dtype), self.codec.payload_nbytes(tuple(x.shape), x.dtype)
        self.row = {"numel": x.numel(), "raw_bytes": raw, "payload_bytes": nbytes, "ratio": raw / nbytes}
        self.row |= compare(x, y)
        if self.look is not None:
            self.look(x, y)
        return y

    replay = __call__


def sensitivity(
    handle: Handle,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    codecs: dict[str, Sequence[Codec]],
    names: Sequence[str] | None = None,
    advance: Callable[[], None] = lambda: None,
    look: Callable[[str, str, str, Tensor, Tensor], None] | None = None,
) -> list[dict[str, Any]]:
    """One row for every direction, boundary and codec, measured on one batch.

    handle: of the model with its boundaries; their own codecs take no part.
    codecs: the candidates for "forward" and for "backward".
    names: the boundaries, by default all.
    advance: called after each row.  look: is shown (name, direction, codec, input, decoded).

    A row holds the layer, the codec, its bytes, the measures of `compare`, `grad_cosine` and `grad_error` of the
    parameters' gradient, `layer_error` (the root mean square over layers of the relative error of each one's own
    gradient), and for forward codecs `loss_change` and `logits_error` too.  Values are None where NaN or
    Inf came about.
    """
    model = handle.model
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    groups = by_layer(handle.layers, [name for name, _ in named]) or [(None, list(range(len(named))))]
    names = list(handle.boundaries) if names is None else list(names)
    rows: list[dict[str, Any]] = []
    with _exchanged(handle, names) as places:

        def row(name: str, direction: str, codec: Codec, place: Exchange, found: list[Any], **more: Any) -> None:
            sums = sums_of(exact, found)
            apart = sum(sums, Sums()).measures()
            layers = rms_error(sum((sums[i] for i in chosen), Sums()) for _, chosen in groups)
            rows.append({
                "layer": handle.cuts[name].index, "name": name, "direction": direction, "codec": str(codec),
                **place.row, "grad_cosine": apart["cosine"], "grad_error": apart["rel_error"], "layer_error": layers,
                **more,
            })  # fmt: skip
            advance()

        @contextlib.contextmanager
        def using(name: str, direction: str, codec: Codec) -> Iterator[Exchange]:
            place = places[name, direction]
            place.codec, place.row = codec, {}
            place.look = None if look is None else lambda x, y: look(name, direction, str(codec), x, y)
            try:
                yield place
            finally:
                place.codec = None

        with undisturbed(model):
            output = module(*args, **kwargs)
            loss, plain = loss_of(output), _logits(output)
            exact = gradients(loss, parameters, again=True)
            for name in names:
                for codec in codecs.get("backward", ()):
                    with using(name, "backward", codec) as place:
                        row(name, "backward", codec, place, gradients(loss, parameters, again=True))
            del output
        plain_loss = float(loss.detach())
        del loss  # the graph
        for name in names:
            for codec in codecs.get("forward", ()):
                with using(name, "forward", codec) as place, undisturbed(model):
                    output = module(*args, **kwargs)
                    loss = loss_of(output)
                    error = sums_of([plain], [_logits(output)])[0].measures()["rel_error"]
                    change = float(loss.detach()) - plain_loss
                    row(name, "forward", codec, place, gradients(loss, parameters), logits_error=error,
                        loss_change=change if math.isfinite(change) else None, plain_loss=plain_loss)  # fmt: skip
                    del output, loss
    return rows


def batches_mean(tables: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean over batches of tables with the same rows; errors as root mean squares; None where no batch has one."""
    result = []
    for rows in zip(*tables, strict=True):
        mean = dict(rows[0])
        for key, value in rows[0].items():
            if isinstance(value, (float, int)) and key != "layer" or value is None:
                values = [row[key] for row in rows if row[key] is not None]
                squares = key.endswith("error")
                total = sum(v * v if squares else v for v in values) / len(values) if values else None
                mean[key] = math.sqrt(total) if squares and total is not None else total
        result.append(mean)
    return result


def by_layer(layers: Sequence[Layer], names: Sequence[str]) -> list[tuple[Layer | None, list[int]]]:
    """Each layer that has parameters, with the places of their names."""
    groups: list[tuple[Layer | None, list[int]]] = []
    for layer in layers:
        own = tuple(f"{part}." for part in layer.parts or (layer.module,))
        chosen = [i for i, name in enumerate(names) if name.startswith(own)]
        if chosen:
            groups.append((layer, chosen))
    return groups


@contextlib.contextmanager
def _exchanged(handle: Handle, names: Sequence[str]) -> Iterator[dict[tuple[str, str], Exchange]]:
    before = {name: (boundary.forward, boundary.backward, boundary.enabled)
              for name, boundary in handle.boundaries.items()}  # fmt: skip
    places, saved = {}, handle.saved
    enabled = saved is not None and saved.enabled
    try:
        for name, boundary in handle.boundaries.items():
            boundary.enabled = name in names
            for direction in DIRECTIONS:
                places[name, direction] = Exchange(f"{name}/{direction}", handle.config.seed)
                setattr(boundary, direction, places[name, direction])
        if saved is not None:
            saved.enabled = False
        yield places
    finally:
        for name, boundary in handle.boundaries.items():
            boundary.forward, boundary.backward, boundary.enabled = before[name]
        if saved is not None:
            saved.enabled = enabled


def _logits(output: Any) -> Tensor | None:
    if isinstance(output, dict):
        output = output.get("logits", output)
    tensors = [t for t in tree_flatten(dict(output) if isinstance(output, dict) else output)[0]
               if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]  # fmt: skip
    return tensors[0].detach() if tensors else None
