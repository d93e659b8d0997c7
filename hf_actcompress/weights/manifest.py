"""Pruned models on disk: weights as safetensors, and a manifest of shapes, since these are not the configuration's.

Nothing here prunes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .depth import remove_blocks
from .files import build_model, is_shape, read_json, read_safetensors, save_config, some

MANIFEST = "pruned_shapes.json"
WEIGHTS = "model.safetensors"
FORMAT = 1
# Attributes that hold shapes: of layers, and the number of heads of attention.
ATTRIBUTES = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "normalized_shape",
    "num_channels", "embedding_dim", "num_attention_heads", "num_heads", "n_heads", "all_head_size", "attn_dim",
)  # fmt: skip


def shape_manifest(model: nn.Module) -> dict[str, Any]:
    """Shapes of all parameters and buffers and the attributes that belong to them, by name."""
    modules = {}
    for path, module in model.named_modules():
        found = {name: getattr(module, name, None) for name in ATTRIBUTES}
        found = {name: value for name, value in found.items() if isinstance(value, (int, tuple))}
        if found:
            modules[path] = found
    return {
        "format": FORMAT,
        "class": type(model).__name__,
        "shapes": {name: list(value.shape) for name, value in model.state_dict().items()},
        "modules": modules,
        "kept_layers": {path: m.kept_layers for path, m in model.named_modules() if hasattr(m, "kept_layers")},
    }


def write_shapes(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    path = Path(folder) / MANIFEST
    path.write_text(json.dumps(shape_manifest(model)))
    return path


def save_pruned(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes weights (safetensors), the configuration of a transformers model, and the manifest; returns `folder`."""
    from safetensors.torch import save_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(model, folder)
    # Not the model's save_pretrained: it renames tensors to their names in older versions.
    save_model(model, str(folder / WEIGHTS))
    write_shapes(model, folder)
    return folder


def load_pruned(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save_pruned` has written, in eval mode.

    `model` is an unpruned instance, which is changed in place; None builds one from config.json, which only a
    transformers model has.  Raises ValueError for a missing or damaged file and for a manifest that does not fit the
    weights or the model, before anything is changed.
    """
    folder = Path(folder)
    manifest, weights = read_shapes(folder), read_safetensors(folder / WEIGHTS)
    # Names without weights of their own share those of another name (tied embeddings).
    stored = [list(value.shape) for value in weights.values()]
    wrong = [name for name, value in weights.items() if list(value.shape) != manifest["shapes"].get(name)]
    wrong += [name for name, shape in manifest["shapes"].items() if name not in weights and shape not in stored]
    if wrong:
        raise ValueError(f"{folder}: the manifest does not fit the weights at {some(wrong)}; save the model again.")
    if model is None:
        model = build_model(folder)
    apply_shapes(model, manifest)
    left = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in left.missing_keys if name not in tied and name in manifest["shapes"]
               and name not in _shared_names(model, weights)]  # fmt: skip
    if missing or left.unexpected_keys:
        raise ValueError(f"{folder}: weights missing for {some(missing)}, unexpected {some(left.unexpected_keys)}.")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def is_pruned(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def read_shapes(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest that `save_pruned` has written; ValueError for a missing, damaged or implausible one."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no {MANIFEST}: it was not written by save_pruned.")
    return check_manifest(read_json(path, FORMAT), path)


def check_manifest(manifest: Any, path: Path) -> dict[str, Any]:
    """`manifest`, if all its fields are what `shape_manifest` writes; ValueError, which names the field, otherwise."""
    shapes, modules, kept = (manifest.get(key) if isinstance(manifest, dict) else None
                             for key in ("shapes", "modules", "kept_layers"))  # fmt: skip
    for field, value in (("shapes", shapes), ("modules", modules), ("kept_layers", kept)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {field} is no mapping; save the model again.")
    wrong = [f"shapes[{name!r}]" for name, shape in shapes.items() if not is_shape(shape)]
    wrong += [f"kept_layers[{name!r}]" for name, numbers in kept.items() if not is_shape(numbers) or not numbers]
    for name, attributes in modules.items():
        good = isinstance(attributes, dict) and all(
            key in ATTRIBUTES and (type(value) is int or is_shape(value)) for key, value in attributes.items()
        )
        wrong += [] if good else [f"modules[{name!r}]"]
    if wrong:
        raise ValueError(f"{path}: {some(wrong)} cannot be right; save the model again.")
    return manifest


def apply_shapes(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Gives an unpruned `model` the shapes of a pruned one; tensors that change shape are uninitialised.

    Raises ValueError, and changes nothing, where the model has other modules than the manifest.
    """
    if type(model).__name__ != manifest.get("class"):
        raise ValueError(f"The manifest is that of a {manifest.get('class')}, the model a {type(model).__name__}.")
    stacks = {}
    for path, kept in manifest["kept_layers"].items():
        stack = dict(model.named_modules()).get(path)
        if not isinstance(stack, (nn.ModuleList, nn.Sequential)):
            raise ValueError(f"The manifest names a stack {path!r}, which {type(model).__name__} does not have.")
        if len(stack) != len(kept):
            if max(kept) >= len(stack):
                raise ValueError(f"{path} has {len(stack)} blocks; the manifest keeps number {max(kept)}.")
            stacks[path] = [i for i in range(len(stack)) if i not in kept]
    # Which names the model will have, before it is touched.
    if not stacks:
        names, own = set(model.state_dict()), set(manifest["shapes"])
        if names != own:
            raise ValueError(f"The manifest does not fit {type(model).__name__}: it has {some(own - names)}, the "
                             f"model {some(names - own)}.")  # fmt: skip
        odd = [n for n, v in model.state_dict().items() if v.dim() != len(manifest["shapes"][n])]
        if odd:
            raise ValueError(f"The manifest does not fit {type(model).__name__}: other dimensions at {some(odd)}.")
    for path, dropped in stacks.items():
        remove_blocks(model.get_submodule(path), dropped)
    for path, kept in manifest["kept_layers"].items():
        model.get_submodule(path).kept_layers = list(kept)
    for path, attributes in manifest["modules"].items():
        module = model.get_submodule(path)
        for name, value in attributes.items():
            setattr(module, name, tuple(value) if isinstance(value, list) else value)
    for name, shape in manifest["shapes"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        value = getattr(module, leaf)
        if list(value.shape) == shape:
            continue
        new = torch.empty(shape, dtype=value.dtype, device=value.device)
        if isinstance(value, nn.Parameter):
            module._parameters[leaf] = nn.Parameter(new, requires_grad=value.requires_grad)
        else:
            module._buffers[leaf] = new


def _shared_names(model: nn.Module, weights: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that another name has loaded already (tied embeddings)."""
    state = model.state_dict()
    loaded = {state[name].data_ptr() for name in weights if name in state}
    return {name for name, value in state.items() if value.data_ptr() in loaded}
