"""What `hf-actcompress inspect` shows: a model's layers for a given batch, its cuts, and the bytes left there.

Values come out; nothing is printed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..codecs import Codec, raw_nbytes
from ..config import ActCompressConfig
from ..models.layers import Layer, find_layers, match_layers, select_boundaries

Build = Callable[[], nn.Module]
Inputs = Callable[[int, Any], Any]  # of a number of examples on a device


@dataclass(frozen=True)
class Inspected:
    """A model, traced with one batch."""

    layers: list[Layer]  # their shapes are those of the batch
    notes: list[str]  # what layer discovery warned about
    model: str  # class name
    parameters: int
    tied: dict[str, list[int]]  # parameters that several layers compute with, {name: numbers of the layers}


def inspect_model(build: Build, inputs: Inputs, batch_size: int, what: str) -> Inspected:
    """Build a model and trace it with a batch, on the meta device where its forward allows that.

    what: names the model and the size of its inputs in an error.
    Raises ValueError for a model without layers, and an input size that its forward refuses.
    """

    def trace(model: nn.Module, batch: int) -> tuple[list[Layer], list[str]]:
        with _warnings() as notes:
            return find_layers(model, inputs(batch, next(model.parameters()).device)), notes

    with torch.device("meta"):
        model = build()
    layers, notes = trace(model, batch_size)
    if not _shaped(layers):
        # This forward looks at values, which meta tensors lack.  Two small batches tell how shapes grow.
        model = build()
        (layers, notes), (two, _) = trace(model, 1), trace(model, 2)
        if not (_shaped(layers) and _shaped(two)):
            raise ValueError(f"No forward pass of {what} succeeded: {' '.join(notes)}")
        layers = [_grown(a, b, batch_size) for a, b in zip(layers, two, strict=True)]
    tied, reason = _tied(model, layers, inputs)
    notes += [reason] if reason else []
    return Inspected(layers, notes, type(model).__name__, sum(p.numel() for p in model.parameters()), tied)


def _tied(model: nn.Module, layers: list[Layer], inputs: Inputs) -> tuple[dict[str, list[int]], str]:
    """(parameters that several layers compute with, why the model cannot be cut somewhere)"""
    from ..pipeline.usage import used_parameters

    if len(layers) < 2 or any(layer.stack for layer in layers):
        return {}, ""
    try:
        example = inputs(1, next(model.parameters()).device)
        used = used_parameters(model, layers, range(len(layers) + 1), example) or []
    except ValueError as error:
        return {}, f"as a pipeline: {error}"
    users = {name: [k for k, ids in enumerate(used) if id(p) in ids] for name, p in model.named_parameters()}
    return {name: numbers for name, numbers in users.items() if len(numbers) > 1}, ""


def cut_sizes(layers: list[Layer], config: ActCompressConfig, codecs: Sequence[Codec]) -> list[dict[str, Any]]:
    """One entry per boundary of `config`: its layer, why it is one, and the payload of each codec there.

    A layer that `config.layers` names has its own codec instead of `codecs`.
    """
    chosen = select_boundaries(layers, config.first, config.last, config.placement, config.stack)
    own: dict[str, list[Codec]] = {}
    for pattern, value in (config.layers or {}).items():
        own |= {layer.module: [config.codecs_of(value)[0]] for layer in match_layers(layers, pattern)}
    cuts = []
    for layer in layers:
        marks = _marks(layer, layers, config) if layer in chosen else []
        marks += ["named by --layers"] * (layer.module in own)
        if marks:
            sizes = [_size(codec, layer) for codec in own.get(layer.module, codecs)]
            cuts.append({"layer": layer, "cut": marks, "codecs": sizes})
    return cuts


def describe(layer: Layer) -> dict[str, Any]:
    """A layer as plain values, with the bytes of its output."""
    values = {key: getattr(layer, key) for key in ("index", "name", "kind", "stack", "calls", "output", "shape")}
    nbytes = None if layer.shape is None else raw_nbytes(layer.shape, layer.dtype)
    return {**values, "dtype": str(layer.dtype).removeprefix("torch."), "raw_bytes": nbytes}


def _marks(layer: Layer, layers: list[Layer], config: ActCompressConfig) -> list[str]:
    total = sum(other.stack == layer.stack for other in layers)
    early, late = range(config.first), range(total - config.last - 1, total - 1)
    if config.placement == "cuts":
        early, late = early[-1:], late[:1]
    marks = [f"output of first {config.first}"] if layer.index in early else []
    return marks + ([f"input of last {config.last}"] if layer.index in late else [])


def _size(codec: Codec, layer: Layer) -> dict[str, Any]:
    result = {"codec": str(codec), "payload_bytes": None, "ratio": None}
    if layer.shape is None:
        return {**result, "reason": "the layer puts out no floating point tensor"}
    try:
        nbytes = codec.payload_nbytes(layer.shape, layer.dtype)
    except ValueError as error:  # a rank above the number of features, for one
        return {**result, "reason": str(error)}
    return {**result, "payload_bytes": nbytes, "ratio": raw_nbytes(layer.shape, layer.dtype) / nbytes}


def _shaped(layers: list[Layer]) -> bool:
    return any(layer.shape is not None for layer in layers)


def _grown(one: Layer, two: Layer, batch: int) -> Layer:
    """The layer at `batch`, from batches of 1 and 2: every dimension that grows does so linearly."""
    if one.shape is None or two.shape is None or len(one.shape) != len(two.shape):
        return one
    shape = tuple(a + (batch - 1) * (b - a) for a, b in zip(one.shape, two.shape, strict=True))
    return dataclasses.replace(one, shape=shape)


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what this package logs, which would otherwise appear in the middle of a table or of JSON."""
    from transformers.utils import logging as theirs

    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_actcompress")
    before, verbosity = logger.propagate, theirs.get_verbosity()
    logger.propagate = False
    logger.addHandler(handler)
    theirs.set_verbosity_error()  # it advises on padding and the like, which made-up inputs do not heed
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        theirs.set_verbosity(verbosity)
