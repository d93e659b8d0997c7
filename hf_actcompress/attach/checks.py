"""What is checked before anything is attached to a model."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch import nn

from ..boundary.hook import Boundary
from ..codecs import Codec, parse_codec
from ..config import ActCompressConfig
from ..models.layers import Layer, find_layers
from ..saved.entry import site_of

logger = logging.getLogger(__name__)


def refuse_second(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if site_of(module) or any(isinstance(hook, Boundary) for hook in module._forward_hooks.values()):
            raise ValueError(
                f"The model is compressed already (there is a hook on {name or 'the whole model'}). Call "
                "handle.remove() on the handle that compress_model returned, or leave its `with` block, before "
                "attaching again. Where the handle is lost (a copied model, a run that was stopped): "
                "hf_actcompress.remove_compression(model)."
            )


def check_fits(
    config: ActCompressConfig, layers: list[Layer], cuts: dict[str, tuple[Codec, Codec]], named: set[str]
) -> None:
    """Every codec that a boundary will ever use can take the layer's output, as far as its shape is known."""
    resolved = dict(config.resolved or {})
    for layer in layers:
        if layer.module not in cuts:
            continue
        uses = [("layers", *cuts[layer.module])] if layer.module in named else list(config.all_scheduled())
        if layer.module not in named and (chosen := resolved.pop(layer.name, None)):
            uses.append((f"resolved[{layer.name!r}]", *map(parse_codec, chosen.values())))
        for option, *codecs in uses:
            for codec in codecs:
                if layer.shape is not None and (reason := _misfit(codec, layer.shape, layer.dtype)):
                    raise ValueError(f"{option}: {layer.name}: {reason}")
    if resolved:
        raise ValueError(
            f"resolved= names {', '.join(map(repr, resolved))}, where this model has no boundary whose codec is "
            f"chosen automatically. It has: {', '.join(n.name for n in layers if n.module in cuts.keys() - named)}. "
            "Leave resolved= out to have codecs chosen anew."
        )


def check_saved_fits(config: ActCompressConfig, model: nn.Module, layers: list[Layer], example_inputs: Any) -> None:
    """Refuse a codec of saved tensors that can take no layer's output."""
    codec = config.saved_codec()
    if codec is None or not _misfit(codec, (8, 8), torch.float32):
        return  # it takes every shape
    if not layers:
        with contextlib.suppress(ValueError):  # layers are no condition for saved tensors
            layers = find_layers(model, example_inputs, config.blocks, option="blocks")
    reasons = [_misfit(codec, layer.shape, layer.dtype) for layer in layers if layer.shape is not None]
    if reasons and all(reasons):
        raise ValueError(f"saved: {reasons[-1]} No layer's output of this model can be compressed with it.")


def _misfit(codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Why the codec cannot take such a tensor, or None."""
    try:
        codec.payload_nbytes(shape, dtype)
    except ValueError as error:
        return str(error)
    return None
