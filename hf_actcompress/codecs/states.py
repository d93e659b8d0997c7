"""States as files: tensors in safetensors, everything else in its JSON header.  No file holds code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

SEPARATOR = "\x1f"


def save_states(path: str | os.PathLike, values: dict[str, Any], **more: Any) -> None:
    """Write nested dicts of tensors and JSON values to `path`, and each of `more` as JSON beside them.

    The file appears at once, by renaming: a run that is killed leaves no half of one.
    """
    tensors, rest = flatten_state(values)
    unfinished = Path(f"{path}.tmp")
    save_file(tensors, unfinished, metadata={"state": json.dumps(rest)} | {k: json.dumps(v) for k, v in more.items()})
    os.replace(unfinished, path)


def load_states(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the nested dicts, what was given as `more`).

    Raises ValueError, with the reason, for a file that cannot be read or is of another kind.
    """
    try:
        with safe_open(path, "pt") as file:
            header = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        return unflatten_state(tensors, header.pop("state")), header
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not a file of states ({type(error).__name__}: {error}).") from error


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
            inner_tensors, inner_rest = flatten_state(value, f"{path}{SEPARATOR}")
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
            tensor, stride = tensors[value["tensor"]], value["stride"]
            reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, stride, strict=True))
            if tensor.numel() and reach != tensor.numel():
                raise ValueError(f"{key}: the strides {stride} do not fit the shape {tuple(tensor.shape)}")
            result[key] = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
        else:
            result[key] = unflatten_state(tensors, value) if isinstance(value, dict) else value
    return result
