"""What `hf-actcompress inspect` shows: a model's layers for a given batch, its cuts, and the bytes left there.

Models are built with random weights, on the meta device where their forward allows it.  transformers and timm are
imported inside; nothing is printed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec
from ..codecs.base import raw_nbytes
from ..config import ActCompressConfig
from ..models.layers import Layer, find_layers, match_layers, select_boundaries

Build = Callable[[], nn.Module]
Inputs = Callable[[int, Any], Any]


@dataclass(frozen=True)
class Inspected:
    """A model by name, traced with one batch."""

    layers: list[Layer]  # shapes are those of the asked batch
    notes: list[str]  # what layer discovery warned about
    model: str  # class name
    parameters: int
    inputs: str  # the batch in words


def inspect_model(name: str, *, batch_size: int = 32, seq_len: int = 128, image_size: int = 224) -> Inspected:
    """Build the model `name` (timm name, hub id, local folder, "minilm", "efficientnet-lite0") and trace it.

    Raises ValueError for a name that is not found, a model that is no classifier of texts or images, one without
    layers, and an input size that its forward refuses.
    """
    build, inputs, words = _model(name, seq_len, image_size)

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
            raise ValueError(f"No forward pass of {name!r} succeeded with {words}: {' '.join(notes)}")
        layers = [_grown(a, b, batch_size) for a, b in zip(layers, two, strict=True)]
    parameters = sum(p.numel() for p in model.parameters())
    return Inspected(layers, notes, type(model).__name__, parameters, f"{batch_size} x {words}")


def build_model(name: str, *, seq_len: int = 128, image_size: int = 224) -> tuple[Build, Inputs]:
    """What makes the model with random weights, and what makes inputs of a number of examples on a device.

    Raises ValueError as `inspect_model` does.
    """
    build, inputs, _ = _model(name, seq_len, image_size)
    return build, inputs


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
    logger = logging.getLogger(__package__)
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


# Models by name

def _model(name: str, seq_len: int, image_size: int) -> tuple[Build, Inputs, str]:
    """(builds the model with random weights, makes inputs for a batch size and a device, one example in words)."""
    from ..workloads import models

    pixels = f"{image_size}x{image_size} pixels"

    def images(batch: int, device: Any, channels: int = 3) -> Tensor:
        return torch.zeros(batch, channels, image_size, image_size, device=device)

    architecture = "tf_efficientnet_lite0" if name == models.EFFICIENTNET else name
    folder = Path(models._packaged_minilm() if name == models.MINILM else name).expanduser()
    if not folder.is_dir() and "/" not in name:
        timm = timm_or_none()
        if timm is None and architecture != name:
            raise ValueError(f"{name!r} needs timm: {models.EXAMPLES_INSTALL}.")
        if timm is not None and timm.is_model(architecture):
            own = timm.get_pretrained_cfg(architecture)
            extra = {"img_size": image_size} if own is not None and own.fixed_input_size else {}
            return lambda: timm.create_model(architecture, **extra), images, pixels

    config, auto = classifier_of(str(folder.resolve()) if folder.is_dir() else name)
    if auto.__name__.endswith("ImageClassification"):
        config.image_size = image_size
        channels = getattr(config, "num_channels", None) or 3
        return lambda: auto.from_config(config), lambda *a: {"pixel_values": images(*a, channels)}, pixels

    text = config.get_text_config()
    end = text.eos_token_id if isinstance(getattr(text, "eos_token_id", None), int) else 0
    if getattr(text, "pad_token_id", None) is None:
        config.pad_token_id = text.pad_token_id = end  # decoders refuse batches without one

    def tokens(batch: int, device: Any) -> dict[str, Tensor]:
        # No attention mask: transformers would look at its values, which meta tensors lack.
        ids = torch.full((batch, seq_len), 3, device=device)
        ids[:, -1] = end  # encoder-decoders look for the end of the sentence
        return {"input_ids": ids}

    return lambda: auto.from_config(config), tokens, f"{seq_len} tokens"


def timm_or_none() -> Any:
    try:
        import timm
    except ImportError:
        return None
    return timm


def classifier_of(name: str) -> tuple[Any, Any]:
    """(configuration, transformers' auto class of the classifier) of a folder or hub id."""
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto as auto

    from ..workloads import models
    from ..workloads.hub import hub_state

    state = hub_state()
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=state != "online")
    except (OSError, ValueError, KeyError) as error:
        timm = timm_or_none()
        close = difflib.get_close_matches(name, timm.list_models(), 3) if timm else []
        hint = f" Did you mean timm's {' or '.join(close)}?" if close else ""
        missing = "" if timm else f" (timm is not installed: {models.EXAMPLES_INSTALL})"
        raise ValueError(
            f"{name!r} is no timm model{missing} and no folder, and its "
            f"configuration could not be loaded (hub: {state}).{hint} {str(error).strip().splitlines()[0]}"
        ) from None
    # Some classes choose by this list and do not expect None.
    config.architectures = config.architectures or []
    for mapping, cls in (
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
        (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification),
    ):
        if type(config) in mapping:
            return config, cls
    raise ValueError(
        f"{name!r} is a {config.model_type!r}: transformers has no text or image classifier of it to inspect. Use "
        "hf_actcompress.find_layers(model, example_inputs) in Python."
    )
