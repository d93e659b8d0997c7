"""A model's layers in the order they run: where the network could be cut, and what is called "layer k".

Layer 0 is the stem of a CNN, or the embeddings together with block 0 of a transformer; then come the blocks; what runs
after the last block is the head and counts as the last layer. A model that ends with its last block has no head. In an
encoder-decoder each stack is numbered by itself; what ends the encoder (its final norm) is the encoder's head, so that
`first` and `last` mean the same in both stacks, and the classifier or LM head belongs to the decoder.

This file must not know codecs, configurations or training, and imports neither transformers nor timm. It expects the
inner model: DistributedDataParallel and torch.compile are unwrapped by the caller.
"""

from __future__ import annotations

import bisect
import difflib
import fnmatch
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .inputs import CONVOLUTIONS
from .structure import (
    checkpointed,
    children,
    covered,
    has_parameters,
    innermost,
    is_unit,
    level,
    listed,
    named,
    ran,
    resolutions,
)
from .tracing import Run, first_tensor, inside, replace_first_tensor, trace_or_none

__all__ = ["Layer", "find_layers", "first_tensor", "match_layers", "replace_first_tensor", "select_boundaries"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """One layer. A boundary after it is a forward hook on the output of `module`."""

    index: int  # place in run order, within its stack
    name: str  # module path that glob patterns and reports use
    module: str  # path of the module whose output is this layer's output
    kind: str  # "stem", "block" or "head"
    stack: str = ""  # "encoder" or "decoder" in an encoder-decoder
    parts: tuple[str, ...] = ()  # the outermost modules that belong to the layer, in run order
    calls: int = 1  # how often `module` runs in one forward
    shape: tuple[int, ...] | None = None  # of the output in the traced forward; None if untraced
    dtype: torch.dtype | None = None
    output: str = ""  # type name of the output: "Tensor", "tuple", "BaseModelOutput"...


def find_layers(model: nn.Module, example_inputs: Any = None, names: Sequence[str] | None = None, *,
                option: str = "names") -> list[Layer]:
    """The layers of `model`, in the order of one traced forward (eval mode, no gradients, nothing left behind).

    `names` gives the blocks as module paths or globs, in which `*` stays within one path component ("blocks.*.*",
    "inception*"); stem and head are found around them. Otherwise the blocks are transformers' instances of
    GradientCheckpointingLayer, or else they are found by structure. `example_inputs` (a mapping of keyword arguments,
    a tuple of arguments or one tensor) is traced in place of a synthesised input. If no forward succeeds, the order of
    `names` or of registration stands in and a warning is logged.  `option` is what error messages call `names`.

    Raises ValueError where no blocks are found, where a name matches no module, and where names overlap.
    """
    check_model(model)
    modules = dict(model.named_modules())
    _chosen(modules, names, option)  # a wrong name is found before the pass
    return layers_after(model, trace_or_none(model, modules, example_inputs), names, option=option)


def layers_after(model: nn.Module, run: Run | None, names: Sequence[str] | None = None, *, option: str = "names"
                 ) -> list[Layer]:  # fmt: skip
    """The layers in the order of a pass that was recorded; None for a model that could not be traced."""
    modules = dict(model.named_modules())
    chosen = _chosen(modules, names, option)
    owners: dict[str, str] = {}  # module -> the block that ends with it
    if run is None:
        blocks = innermost(chosen or checkpointed(modules) or listed(modules) or children(modules))
        run = Run(events=list(modules))
        if chosen:  # the caller knows the run order
            slots = sorted(map(run.events.index, blocks))
            for slot, path in zip(slots, blocks, strict=True):
                run.events[slot] = path
        reason = "none was found"
    elif chosen:
        owners = ran(chosen, run)
        blocks, idle = list(owners), [path for path in chosen if path not in owners.values()]
        if blocks and idle:
            logger.warning("left out of the layers, because they did not run in the traced forward: %s", idle)
        reason = f"none of {idle} ran in the traced forward"
    else:
        blocks, owners, reason = _found(modules, run)
    if not blocks:
        raise ValueError(_nothing_found(model, modules, reason))

    layers = [layer for stack, own, glue in _stacks(model, modules, blocks, run)
              for layer in _number(modules, stack, own, glue, blocks, run, owners)]
    for layer in layers:
        if layer.kind == "block" and layer.calls > 1:
            logger.warning("%s runs %d times in one forward and counts as one layer: whatever is attached to it acts "
                           "on each call", layer.name, layer.calls)
    return layers


def select_boundaries(layers: Sequence[Layer], first: int = 1, last: int = 1, placement: str = "every",
                      stack: str | None = None) -> list[Layer]:
    """The layers whose outputs are boundaries: outputs of the first `first`, inputs of the last `last` layers.

    The input of a layer is the output of the one before it. `placement="cuts"` keeps only the output of layer
    first-1 and the input of layer L-last. In an encoder-decoder this applies to each stack, or to `stack` alone.
    """
    if placement not in ("every", "cuts"):
        raise ValueError(f"placement={placement!r} is unknown; use 'every' or 'cuts'")
    stacks = list(dict.fromkeys(layer.stack for layer in layers))
    if stack is not None:
        if stack not in stacks:
            have = "one stack" if stacks == [""] else f"the stacks {', '.join(map(repr, stacks))}"
            raise ValueError(f"stack={stack!r} is not there: this model has {have}. Leave stack= out for all layers.")
        stacks = [stack]
    chosen = []
    for each in stacks:
        own = [layer for layer in layers if layer.stack == each]
        total = len(own)
        for what, value in (("first", first), ("last", last)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < total:
                where = f"the {each} has" if each else "the model has"
                raise ValueError(f"{what}={value!r} is out of range: {where} {total} layers, so choose {what} from 0 "
                                 f"to {total - 1} (0 leaves that side alone)")
        indices = set(range(first)) | set(range(total - last - 1, total - 1))
        if placement == "cuts":
            indices = ({first - 1} if first else set()) | ({total - last - 1} if last else set())
        chosen += [own[i] for i in sorted(indices)]
    return chosen


def match_layers(layers: Sequence[Layer], pattern: str) -> list[Layer]:
    """The layers whose name, or a suffix of it that starts after a dot, matches the glob `pattern`.

    "encoder.layer.3" matches "bert.encoder.layer.3". A suffix never starts with a number: "3" is no index.
    """
    found = [layer for layer in layers if any(fnmatch.fnmatchcase(s, pattern) for s in _suffixes(layer.name))]
    if not found:
        raise ValueError(f"layers[{pattern!r}] matches no layer; {_listing(pattern, [e.name for e in layers])}")
    return found


def check_model(model: Any) -> None:
    """Raise ValueError for what is no module."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a value of type {type(model).__name__}"
        raise ValueError(f"A model is a torch.nn.Module, of transformers, timm or your own; got {kind}.")



def _chosen(modules: dict[str, nn.Module], names: Sequence[str] | None, option: str) -> list[str] | None:
    return named(modules, [names] if isinstance(names, str) else names, option, _listing) if names else None


def _found(modules: dict[str, nn.Module], run: Run) -> tuple[list[str], dict[str, str], str]:
    """(modules with which blocks end, the blocks that they end, why there are none)"""
    layers = checkpointed(modules)
    if owners := ran(layers, run):
        return list(owners), owners, ""
    candidates = listed(modules)
    owners = ran(candidates, run)
    blocks = level(modules, owners, run)
    share = covered(modules, [owners[path] for path in blocks], run)
    if share < 0.5:  # most of the model is elsewhere
        more = ran([*candidates, *children(modules)], run)
        others = level(modules, more, run)
        if covered(modules, [more[path] for path in others], run) > share:
            blocks, owners = others, more
    idle = layers + candidates
    reason = f"none of {idle} ran in the traced forward" if idle else "none was found"
    return blocks or resolutions(modules, run), owners, reason


def _stacks(model: nn.Module, modules: dict, blocks: list[str], run: Run) -> Iterator[tuple[str, list, list]]:
    """(stack, its blocks in run order, the modules around them in run order)."""
    first: dict[str, int] = {}
    for i, path in enumerate(run.events):
        first.setdefault(path, i)
    blocks = sorted(blocks, key=first.__getitem__)
    glue = [path for path in first if is_unit(modules[path]) and path
            and not any(path == b or inside(path, b) or inside(b, path) for b in blocks)]

    def side(path: str) -> str:
        return next((part for part in path.split(".") if part in ("encoder", "decoder")), "")

    encoder = [path for path in blocks if side(path) == "encoder"]
    decoder = [path for path in blocks if side(path) != "encoder"]
    if not (getattr(getattr(model, "config", None), "is_encoder_decoder", False) and encoder and decoder):
        yield "", blocks, glue
        return
    end = max(first[path] for path in encoder)
    early = [path for path in glue if side(path) == "encoder" or (side(path) == "" and first[path] < end)]
    yield "encoder", encoder, early
    yield "decoder", decoder, [path for path in glue if path not in early]


def _number(modules: dict[str, nn.Module], stack: str, own: list[str], glue: list[str], blocks: list[str],
            run: Run, owners: dict[str, str]) -> list[Layer]:
    starts = [run.events.index(path) for path in own]
    end = len(run.events) - 1 - next(i for i, path in enumerate(reversed(run.events)) if path in own)
    # What runs between two blocks goes with the block that it feeds; the last group is the head.
    groups: list[list[str]] = [[] for _ in range(len(own) + 1)]
    for path in glue:
        at = run.events.index(path)
        place = bisect.bisect_left(starts, at)
        groups[place - 1 if place == len(own) and at < end else place].append(path)
    called = set(run.events)
    running = {path for path in called if is_unit(modules[path])} | set(blocks)
    parts = [_outermost_parts(modules, group, running, called) for group in groups]

    layers = []
    if parts[0] and _is_stem([modules[path] for path in parts[0]], modules[own[0]]):
        # Attached to a module that runs again elsewhere (a shared activation), a hook would fire there too.
        once = [path for path in parts[0] if run.calls.get(path, 1) == 1] or parts[0]
        name = next((path for path in parts[0] if has_parameters(modules[path])), parts[0][0])
        layers.append(Layer(0, name, once[-1], "stem", parts=tuple(parts[0])))
        parts[0] = []
    layers += [Layer(0, owners.get(path, path), path, "block", parts=(*before, path))
               for path, before in zip(own, parts[:-1], strict=True)]
    if parts[-1]:
        named = [path for path in parts[-1] if has_parameters(modules[path])] or parts[-1]
        layers.append(Layer(0, named[-1], parts[-1][-1], "head", parts=tuple(parts[-1])))
    numbered = []
    for i, layer in enumerate(layers):
        shape, dtype, output = run.outputs.get(layer.module, (None, None, ""))
        numbered.append(replace(layer, index=i, stack=stack, calls=run.calls.get(layer.module, 1), shape=shape,
                                dtype=dtype, output=output))
    return numbered


def _outermost_parts(modules: dict[str, nn.Module], group: list[str], ran: set[str], called: set[str]) -> list[str]:
    """The group's modules, each replaced by the outermost module that ran and holds nothing outside the group."""
    parts = []
    for path in group:
        steps = path.split(".")
        for prefix in (".".join(steps[:n]) for n in range(1, len(steps) + 1)):
            held = {other for other in ran if other == prefix or inside(other, prefix)}
            if prefix in called and held <= set(group) and not isinstance(modules[prefix], nn.ModuleList):
                parts.append(prefix)
                break
    return list(dict.fromkeys(parts))


def _is_stem(parts: list[nn.Module], block: nn.Module) -> bool:
    """Tells a CNN, whose stem is a layer, from a transformer or a state space model, whose embeddings belong to
    block 0."""
    attends = any("attn" in path.lower() or "attention" in path.lower() for path, _ in block.named_modules())
    embeds = any(isinstance(module, nn.Embedding) for part in parts for module in part.modules())
    return not attends and not embeds and any(isinstance(module, CONVOLUTIONS) for module in block.modules())


# Messages


def _suffixes(name: str) -> list[str]:
    steps = name.split(".")
    return [name] + [".".join(steps[i:]) for i in range(1, len(steps)) if not steps[i].isdigit()]


def _listing(pattern: str, candidates: list[str]) -> str:
    suffixes = {suffix: name for name in candidates for suffix in _suffixes(name)}
    close = dict.fromkeys(suffixes[hit] for hit in difflib.get_close_matches(pattern, suffixes, n=3))
    hint = f"did you mean {', '.join(close)}? " if close else ""
    shown = ", ".join(candidates[:60]) + (f", ... ({len(candidates)} in all)" if len(candidates) > 60 else "")
    return f"{hint}Candidates: {shown}"


def _nothing_found(model: nn.Module, modules: dict[str, nn.Module], why: str) -> str:
    children = [path for path, module in modules.items() if path and has_parameters(module)]
    listed = ", ".join(children[:20]) + (", ..." if len(children) > 20 else "")
    return (
        f"no layers in {type(model).__name__}: looked for transformers GradientCheckpointingLayer blocks and for "
        f"members of nn.ModuleList/nn.Sequential with at least two parametrised leaves, and {why}. Name the blocks "
        "yourself, in run order, with find_layers(names=[...]) or ActCompressConfig(blocks=[...]), from "
        f"{listed or 'a larger model'}"
    )
