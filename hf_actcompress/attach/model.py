"""Attach compression to a model, and take it off again.

Forward hooks only: no parameter is renamed, `state_dict`, `save_pretrained`, `deepcopy` and pickling stay as they
were.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from ..boundary.compiled import HookGuards, eagerly
from ..boundary.hook import Boundary, Passes
from ..codecs import Codec
from ..config import ActCompressConfig
from ..models.first_pass import FirstPass
from ..models.layers import Layer, check_model, find_layers, layers_after, match_layers, select_boundaries
from ..models.tracing import Run
from ..observe.auto import AutoCodec
from ..observe.meter import Meter
from ..observe.probe import Probe
from ..ops.cpu.malloc import KeptMemory
from ..saved.budget import CODEC, Budget
from ..saved.entry import Entry, release
from ..saved.tensors import SavedTensors
from .checks import check_fits, check_saved_fits, refuse_second
from .handle import Handle

logger = logging.getLogger(__name__)


def compress_model(
    model: nn.Module,
    config: ActCompressConfig | str | dict | Codec | None = None,
    *,
    example_inputs: Any = None,
) -> Handle:
    """Compress the activations that leave the first layers and enter the last ones, and their gradients; or the
    tensors that autograd saves; or both.

    model: any transformers or timm model, also inside DistributedDataParallel or torch.compile; or any module whose
        blocks `hf_actcompress.find_layers` recognises.
    config: an ActCompressConfig, or the codec of boundaries (default block:bits=4).
    example_inputs: inputs of one forward pass, for models whose input cannot be guessed.

    Everything is checked first and attached then: after an error the model is as it was.
    Raises ValueError for a model without layers, `first` or `last` beyond them, a glob that matches nothing, a codec
    (also one of the schedule, or chosen by an earlier run) that cannot take a layer's output, such as a rank above its
    features, and a model that is compressed already.
    """
    config = ActCompressConfig.of(config)
    inner = unwrap(model)
    refuse_second(inner)
    with eagerly():
        layers = find_layers(inner, example_inputs, config.blocks, option="blocks") if config.boundaries else []
    cuts, named = _cuts(config, layers)
    check_fits(config, layers, cuts, named)
    if config.saved:
        check_saved_fits(config, inner, layers, example_inputs)
    handle = Handle(inner, config, layers)
    try:
        _attach(handle, cuts, named)
        if any(layer.shape is None for layer in layers):
            handle._removers.append(FirstPass(inner, partial(_settle, handle)))
        if handle.saved is not None and hasattr(model, "_orig_mod"):
            # It may have compiled the model's call as it was.
            handle._removers.append(Entry(model, handle.saved))
    except BaseException:
        handle.remove()
        raise
    return handle


def _cuts(config: ActCompressConfig, layers: list[Layer]) -> tuple[dict[str, tuple[Codec, Codec]], set[str]]:
    """(codecs of both directions by the module path of each cut, the paths among them whose codecs `layers=` fixes)"""
    chosen = select_boundaries(layers, config.first, config.last, config.placement, config.stack)
    codecs, named = {layer.module: config.scheduled(0) for layer in chosen}, set()
    for pattern, value in (config.layers or {}).items():
        for layer in match_layers(layers, pattern):
            named.add(layer.module)
            codecs[layer.module] = config.codecs_of(value)
    return codecs, named


def _attach(handle: Handle, codecs: dict[str, tuple[Codec, Codec]], named: set[str]) -> None:
    config, model = handle.config, handle.model
    # Ranks draw different noise.  The launchers' variable is used, so that nothing here needs torch.distributed.
    seed = config.seed + 1_000_003 * int(os.environ.get("RANK", 0))
    passes = Passes(handle.boundaries, _patience(model))
    for layer in handle.layers:
        if layer.module not in codecs:
            continue
        boundary = Boundary(
            layer.name,
            *codecs[layer.module],
            seed=seed,
            evaluate=config.evaluate != "off",
            nonfinite=config.nonfinite,
            passes=passes,
        )
        for channel in boundary.channels.values():
            handle.meters[channel.name] = Meter(config.meter_every)
            channel.listeners.append(handle.meters[channel.name])
            passes.found.append(channel.found)
        handle.boundaries[layer.name] = boundary
        handle.cuts[layer.name] = layer
        if layer.module in named:
            handle._named.add(layer.name)
        # Before the hooks of others, such as those that collect hidden states: all get what the next layer gets.
        handle._removers.append(model.get_submodule(layer.module).register_forward_hook(boundary, prepend=True))
    if handle.boundaries:
        handle._removers.append(model.register_forward_pre_hook(passes, prepend=True))
        handle._removers.append(model.register_forward_hook(passes, always_call=True))
        handle._removers.append(HookGuards())
    if config.saved:
        if config.saved_auto is not None:
            handle.budget = Budget(handle, config.saved_auto)
        codec, bits = (config.saved_codec(), None) if handle.budget is None else (CODEC, handle.budget.bits)
        handle.saved = SavedTensors(model, codec, bits, seed=seed, nonfinite=config.nonfinite)
        handle.meters["saved"] = Meter(every=0)
        handle.saved.listeners.append(handle.meters["saved"])
        handle._removers.append(Entry(model, handle.saved))
    if config.reduce:
        from ..reduce.hook import Reduction  # which imports torch.distributed
        from ..reduce.spec import parse_reduce

        handle.reduction = Reduction(model, parse_reduce(config.reduce), seed)
        handle.meters["reduce"] = Meter(every=0)
        handle.reduction.listeners.append(handle.meters["reduce"])
        handle._removers.append(handle.reduction)
    if config.keep_freed_memory:
        handle._removers.append(KeptMemory())
    free = [name for name in handle.boundaries if name not in handle._named]
    if config.auto is not None and free:
        handle.auto = AutoCodec(handle, config.auto, free, backward=config.grad_codec is None)
        handle.auto.set(config.resolved or {})
    if config.analysis:
        handle.probe = Probe(handle, config.analysis_every)
    # The probe comes last: it measures what the others have chosen.
    first = [hook for hook in (handle.auto, handle.budget, handle.probe) if hook is not None]
    if handle.saved is not None:
        handle.saved.first += first
    else:
        for hook in reversed(first):
            handle._removers.append(model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))


def _settle(handle: Handle, run: Run) -> None:
    """Cut where the first batch shows that the layers are, if no made-up input could be traced."""
    layers = layers_after(handle.model, run, handle.config.blocks, option="blocks")
    cuts, named = _cuts(handle.config, layers)
    check_fits(handle.config, layers, cuts, named)
    before = [layer.module for layer in handle.cuts.values()]
    if set(before) == set(cuts):
        shapes = {layer.module: layer for layer in layers}
        handle.layers, handle.cuts = layers, {name: shapes[layer.module] for name, layer in handle.cuts.items()}
        return
    if handle.saved is not None or handle.auto is not None or handle.probe is not None:
        raise ValueError(
            f"The first batch shows that the boundaries belong to {', '.join(cuts)}, and they are at "
            f"{', '.join(before)}, because no input for {type(handle.model).__name__} could be made up when they "
            "were attached. Pass example_inputs= to compress_model."
        )
    logger.warning("from the next step on, boundaries are at %s and no longer at %s, as the first batch shows",
                   ", ".join(cuts), ", ".join(before))  # fmt: skip
    handle.remove()
    for known in (handle.boundaries, handle.cuts, handle.meters, handle._named):
        known.clear()
    handle.boundaries = {}  # the running pass checks the old ones at its end
    handle.layers = layers
    _attach(handle, cuts, named)


def _patience(model: nn.Module) -> int:
    """Training passes in which every boundary must have run: many for models that skip layers at random."""
    config = getattr(model, "config", None) or model
    settings = config if isinstance(config, Mapping) else vars(config)
    return 32 if any(value for name, value in settings.items() if "layerdrop" in name) else 1


def remove_compression(model: nn.Module) -> list[str]:
    """Take off all hooks, also those of a copied or unpickled model, which no handle knows.

    Returns the names of the modules that carried a boundary, and "" for hooks on what autograd saves.
    """
    names = []
    for name, module in unwrap(model).named_modules():
        if release(module):
            names.append(name)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, Boundary):
                    hook.enabled = False  # for graphs compiled while it was there
                    names.append(name)
                elif isinstance(hook, (Probe, AutoCodec, Budget, Passes)):
                    pass
                else:
                    continue
                del hooks[key]
                for more in (module._forward_hooks_always_called, module._forward_pre_hooks_with_kwargs):
                    more.pop(key, None)
    return names


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside torch.compile and DistributedDataParallel.  Raises ValueError for what is no module."""
    check_model(model)
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile's OptimizedModule; importing its class loads the compiler
            model = model._orig_mod
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return model
