"""Structured pruning in depth: whole blocks are removed from a stack.  Knows no codec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.layers import first_tensor


def drop_layers(model: nn.Module, drop: int | Sequence[int], path: str | None = None,
                batches: Iterable[Mapping[str, Any]] | None = None) -> list[int]:  # fmt: skip
    """Removes blocks of the stack at `path`, in place; returns their indices.

    drop: indices, or how many.  Then those blocks are removed that change their input least on `batches` (1 - cosine
        of input and output; Men et al. 2024), or, without batches, so that the others are spread evenly.
    path: of a ModuleList or Sequential; default: the longest one of blocks of one class.

    Raises ValueError where there is no such stack, an index is out of range, or no block would be left.
    """
    path = _stack(model) if path is None else path
    stack = dict(model.named_modules()).get(path)
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or len(stack) < 2:
        raise ValueError(f"path={path!r} is no ModuleList or Sequential of two or more blocks in "
                         f"{type(model).__name__}.")  # fmt: skip
    total = len(stack)
    number = drop if isinstance(drop, int) else len(set(drop))
    if not 0 < number < total:
        raise ValueError(f"drop={drop!r}: {path} has {total} blocks; drop 1 to {total - 1} of them.")
    if not isinstance(drop, int):
        dropped = sorted(set(drop))
        if dropped[0] < 0 or dropped[-1] >= total:
            raise ValueError(f"drop={drop!r}: the blocks of {path} are 0 to {total - 1}.")
    elif batches is not None:
        influence = layer_influence(model, path, batches)
        dropped = sorted(sorted(range(total), key=influence.__getitem__)[:number])
    else:
        left = total - number
        kept = {round(i * (total - 1) / (left - 1)) if left > 1 else 0 for i in range(left)}
        dropped = [i for i in range(total) if i not in kept]
    before = getattr(stack, "kept_layers", list(range(total)))
    stack.kept_layers = [before[i] for i in range(total) if i not in dropped]
    remove_blocks(stack, dropped)
    config = getattr(model, "config", None)
    for name in ("num_hidden_layers", "n_layers"):
        if getattr(config, name, None) == total:
            setattr(config, name, total - number)
    return dropped


def remove_blocks(stack: nn.ModuleList | nn.Sequential, dropped: Iterable[int]) -> None:
    """Deletes blocks, and numbers the others anew where they know their number (for caches)."""
    for i in sorted(dropped, reverse=True):
        del stack[i]
    for i, block in enumerate(stack):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = i


@torch.no_grad()
def layer_influence(model: nn.Module, path: str, batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """How much each block of the stack changes its input: mean over positions of 1 - cosine(input, output)."""
    stack = model.get_submodule(path)
    sums, number = [0.0] * len(stack), 0

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = first_tensor(args if args else tuple(kwargs.values()))
            y = first_tensor(output)
            if x is None or y is None or x.shape != y.shape:
                sums[index] = float("inf")  # it changes the shape, so it cannot be removed
                return
            sums[index] += float(1 - nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).mean())

        return hook

    handles = [block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(stack)]
    training = model.training
    model.eval()
    try:
        for number, batch in enumerate(batches, 1):  # noqa: B007
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not number:
        raise ValueError("batches is empty; one batch or more is needed to rank layers.")
    return [value / number for value in sums]


def _stack(model: nn.Module) -> str:
    def alike(stack: nn.Module) -> bool:
        return len({type(block) for block in stack}) == 1 and sum(1 for _ in stack[0].parameters()) > 1

    found = {path: len(module) for path, module in model.named_modules()
             if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and alike(module)}  # fmt: skip
    if not found:
        raise ValueError(f"{type(model).__name__} has no ModuleList or Sequential of like blocks; give path=.")
    return max(found, key=found.__getitem__)
