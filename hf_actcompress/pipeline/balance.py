"""Where to cut, so that stages have about as much of something: layers, parameters, FLOPs or measured time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.inputs import guesses
from ..models.layers import Layer
from ..models.untouched import untouched
from .arguments import BALANCES
from .usage import call


def balanced(model: nn.Module, layers: Sequence[Layer], stages: int, balance: str, example_inputs: Any) -> list[int]:
    """Bounds of the stages: stage k has the layers bounds[k] to bounds[k + 1] - 1.

    Raises ValueError for another kind of balance, and where FLOPs or time need a pass that does not succeed.
    """
    if balance not in BALANCES:
        raise ValueError(f"balance={balance!r} is not known; choose one of: {', '.join(BALANCES)}.")
    if balance == "layers":
        return [round(len(layers) * k / stages) for k in range(stages + 1)]
    if balance == "parameters":
        costs = [float(sum(p.numel() for p in _parameters(model, layer))) for layer in layers]
    else:
        costs = _costs(model, layers, balance, example_inputs)
    return partition(costs, stages)


def partition(costs: Sequence[float], stages: int) -> list[int]:
    """Bounds of `stages` runs of neighbours, none empty, of which the dearest is as cheap as possible."""
    count, sums = len(costs), [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[k][n]: the dearest of the first n layers in k + 1 stages, and where the last of these begins.
    best = [[(sums[n], 0) for n in range(count + 1)]]
    for k in range(1, stages):
        row = [(float("inf"), 0)] * (count + 1)
        for n in range(k + 1, count + 1):
            row[n] = min((max(best[-1][at][0], sums[n] - sums[at]), at) for at in range(k, n))
        best.append(row)
    bounds = [count]
    for row in reversed(best):
        bounds.append(row[bounds[-1]][1])
    return bounds[::-1]


def _parameters(model: nn.Module, layer: Layer) -> list[nn.Parameter]:
    return list({id(p): p for path in layer.parts for p in model.get_submodule(path).parameters()}.values())


def _costs(model: nn.Module, layers: Sequence[Layer], balance: str, example_inputs: Any) -> list[float]:
    """FLOPs or seconds of each layer's parts in one forward pass (seconds: the least of three)."""
    spent: dict[str, list[float]] = {}
    counter = FlopCounterMode(display=False) if balance == "flops" else None
    begun: list[float] = []

    def now() -> float:
        if counter is not None:
            return float(counter.get_total_flops())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(module: nn.Module, args: Any) -> None:
        begun.append(now())

    def after(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            spent.setdefault(path, []).append(now() - begun.pop())

        return hook

    failure = "no input could be made up for it"
    for inputs in guesses(model) if example_inputs is None else [example_inputs]:
        handles = []
        for path in dict.fromkeys(path for layer in layers for path in layer.parts):
            module = model.get_submodule(path)
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after(path))]
        spent.clear()
        begun.clear()
        try:
            for _ in range(1 if counter else 3):
                with untouched(model), counter or nullcontext():
                    call(model, inputs)
            calls = {path: layer.calls for layer in layers for path in layer.parts}
            least = {p: sum(values) if counter else min(values) * calls[p] for p, values in spent.items()}
            return [sum(least.get(path, 0.0) for path in layer.parts) for layer in layers]
        except Exception as error:  # noqa: BLE001 - a guess can fail in any way
            failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            for handle in handles:
                handle.remove()
    raise ValueError(
        f"balance={balance!r} needs a forward pass of {type(model).__name__}, and none succeeded ({failure}). Pass "
        "example_inputs=, or use balance='parameters'."
    )
