"""One traced forward pass of a model: which modules run, in which order, and what they return.

Hooks, training flags, buffers and random state are as before afterwards.  This file knows no layer numbers.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The hidden state that a module's output carries: the tensor itself, `last_hidden_state`, or else the first
    floating tensor of a tuple, list or mapping (ModelOutput is one). None if there is none."""
    if isinstance(output, torch.Tensor):
        return output
    key = _key(output)
    return None if key is None else output[key]


def replace_first_tensor(output: Any, new: torch.Tensor) -> Any:
    """A copy of `output`, of the same type, in which only the tensor that `first_tensor` returns is `new`."""
    if isinstance(output, torch.Tensor):
        return new
    key = _key(output)
    if key is None:
        raise ValueError(f"an output of type {type(output).__name__} carries no floating tensor to replace; "
                         f"leave this module out")
    if isinstance(output, tuple):
        items = [new if i == key else item for i, item in enumerate(output)]
        return output._make(items) if hasattr(output, "_make") else type(output)(items)
    changed = copy.copy(output)
    changed[key] = new  # ModelOutput's own __setitem__ keeps attribute and item the same
    return changed


def _key(output: Any) -> Any:
    if isinstance(output, Mapping):
        if isinstance(output.get("last_hidden_state"), torch.Tensor):
            return "last_hidden_state"
        pairs = output.items()
    elif isinstance(output, (tuple, list)):
        pairs = enumerate(output)
    else:
        return None
    return next((k for k, v in pairs if isinstance(v, torch.Tensor) and v.is_floating_point()), None)


# Which modules are blocks


def inside(path: str, ancestor: str) -> bool:
    return not ancestor or path.startswith(ancestor + ".")


@dataclass
class Run:
    events: list[str] = field(default_factory=list)  # module paths in the order in which their calls ended
    calls: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, tuple] = field(default_factory=dict)  # path -> (shape, dtype, type name), last call
    opened: set[str] = field(default_factory=set)  # candidates whose output is that of the candidate inside them


def trace_or_none(model: nn.Module, modules: dict, example_inputs: Any, candidates: list[str]) -> Run | None:
    guesses = _guesses(model) if example_inputs is None else [example_inputs]
    failure = None
    for inputs in guesses:
        try:
            return _trace(model, modules, inputs, set(candidates))
        except Exception as error:  # noqa: BLE001 - a guess can fail in any way; the first reason is logged
            failure = failure or f"{type(error).__name__}: {error}"
    logger.warning("the layers of %s are in registration order, untraced, so the order may be wrong (%s); pass "
                   "example_inputs= that its forward accepts", type(model).__name__,
                   failure or "no input could be made up for it")
    return None


def _trace(model: nn.Module, modules: dict[str, nn.Module], inputs: Any, candidates: set[str]) -> Run:
    run = Run()
    latest: tuple = ("", None, 0)  # the candidate that ended last: path, output, version of the output

    def record(path: str, output: Any) -> None:
        nonlocal latest
        tensor = first_tensor(output)
        run.events.append(path)
        run.calls[path] = run.calls.get(path, 0) + 1
        shape, dtype = (None, None) if tensor is None else (tuple(tensor.shape), tensor.dtype)
        run.outputs[path] = (shape, dtype, type(output).__name__)
        if path in candidates and tensor is not None:
            # The version tells a tensor that is returned unchanged from one that is changed in place (`out += x`).
            inner, kept, version = latest
            if inside(inner, path) and kept is tensor and version == tensor._version:
                run.opened.add(path)
            latest = (path, tensor, tensor._version)

    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    handles = []
    with _untouched(model):
        try:
            for path, module in modules.items():
                handles.append(module.register_forward_hook(lambda m, a, output, path=path: record(path, output)))
            if isinstance(inputs, Mapping):
                model(**{key: move(value) for key, value in inputs.items()})
            else:
                model(*[move(x) for x in (inputs if isinstance(inputs, (tuple, list)) else [inputs])])
        finally:
            for handle in handles:
                handle.remove()
    return run


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; training flags, buffers and random state are afterwards what they were."""
    # Flags are set directly: eval() may be overridden and have effects of its own (merging LoRA weights).
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer, buffer._version, buffer.clone()) for module in model.modules()
               for name, buffer in module._buffers.items() if buffer is not None]
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(gpus)), torch.no_grad():
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, flag in flags:
                module.training = flag
            for module, name, buffer, version, value in buffers:
                module._buffers[name] = buffer
                if buffer._version != version:
                    buffer.copy_(value)


def _guesses(model: nn.Module) -> Iterator[Any]:
    """Inputs with one row that the model may accept, the likeliest and smallest first."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    embedding, conv, linear = (next((m for m in model.modules() if isinstance(m, kind)), None)
                               for kind in (nn.Embedding, CONVOLUTIONS, nn.Linear))
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    options = {"dtype": weight.dtype, "device": weight.device}

    def tokens() -> torch.Tensor:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        size = getattr(text, "vocab_size", None) or getattr(embedding, "num_embeddings", 8)
        ids = torch.arange(3, 11, device=weight.device).remainder(size)[None]  # 0 and 1 are usual for padding
        eos = getattr(text, "eos_token_id", None)
        if isinstance(eos, int) and 0 <= eos < size:
            ids[0, -1] = eos  # encoder-decoder classifiers look for the end of the sentence
        return ids

    extra = {"decoder_input_ids": tokens()} if main and getattr(config, "is_encoder_decoder", False) else {}
    if main == "input_ids":
        yield {main: tokens(), **extra}
    if main is None and embedding is not None:
        yield tokens()
    if main == "pixel_values" or (main is None and conv is not None):
        first, dims = (conv.in_channels, len(conv.kernel_size)) if conv is not None else (3, 2)
        # The convolution registered first need not be the one that sees the image.
        for channels, size in itertools.product(dict.fromkeys([first, 3, 1]), _image_sizes(model, config)):
            image = torch.zeros(1, channels, *(size if dims == 2 else size[:1] * dims), **options)
            yield {main: image, **extra} if main else image
    if main is None and linear is not None:
        yield torch.zeros(1, linear.in_features, **options)
    if isinstance(getattr(model, "dummy_inputs", None), Mapping):
        yield model.dummy_inputs


def _image_sizes(model: nn.Module, config: Any) -> list[tuple[int, int]]:
    known = [getattr(config, "image_size", None)]
    for owner in (model, getattr(model, "timm_model", None)):
        cfg = getattr(owner, "pretrained_cfg", None)
        known.append(cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None))
    sizes = [(x, x) if isinstance(x, int) else tuple(x)[-2:] for x in known if x]
    # 64 pixels are enough to see the order; where the size is fixed (ViT) they fail, and its own size follows.
    small = [size for size in sizes if max(size) <= 64]
    return list(dict.fromkeys([*small, (64, 64), *sizes, (224, 224), (32, 32), (28, 28)]))


# From blocks to numbered layers
