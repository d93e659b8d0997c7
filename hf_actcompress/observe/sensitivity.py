"""How much a model's gradient, loss and outputs suffer from one codec at one boundary, all others left exact.

    forward:   one pass without compression; then for each layer and codec a pass with that alone
    backward:  the graph of the plain pass is kept, and for each layer and codec only the backward pass is run again

The measure is the gradient of the parameters, because that is all that training takes from a batch.  Gradients,
statistics, random numbers and states of codecs are as before afterwards.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..codecs import Codec
from ..models.layers import Layer
from ..models.replay import gradients, loss_of, undisturbed
from .events import Event
from .gradients import ExactPass
from .measures import Sums, compare, rms_error, sums_of

DIRECTIONS = ("forward", "backward")
Look = Callable[[str, str, str, Tensor, Tensor], None]


def sensitivity(
    handle: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any], codecs: dict[str, Sequence[Codec]],
    names: Sequence[str] | None = None, advance: Callable[[], None] = lambda: None, look: Look | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for every direction, boundary and codec, measured on one batch.

    handle: the Handle of the model with its boundaries; their own codecs take no part.
    codecs: the candidates for "forward" and for "backward".
    names: the boundaries, by default all.
    advance: called after each row.
    look: called with (name, direction, codec, input, decoded).

    A row holds the layer, the codec, its bytes, the measures of `compare`, `grad_cosine` and `grad_error` of the
    parameters' gradient, `layer_error` (the root mean square over layers of the relative error of each one's own
    gradient), and for forward codecs `loss_change` and `logits_error` too.  Values are None where NaN or Inf came up.
    """
    named = [(name, p) for name, p in handle.model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    groups = by_layer(handle.layers, [name for name, _ in named]) or [(None, list(range(len(named))))]
    names = list(handle.boundaries) if names is None else list(names)
    rows: list[dict[str, Any]] = []
    tensor: dict[str, Any] = {}  # what the last event said

    def note(event: Event) -> None:
        y = event.decode()
        tensor.update(numel=event.x.numel(), raw_bytes=event.raw_bytes, payload_bytes=event.payload_bytes,
                      ratio=event.raw_bytes / event.payload_bytes, **compare(event.x, y))  # fmt: skip
        if look is not None:
            look(event.name, event.direction, str(event.codec), event.x, y)

    with contextlib.ExitStack() as stack:
        stack.enter_context(handle.disabled())
        channels = {name: stack.enter_context(handle.boundaries[name].candidates(note)) for name in names}

        def each(direction: str) -> Iterator[tuple[str, Codec]]:
            for name in names:
                for codec in codecs.get(direction, ()):
                    tensor.clear()
                    channels[name][direction].codec = codec
                    try:
                        yield name, codec
                    finally:
                        channels[name][direction].codec = None

        def row(name: str, direction: str, codec: Codec, sums: list[Sums], **more: Any) -> None:
            whole = sum(sums, Sums()).measures()
            layers = rms_error(sum((sums[i] for i in chosen), Sums()) for _, chosen in groups)
            rows.append({
                "layer": handle.cuts[name].index, "name": name, "direction": direction, "codec": str(codec), **tensor,
                "grad_cosine": whole["cosine"], "grad_error": whole["rel_error"], "layer_error": layers, **more,
            })  # fmt: skip
            advance()

        with undisturbed(handle.model):
            plain = ExactPass(module, args, kwargs, parameters)
            for name, codec in each("backward"):
                row(name, "backward", codec, plain.backward())
            exact, logits, plain_loss = plain.exact, _logits(plain.output), float(plain.loss.detach())
            del plain  # the graph
        for name, codec in each("forward"):
            with undisturbed(handle.model):
                output = module(*args, **kwargs)
                loss = loss_of(output)
                error = sums_of([logits], [_logits(output)])[0].measures()["rel_error"]
                change = float(loss.detach()) - plain_loss
                row(name, "forward", codec, sums_of(exact, gradients(loss, parameters)), logits_error=error,
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


def by_layer(layers: Sequence[Layer], names: Sequence[str]) -> list[tuple[Layer, list[int]]]:
    """Each layer that has parameters, with the positions of their names in `names`."""
    groups = []
    for layer in layers:
        own = tuple(f"{part}." for part in layer.parts or (layer.module,))
        chosen = [i for i, name in enumerate(names) if name.startswith(own)]
        if chosen:
            groups.append((layer, chosen))
    return groups


def _logits(output: Any) -> Tensor | None:
    if isinstance(output, dict):
        output = output.get("logits", output)
    tensors = [t for t in tree_flatten(dict(output) if isinstance(output, dict) else output)[0]
               if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]  # fmt: skip
    return tensors[0].detach() if tensors else None
