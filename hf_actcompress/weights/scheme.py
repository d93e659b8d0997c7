"""Which compression for which parameters: {"conv*": "prune:keep=104", "fc*": "codebook:k=2"}."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .base import Compression
from .compressions import LowRank, parse_compression

Scheme = Mapping[str, "str | Compression"]


@dataclass(frozen=True)
class Task:
    """A pattern, the parameters it names, and what becomes of them."""

    pattern: str
    names: tuple[str, ...]
    compression: Compression


def parse_scheme(scheme: Scheme | str) -> dict[str, Compression]:
    """A mapping, the same as JSON text, or one spec for all matrices and filters ("codebook:k=2")."""
    if isinstance(scheme, str):
        text = scheme.strip()
        if not text.startswith("{"):
            return {"*": parse_compression(text)}
        try:
            scheme = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"The scheme {text!r} is not JSON: {error}.") from None
    if not isinstance(scheme, Mapping) or not scheme:
        raise ValueError(f"A scheme maps patterns to compressions, such as {{'fc*': 'codebook:k=2'}}; got {scheme!r}.")
    return {str(pattern): parse_compression(spec) for pattern, spec in scheme.items()}


def find_tasks(model: nn.Module, scheme: Scheme | str) -> list[Task]:
    """The tasks of a model, each parameter in the first whose pattern names it.

    A pattern is a glob for a module (its `weight` is meant) or for a parameter by its full name ("fc1.bias"), from the
    first or any later component of the name on: "layer.*.dense" finds "bert.encoder.layer.0.output.dense".  Modules
    count if their weight has two or more dimensions.  Parameters that are shared count once.

    Raises ValueError for a pattern that finds nothing, with the candidates.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    free = dict(parameters)
    tasks = []
    for pattern, compression in parse_scheme(scheme).items():
        names = tuple(name for name, p in free.items() if _matches(pattern, name, p))
        if not names:
            taken = [n for n, p in parameters.items() if n not in free and _matches(pattern, n, p)]
            reason = f"its matches {taken} belong to earlier patterns" if taken else "it matches no parameter"
            candidates = [name.removesuffix(".weight") for name, p in free.items() if p.dim() > 1]
            raise ValueError(
                f"The pattern '{pattern}' of the scheme is left with nothing: {reason}. Layers still free: "
                f"{', '.join(candidates) or 'none'}; or give a parameter's full name, as {next(iter(parameters), '')}."
            )
        if isinstance(compression, LowRank):
            for name in names:
                _check_rank(name, free[name], compression)
        for name in names:
            del free[name]
        tasks.append(Task(pattern, names, compression))
    return tasks


def _matches(pattern: str, name: str, parameter: Tensor) -> bool:
    module, _, leaf = name.rpartition(".")
    words = [module] if leaf == "weight" and parameter.dim() > 1 else []
    last = pattern.rpartition(".")[2]
    if parameter.dim() > 1 or last == leaf:  # "*" alone should not take biases and norms
        words.append(name)
    return any(
        fnmatch.fnmatchcase(word[start:], pattern)
        for word in words
        for start in (0, *(i + 1 for i, letter in enumerate(word) if letter == "."))
    )


def _check_rank(name: str, parameter: Tensor, compression: LowRank) -> None:
    most = min(parameter.shape[0], parameter[0].numel()) if parameter.dim() > 1 else 0
    if compression.rank != "auto" and compression.rank > most:
        raise ValueError(
            f"lowrank: rank={compression.rank} is above {most}, the largest of {name} {tuple(parameter.shape)}. "
            "Lower it, use rank=auto, or give this layer an entry of its own before this pattern."
        )
