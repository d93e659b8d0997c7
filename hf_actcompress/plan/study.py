"""What `hf-actcompress analyze` finds: the errors of each codec at each layer of a model, on a few batches.

Nothing is trained, printed or drawn here; the result is plain values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attach import Handle, compress_model
from ..codecs import Codec, parse_codec
from ..config import ActCompressConfig
from ..models.layers import find_layers, first_tensor
from ..models.replay import undisturbed
from ..observe.records import rounded
from ..observe.sensitivity import DIRECTIONS, batches_mean, sensitivity

BINS = 60  # of a histogram


def study(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], codecs: Sequence[str], *, blocks: list[str] | None = None,
    seed: int = 0, advance: Callable[[], None] = lambda: None, begin: Callable[[int], None] = lambda total: None,
) -> dict[str, Any]:  # fmt: skip
    """The errors of codecs at each cut of a model, as a dict of plain values.

    `layers` (index, name, shape), `codecs` and `left_out` (those that cannot take a layer's output, with the reason),
    `map` (a row for each direction, layer and codec; observe/sensitivity.py), `growth` (rows of `growth`) and
    `histograms` (of `histogram`, at the first, middle and last cut).  `begin` is told how often `advance` will be
    called.  Raises ValueError if no codec fits all layers.
    """
    example = {key: value for key, value in batches[0].items() if key != "labels"}
    layers = find_layers(model, example, blocks, option="blocks")
    config = ActCompressConfig("identity", first=len(layers) - 1, last=0, blocks=blocks, seed=seed)
    with compress_model(model, config, example_inputs=example) as handle:
        fits, left_out = _fitting(handle, codecs)
        begin(len(fits) * (len(batches) * len(handle.boundaries) * len(DIRECTIONS) + 2))
        histograms: list[dict[str, Any]] = []
        names = list(handle.boundaries)
        shown = {names[i] for i in {0, len(names) // 2, len(names) - 1}}
        drawn = _drawn(fits)
        tables = []
        for number, batch in enumerate(batches):

            def look(name: str, direction: str, codec: str, x: Tensor, y: Tensor) -> None:
                if name in shown and codec in drawn:
                    histograms.append({"name": name, "direction": direction, "codec": codec, **histogram(x, y)})

            tables.append(sensitivity(
                handle, model, (), batch, dict.fromkeys(DIRECTIONS, fits), advance=advance,
                look=look if number == 0 else None,
            ))  # fmt: skip
        grown = list(growth(handle, model, batches[0], fits, advance))
    return rounded({
        "layers": [{"index": layer.index, "name": layer.name, "shape": layer.shape} for layer in layers],
        "codecs": [str(codec) for codec in fits], "left_out": left_out, "map": batches_mean(tables), "growth": grown,
        "histograms": histograms,
    })  # fmt: skip


def growth(
    handle: Handle, model: nn.Module, batch: dict[str, Tensor], codecs: Sequence[Codec], advance: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """How the relative error of a forward pass grows through the layers, with each codec at the first cut alone and at
    every cut.  The error at a cut is that of the next layer's input."""
    outputs: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor]:
        with undisturbed(model), torch.no_grad():
            model(**batch)
        return {name: value.float() for name, value in outputs.items()}

    with contextlib.ExitStack() as stack:
        for name, layer in handle.cuts.items():

            def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                outputs[name] = first_tensor(output).detach()

            # A hook that is added now runs after the boundary's own, so it sees what the next layer gets.
            stack.callback(model.get_submodule(layer.module).register_forward_hook(keep).remove)
        channels = [stack.enter_context(boundary.candidates())["forward"] for boundary in handle.boundaries.values()]
        exact = run()
        for codec in codecs:
            for where in ("first", "every"):
                for number, channel in enumerate(channels):
                    channel.codec = codec if where == "every" or number == 0 else None
                found = run()
                for name, layer in handle.cuts.items():
                    error = torch.linalg.vector_norm(found[name] - exact[name]) / torch.linalg.vector_norm(exact[name])
                    yield {"codec": str(codec), "where": where, "layer": layer.index, "name": name,
                           "rel_error": float(error) if torch.isfinite(error) else None}  # fmt: skip
                advance()


def histogram(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Counts of the values before and after in the same bins, which span the range of both."""
    x, y = x.detach().float(), y.detach().float()
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        return {"low": None, "high": None, "before": [], "after": []}
    high = high if high > low else low + 1.0
    counts = [torch.histc(t, BINS, low, high).int().tolist() for t in (x, y)]
    return {"low": low, "high": high, "before": counts[0], "after": counts[1]}


def _drawn(codecs: Sequence[Codec]) -> set[str]:
    """The codec with the fewest bits of each family: histograms of finer ones show nothing."""
    least: dict[str, Codec] = {}
    for codec in codecs:
        family = str(codec).partition("bits=")[0]
        if family not in least or (codec.traits.bits or 0) < (least[family].traits.bits or 0):
            least[family] = codec
    return {str(codec) for codec in least.values()}


def _fitting(handle: Handle, specs: Sequence[str]) -> tuple[list[Codec], dict[str, str]]:
    fits, left_out = [], {}
    for codec in dict.fromkeys(map(parse_codec, specs)):
        try:
            for layer in handle.cuts.values():
                if layer.shape is not None:
                    codec.payload_nbytes(layer.shape, layer.dtype)
        except ValueError as error:
            left_out[str(codec)] = str(error)
            continue
        fits.append(codec)
    if not fits:
        raise ValueError(f"No codec fits all layers: {'; '.join(left_out.values())}")
    return fits, left_out
