"""Which parameters each stage of a model computes with: one pass whose autograd graph is cut where the model is.

    parameters ─▶ … ─▶ output of layer 3 ═ cut ═▶ … ─▶ logits
                        a walk back from the logits ends at the cut: what it meets belongs to the last stage

A parameter that two walks meet is tied across stages.  A walk that meets the output of another stage's module has
found a connection that skips the cut, which a stage cannot have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..models.inputs import guesses
from ..models.layers import Layer, first_tensor
from ..models.untouched import untouched


def used_parameters(
    model: nn.Module, layers: Sequence[Layer], bounds: Sequence[int], example_inputs: Any = None
) -> list[set[int]] | None:
    """For each stage the ids of the parameters that its output depends on; None where no pass succeeds.

    bounds: stage k has the layers bounds[k] to bounds[k + 1] - 1.
    Raises ValueError for a connection that skips a cut.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for inputs in guesses(model) if example_inputs is None else [example_inputs]:
        try:
            for p in frozen:
                p.requires_grad_(True)
            roots, owners = _run(model, layers, bounds, inputs)
        except Exception:  # noqa: BLE001, S112 - a guess can fail in any way; find_layers has said so
            continue
        finally:
            for p in frozen:
                p.requires_grad_(False)
        if None not in roots:
            return [_walk(roots, owners, stage, layers, bounds) for stage in range(len(roots))]
    return None


def _run(model: nn.Module, layers: Sequence[Layer], bounds: Sequence[int], inputs: Any) -> tuple[list, dict]:
    """(the graph's node at the end of each stage, {node: (stage, path) of the module whose output it is})"""
    ends = {layers[bound - 1].module: stage for stage, bound in enumerate(bounds[1:-1])}
    roots: list[Any] = [None] * (len(bounds) - 1)
    owners: dict[Any, tuple[int, str]] = {}

    def note(stage: int, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values = dict(output) if isinstance(output, Mapping) else output
            for value in tree_flatten(values)[0]:
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    owners.setdefault(value.grad_fn, (stage, path))
            if path in ends and roots[ends[path]] is None and (found := first_tensor(output)) is not None:
                roots[ends[path]] = found.grad_fn

        return hook

    handles = []
    for stage in range(len(bounds) - 1):
        for layer in layers[bounds[stage] : bounds[stage + 1]]:
            for part in layer.parts:
                for name, module in model.get_submodule(part).named_modules(prefix=part):
                    handles.append(module.register_forward_hook(note(stage, name)))
    try:
        with untouched(model), torch.enable_grad():
            output = call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    found = output["logits"] if isinstance(output, Mapping) and "logits" in output else first_tensor(output)
    roots[-1] = None if found is None else found.grad_fn
    return roots, owners


def call(model: nn.Module, inputs: Any) -> Any:
    """The output of `model` for keyword arguments, a tuple of arguments or one tensor, moved to its device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return model(**{key: move(value) for key, value in inputs.items()})
    return model(*[move(x) for x in (inputs if isinstance(inputs, (tuple, list)) else [inputs])])


def _walk(roots: list, owners: dict, stage: int, layers: Sequence[Layer], bounds: Sequence[int]) -> set[int]:
    entry = roots[stage - 1] if stage else None
    found, seen, waiting = set(), {entry}, [roots[stage]]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        owner, path = owners.get(node, (stage, ""))
        if owner < stage:
            raise ValueError(
                f"The model cannot be cut after layer {bounds[stage] - 1} ({layers[bounds[stage] - 1].name}): what "
                f"{path} computes in stage {owner} is used again in stage {stage}, and only the output of the last "
                "layer before a cut is sent. Choose other cuts."
            )
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        waiting += [following for following, _ in node.next_functions]
    return found
