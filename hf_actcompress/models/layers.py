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

from .tracing import CONVOLUTIONS, Run, first_tensor, inside, replace_first_tensor, trace_or_none

__all__ = ["Layer", "find_layers", "first_tensor", "match_layers", "replace_first_tensor", "select_boundaries"]

logger = logging.getLogger(__name__)

CONTAINERS = (nn.Sequential, nn.ModuleList)


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
    by_structure = False
    if names:
        candidates = _named(modules, [names] if isinstance(names, str) else names, option)
    else:
        candidates = _innermost([path for path, module in modules.items() if _is_checkpointing_layer(module)])
        if not candidates:
            candidates, by_structure = _structural(modules), True
    if not candidates:
        raise ValueError(_nothing_found(model, modules, "none was found"))

    run = trace_or_none(model, modules, example_inputs, candidates)
    if run is None:
        run, blocks = Run(events=list(modules)), _innermost(candidates)
        if names:  # the caller knows the run order
            slots = sorted(map(run.events.index, blocks))
            for slot, path in zip(slots, blocks, strict=True):
                run.events[slot] = path
    else:
        blocks = _level(modules, candidates, run) if by_structure else candidates
        idle = [path for path in blocks if path not in run.calls]
        blocks = [path for path in blocks if path in run.calls]
        if names and idle:
            logger.warning("left out of the layers, because they did not run in the traced forward: %s", idle)
        if not blocks:
            raise ValueError(_nothing_found(model, modules, f"none of {idle} ran in the traced forward"))

    layers = [layer for stack, own, glue in _stacks(model, modules, blocks, run)
              for layer in _number(modules, stack, own, glue, blocks, run)]
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



def _innermost(paths: list[str]) -> list[str]:
    return [p for p in paths if not any(inside(q, p) for q in paths)]


def _is_checkpointing_layer(module: nn.Module) -> bool:
    # By name, so that finding layers does not import transformers.
    return any(c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__)


def _has_own_parameters(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())


def _named(modules: dict[str, nn.Module], names: Sequence[str], option: str) -> list[str]:
    found: list[str] = []
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{option}={names!r} is not a list of module paths or globs, such as 'encoder.layer.*'.")
        pattern = name.split(".")
        hits = [path for path in modules if path and path.count(".") == name.count(".")
                and all(map(fnmatch.fnmatchcase, path.split("."), pattern))]
        if not hits:
            raise ValueError(f"{option}={name!r} matches no module; {_listing(name, list(modules)[1:])}")
        found += [path for path in hits if path not in found]
    for inner in found:
        outer = next((path for path in found if inside(inner, path)), None)
        if outer is not None:
            raise ValueError(f"{option}: {inner!r} lies inside {outer!r}; name one of the two")
    return found


def _structural(modules: dict[str, nn.Module]) -> list[str]:
    """Members of ModuleList/Sequential that are not containers themselves and hold two parametrised leaves; and,
    where such members lie in one of several siblings of a class, that sibling (torchvision's Inception)."""
    def holds_two(module: nn.Module) -> bool:
        return sum(map(_has_own_parameters, module.modules())) >= 2

    found = [path for path, module in modules.items() if path and not isinstance(module, CONTAINERS)
             and isinstance(modules.get(path.rpartition(".")[0]), CONTAINERS) and holds_two(module)]
    around = {path.rsplit(".", n)[0] for path in found for n in range(1, path.count(".") + 1)} - set(found)
    for path in sorted(around):
        parent = modules[path.rpartition(".")[0]]
        twins = sum(type(child) is type(modules[path]) for child in parent.children())
        if twins > 1 and not isinstance(modules[path], CONTAINERS) and not isinstance(parent, CONTAINERS):
            found.append(path)
    return found


def _level(modules: dict[str, nn.Module], candidates: list[str], run: Run) -> list[str]:
    """Of nested candidates the outermost, but stages are opened: a stage hands on its last member's output untouched,
    while a residual block adds to it. A class is opened only if all its instances are stages, because blocks without
    a residual look like stages where their neighbours do not."""
    ran = [path for path in candidates if path in run.calls]
    closed = {type(modules[path]) for path in ran if path not in run.opened}
    blocks = [path for path in ran if type(modules[path]) in closed]
    return [path for path in blocks if not any(inside(path, outer) for outer in blocks)]


def _stacks(model: nn.Module, modules: dict, blocks: list[str], run: Run) -> Iterator[tuple[str, list, list]]:
    """(stack, its blocks in run order, the modules around them in run order)."""
    first: dict[str, int] = {}
    for i, path in enumerate(run.events):
        first.setdefault(path, i)
    blocks = sorted(blocks, key=first.__getitem__)
    glue = [path for path in first if _is_unit(modules[path]) and path
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


def _is_unit(module: nn.Module) -> bool:
    """Does something by itself: a leaf, or a parent with parameters of its own (a fused norm and activation)."""
    leaf = next(module.children(), None) is None
    return (leaf or _has_own_parameters(module)) and not isinstance(module, (nn.Identity, *CONTAINERS, nn.ModuleDict))


def _number(modules: dict[str, nn.Module], stack: str, own: list[str], glue: list[str], blocks: list[str],
            run: Run) -> list[Layer]:
    starts = [run.events.index(path) for path in own]
    end = len(run.events) - 1 - next(i for i, path in enumerate(reversed(run.events)) if path in own)
    # What runs between two blocks goes with the block that it feeds; the last group is the head.
    groups: list[list[str]] = [[] for _ in range(len(own) + 1)]
    for path in glue:
        at = run.events.index(path)
        place = bisect.bisect_left(starts, at)
        groups[place - 1 if place == len(own) and at < end else place].append(path)
    called = set(run.events)
    ran = {path for path in called if _is_unit(modules[path])} | set(blocks)
    parts = [_outermost_parts(modules, group, ran, called) for group in groups]

    layers = []
    if parts[0] and _is_convolutional(modules[own[0]]):
        # Attached to a module that runs again elsewhere (a shared activation), a hook would fire there too.
        once = [path for path in parts[0] if run.calls.get(path, 1) == 1] or parts[0]
        name = next((path for path in parts[0] if _has_parameters(modules[path])), parts[0][0])
        layers.append(Layer(0, name, once[-1], "stem", parts=tuple(parts[0])))
        parts[0] = []
    layers += [Layer(0, path, path, "block", parts=(*before, path))
               for path, before in zip(own, parts[:-1], strict=True)]
    if parts[-1]:
        named = [path for path in parts[-1] if _has_parameters(modules[path])] or parts[-1]
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


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_convolutional(block: nn.Module) -> bool:
    """Tells a CNN, whose stem is a layer, from a transformer, whose embeddings belong to block 0."""
    attends = any("attn" in path.lower() or "attention" in path.lower() for path, _ in block.named_modules())
    return not attends and any(isinstance(module, CONVOLUTIONS) for module in block.modules())


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
    children = [path for path, module in modules.items() if path and _has_parameters(module)]
    listed = ", ".join(children[:20]) + (", ..." if len(children) > 20 else "")
    return (
        f"no layers in {type(model).__name__}: looked for transformers GradientCheckpointingLayer blocks and for "
        f"members of nn.ModuleList/nn.Sequential with at least two parametrised leaves, and {why}. Name the blocks "
        "yourself, in run order, with find_layers(names=[...]) or ActCompressConfig(blocks=[...]), from "
        f"{listed or 'a larger model'}"
    )
