"""Attach compression to a model, and take it off again.

Forward hooks only: no parameter is renamed, `state_dict`, `save_pretrained`, `deepcopy` and pickling stay as they
were.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .boundary.channel import Channel
from .boundary.compiled import HookGuards, eagerly
from .boundary.hook import Boundary, Passes
from .codecs import Codec, parse_codec
from .config import ActCompressConfig
from .models.first_pass import FirstPass
from .models.layers import Layer, check_model, find_layers, layers_after, match_layers, select_boundaries
from .models.tracing import Run
from .observe.auto import AutoCodec
from .observe.events import Listener
from .observe.meter import Meter
from .observe.nonfinite import check
from .observe.probe import Probe
from .ops.cpu.malloc import KeptMemory
from .saved.budget import CODEC, Budget
from .saved.entry import Entry, release, site_of
from .saved.tensors import SavedTensors

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _switched_off(sites: Iterable[Any]) -> Iterator[None]:
    before = [(site, site.enabled) for site in sites]
    for site, _ in before:
        site.enabled = False
    try:
        yield
    finally:
        for site, enabled in before:
            site.enabled = enabled


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
        if not self._removers:
            raise ValueError("This compression was removed from its model. Call compress_model again.")
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _settle(self, run: Run) -> None:
        """Cut where the first batch shows that the layers are, if no made-up input could be traced."""
        layers = layers_after(self.model, run, self.config.blocks, option="blocks")
        cuts, named = _cuts(self.config, layers)
        _check_fits(self.config, layers, cuts, named)
        before = [layer.module for layer in self.cuts.values()]
        if set(before) == set(cuts):
            shapes = {layer.module: layer for layer in layers}
            self.layers, self.cuts = layers, {name: shapes[layer.module] for name, layer in self.cuts.items()}
            return
        if self.saved is not None or self.auto is not None or self.probe is not None:
            raise ValueError(
                f"The first batch shows that the boundaries belong to {', '.join(cuts)}, and they are at "
                f"{', '.join(before)}, because no input for {type(self.model).__name__} could be made up when they "
                "were attached. Pass example_inputs= to compress_model."
            )
        logger.warning("from the next step on, boundaries are at %s and no longer at %s, as the first batch shows",
                       ", ".join(cuts), ", ".join(before))  # fmt: skip
        self.remove()
        for known in (self.boundaries, self.cuts, self.meters, self._named):
            known.clear()
        self.layers = layers
        _attach(self, cuts, named)

    @property
    def sites(self) -> list[Boundary | SavedTensors]:
        """Every boundary, and the saved tensors if they are compressed."""
        return [*self.boundaries.values(), *([] if self.saved is None else [self.saved])]

    def remove(self) -> None:
        """Take every hook off and undo every setting.  Statistics stay readable.  Calling it again does nothing."""
        while self._removers:
            self._removers.pop().remove()
        for site in self.sites:
            site.enabled = False  # a graph that was compiled while the hooks were there may still call them

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run without any compression for a while, hooks staying in place."""
        with _switched_off(self.sites):
            yield

    @contextlib.contextmanager
    def saving(self) -> Iterator[list[Any]]:
        """Compress what autograd saves within this context, for passes that do not go through the model's forward:
        `model.encode(...)`, `model.get_text_features(...)`, a loss that is computed outside of it.

            with handle.saving() as outputs:
                loss = loss_of(model.encode(batch))
                outputs.append(loss)

        What is appended tells where the pass ends; without it the last operations are kept exactly.
        Raises ValueError where `saved=` is not configured.
        """
        if self.saved is None:
            raise ValueError(
                "handle.saving() compresses saved tensors, and saved= is not set; give it to ActCompressConfig."
            )
        outputs: list[Any] = []
        with self.saved.running(outputs):
            yield outputs

    def report(self) -> list[dict[str, Any]]:
        """What the last pass saved: one record per operation and way of keeping it, the most held bytes first.

        Each has operation, kept ("codes", "normalised", "made again", "one bit", "shape", "integers" or "exactly"),
        tensors, raw_bytes (what autograd would hold, memory that is shared counted once) and held_bytes.
        """
        return [] if self.saved is None else list(self.saved.rows)

    @contextlib.contextmanager
    def isolated(self, *listeners: Listener) -> Iterator[None]:
        """Run with compression on copies of all that it remembers, for a measurement.

        Only `listeners` are told of what the sites do (observe/events.py); states and meters are as before afterwards.
        """
        with contextlib.ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(site.isolated(*listeners))
            yield

    def check_finite(self) -> None:
        """With nonfinite="raise": raises FloatingPointError where NaN or Inf came up since the last check.

        Waits for a GPU.
        """
        channels = [channel for name in self.boundaries for _, channel in self.channels(name)]
        check([site.found for site in (*channels, *([] if self.saved is None else [self.saved]))])

    def set_epoch(self, epoch: int) -> bool:
        """Switch codecs as `schedule` says; returns whether any changed."""
        if not self.boundaries or self.auto is not None:
            self.epoch = epoch
            return False
        codecs = self.config.scheduled(epoch)
        changed = codecs != self.config.scheduled(self.epoch)
        self.epoch = epoch
        for name, boundary in self.boundaries.items():
            if name not in self._named:
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
        """Take over the state of sites that have the same codec; returns the names of those that did not.

        Raises ValueError for what `state_dict` does not return.
        """
        whole = isinstance(values, dict) and all(
            key == "auto" or isinstance(entry, dict) and {"codec", "state"} <= entry.keys()
            for key, entry in values.items()
        )
        if not whole:
            found = f"a dict of {sorted(map(str, values))}" if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"load_state_dict got {found}; give it what handle.state_dict() returned.")
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
                if self.budget is not None and "budget" in entry:  # not in checkpoints of version 0.1
                    self.budget.load_state_dict(entry["budget"])
        return missed


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
    _refuse_second(inner)
    with eagerly():
        layers = find_layers(inner, example_inputs, config.blocks, option="blocks") if config.boundaries else []
    cuts, named = _cuts(config, layers)
    _check_fits(config, layers, cuts, named)
    if config.saved:
        _check_saved_fits(config, inner, layers, example_inputs)
    handle = Handle(inner, config, layers)
    try:
        _attach(handle, cuts, named)
        if any(layer.shape is None for layer in layers):
            handle._removers.append(FirstPass(inner, handle._settle))
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


def _patience(model: nn.Module) -> int:
    """Training passes in which every boundary must have run: many for models that skip layers at random."""
    settings = [value for name, value in vars(getattr(model, "config", None) or model).items() if "layerdrop" in name]
    return 32 if any(settings) else 1


# -- checks before anything is attached ----------------------------------------------------------------------------
def _refuse_second(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if site_of(module) or any(isinstance(hook, Boundary) for hook in module._forward_hooks.values()):
            raise ValueError(
                f"The model is compressed already (there is a hook on {name or 'the whole model'}). Call "
                "handle.remove() on the handle that compress_model returned, or leave its `with` block, before "
                "attaching again. Where the handle is lost (a copied model, a run that was stopped): "
                "hf_actcompress.remove_compression(model)."
            )


def _check_fits(
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


def _check_saved_fits(config: ActCompressConfig, model: nn.Module, layers: list[Layer], example_inputs: Any) -> None:
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
