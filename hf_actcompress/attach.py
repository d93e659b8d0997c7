"""Attach compression to a model, and take it off again.

Forward hooks only: no parameter is renamed, `state_dict`, `save_pretrained`, `deepcopy` and pickling stay as they
were.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .boundary.channel import Channel
from .boundary.hook import Boundary, Passes
from .codecs import Codec, parse_codec
from .config import ActCompressConfig
from .models.layers import Layer, find_layers, match_layers, select_boundaries
from .observe.auto import AutoCodec
from .observe.events import Listener
from .observe.meter import Meter
from .observe.probe import Probe
from .ops.cpu.malloc import KeptMemory
from .saved.budget import CODEC, Budget, parse_share
from .saved.hooks import install, is_hook
from .saved.tensors import COMPILED, SavedTensors

logger = logging.getLogger(__name__)


class Handle:
    """Compression attached to a model.  A context manager: leaving it removes the hooks."""

    def __init__(self, model: nn.Module, config: ActCompressConfig, layers: list[Layer]) -> None:
        self.model, self.config, self.layers = model, config, layers
        self.boundaries: dict[str, Boundary] = {}
        self.cuts: dict[str, Layer] = {}
        self.saved: SavedTensors | None = None
        self.probe: Probe | None = None
        self.auto: AutoCodec | None = None
        self.budget: Budget | None = None
        self.meters: dict[str, Meter] = {}  # by "<boundary>/forward", "<boundary>/backward" and "saved"
        self._removers: list[Any] = []
        self._named: set[str] = set()  # boundaries whose codec `layers` fixes: the schedule leaves them alone
        self.epoch = 0

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off.  Statistics stay readable.  Calling it again does nothing."""
        for remover in self._removers:
            remover.remove()
        self._removers.clear()
        for boundary in self.boundaries.values():
            # A graph compiled while the hooks were there may still call them.
            boundary.enabled = False
        if self.saved is not None:
            self.saved.enabled = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run without compression for a while, hooks staying in place."""
        sites = self._sites()
        before = [site.enabled for site in sites]
        for site in sites:
            site.enabled = False
        try:
            yield
        finally:
            for site, enabled in zip(sites, before, strict=True):
                site.enabled = enabled

    @contextlib.contextmanager
    def isolated(self, *listeners: Listener) -> Iterator[None]:
        """Run with compression on copies of all that it remembers, for a measurement.

        Only `listeners` are told of what the sites do (observe/events.py); states and meters are as before afterwards.
        """
        with contextlib.ExitStack() as stack:
            for site in self._sites():
                stack.enter_context(site.isolated(*listeners))
            yield

    def _sites(self) -> list[Boundary | SavedTensors]:
        return [*self.boundaries.values(), *([] if self.saved is None else [self.saved])]

    def set_epoch(self, epoch: int) -> bool:
        """Switch codecs as `schedule` says; returns whether any changed."""
        codecs = self.config.scheduled(epoch)
        changed = codecs != self.config.scheduled(self.epoch)
        self.epoch = epoch
        for name, boundary in self.boundaries.items():
            if name not in self._named and self.auto is None:
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
        return rows

    @property
    def _saved_spec(self) -> str:
        assert self.saved is not None
        return str(self.budget or self.saved.codec)

    def channels(self, name: str) -> list[tuple[str, Channel]]:
        boundary = self.boundaries[name]
        return [("forward", boundary.forward), ("backward", boundary.backward)]

    # -- state ------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """What codecs remember, by boundary and direction: warm starts, noise counters, error feedback."""
        result: dict[str, Any] = {} if self.auto is None else {"auto": self.auto.state_dict()}
        for name in self.boundaries:
            for direction, channel in self.channels(name):
                if channel.state is not None:
                    result[f"{name}/{direction}"] = {"codec": str(channel.codec), "state": channel.state.state_dict()}
        if self.saved is not None and self.saved.state is not None:
            result["saved"] = {"codec": self._saved_spec, "state": self.saved.state.state_dict()}
            if self.budget is not None:
                result["saved"]["budget"] = self.budget.state_dict()
        return result

    def load_state_dict(self, values: dict[str, Any]) -> list[str]:
        """Take over the state of boundaries that have the same codec; returns the names of those that did not."""
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
        if self.saved is not None and self.saved.state is not None:
            entry = values.get("saved")
            if entry is None or entry["codec"] != self._saved_spec:
                missed.append("saved")
            else:
                self.saved.state.load_state_dict(entry["state"])
                if self.budget is not None:
                    self.budget.load_state_dict(entry["budget"])
        return missed


def compress_model(
    model: nn.Module,
    config: ActCompressConfig | str | None = None,
    *,
    example_inputs: Any = None,
) -> Handle:
    """Compress the activations that leave the first layers and enter the last ones, and their gradients.

    model: any transformers or timm model, also inside DistributedDataParallel or torch.compile; or any module whose
        blocks `hf_actcompress.models.layers.find_layers` recognises.
    config: an ActCompressConfig, or just a codec spec.
    example_inputs: inputs of one forward pass, for models whose input cannot be guessed.

    With `saved` on a CPU, malloc keeps what this process frees until the handle is removed (codecs/malloc.py).

    Raises ValueError for a model without layers, `first` or `last` beyond them, a glob that matches nothing, a codec
    that cannot take a layer's output (a rank above its features), and a model that is compressed already.
    """
    if not isinstance(config, ActCompressConfig):
        config = ActCompressConfig() if config is None else ActCompressConfig(codec=config)
    inner = unwrap(model)
    for name, module in inner.named_modules():
        if any(isinstance(hook, Boundary) or is_hook(hook) for hook in module._forward_hooks.values()):
            raise ValueError(
                f"The model is compressed already (a hook sits at '{name}'). Call handle.remove() on the handle "
                "that compress_model returned, or leave its `with` block, before attaching again. Where the handle is "
                "lost (a copied model, a run that was stopped): hf_actcompress.remove_compression(model)."
            )
    compiled = hasattr(model, "_orig_mod") or any(
        module._compiled_call_impl is not None for module in (model, *inner.modules())
    )
    if config.saved and compiled:
        raise ValueError(COMPILED)
    layers = find_layers(inner, example_inputs, config.blocks) if _needs_layers(config) else []
    cuts = select_boundaries(layers, config.first, config.last, config.placement, config.stack)
    codecs = {layer.module: config.scheduled(0) for layer in cuts}
    named = {}
    for pattern, value in (config.layers or {}).items():
        for layer in match_layers(layers, pattern):
            named[layer.module] = layer
            codecs[layer.module] = config.codecs_of(value)
    for layer in layers:
        if layer.module in codecs and layer.shape is not None:
            _check_fits(layer, *codecs[layer.module])
    handle = Handle(inner, config, layers)
    # Ranks draw different noise.  The launchers' variable is used, so that nothing here needs torch.distributed.
    seed = config.seed + 1_000_003 * int(os.environ.get("RANK", 0))
    passes = Passes()
    for layer in layers:
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
        handle.boundaries[layer.name] = boundary
        handle.cuts[layer.name] = layer
        if layer.module in named:
            handle._named.add(layer.name)
        handle._removers.append(inner.get_submodule(layer.module).register_forward_hook(boundary))
    if handle.boundaries:
        handle._removers.append(inner.register_forward_pre_hook(passes, prepend=True))
        handle._removers.append(inner.register_forward_hook(passes, always_call=True))
    if config.saved:
        if config.saved.startswith("auto"):
            handle.budget = Budget(handle, parse_share(config.saved))
        codec, bits = (parse_codec(config.saved), None) if handle.budget is None else (CODEC, handle.budget.bits)
        handle.saved = SavedTensors(codec, bits, seed=seed, nonfinite=config.nonfinite)
        handle.meters["saved"] = Meter(every=0)
        handle.saved.listeners.append(handle.meters["saved"])
        handle._removers += install(handle.saved, inner)
        if all(parameter.device.type == "cpu" for parameter in inner.parameters()):
            handle._removers.append(KeptMemory())  # activations are freed one by one, and come anew in every pass
    elif not handle.boundaries:
        logger.warning("first=0, last=0 and no layers: nothing is compressed.")
    if config.auto is not None and (free := [name for name in handle.boundaries if name not in handle._named]):
        handle.auto = AutoCodec(handle, config.auto, free, backward=config.grad_codec is None)
        handle.auto.set(config.resolved or {})
    if config.analysis:
        handle.probe = Probe(handle, config.analysis_every)
        # Before the hooks of saved tensors, which would keep what the probe's own passes save.
        handle._removers.append(inner.register_forward_pre_hook(handle.probe, prepend=True, with_kwargs=True))
    for tuner in (handle.budget, handle.auto):  # before the probe, which measures what is chosen
        if tuner is not None:
            handle._removers.append(inner.register_forward_pre_hook(tuner, prepend=True, with_kwargs=True))
    return handle


def _needs_layers(config: ActCompressConfig) -> bool:
    return bool(config.first or config.last or config.layers or not config.saved)


def _check_fits(layer: Layer, *codecs: Codec) -> None:
    """Refuse a codec that cannot take a layer's output (a rank above its features) now, not in the first step."""
    for codec in codecs:
        try:
            codec.payload_nbytes(layer.shape, layer.dtype)
        except ValueError as error:
            raise ValueError(f"{layer.name}: {error}") from None


def remove_compression(model: nn.Module) -> list[str]:
    """Take off all hooks, also those of a copied or unpickled model, which no handle knows.

    Returns the names of the modules that carried a boundary, and "" for hooks on what autograd saves.
    """
    names = []
    for name, module in unwrap(model).named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, Boundary):
                    hook.enabled = False  # for graphs compiled while it was there
                    names.append(name)
                elif is_hook(hook):
                    hook.saved.enabled = False
                    if name == "" and "" not in names:
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
    """The user's model inside torch.compile and DistributedDataParallel."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile's OptimizedModule; importing its class loads the compiler
            model = model._orig_mod
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return model


def flatten_state(values: dict[str, Any], prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A nested state as (tensors by path, everything else as JSON values), for safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
            # Products depend on the memory order in their last bits, and safetensors knows only one.
            rest[key] = {"tensor": path, "stride": list(torch.empty_like(value).stride())}
        elif isinstance(value, dict):
            inner_tensors, inner_rest = flatten_state(value, f"{path}\x1f")
            tensors.update(inner_tensors)
            rest[key] = inner_rest
        else:
            rest[key] = value
    return tensors, rest


def unflatten_state(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten_state`."""
    result = {}
    for key, value in rest.items():
        if isinstance(value, dict) and set(value) == {"tensor", "stride"}:
            tensor = tensors[value["tensor"]]
            result[key] = torch.empty_strided(tensor.shape, value["stride"], dtype=tensor.dtype).copy_(tensor)
        else:
            result[key] = unflatten_state(tensors, value) if isinstance(value, dict) else value
    return result
