"""Pruned models on disk: which shapes and attributes differ from what the configuration would build, beside the
safetensors, so that a pruned model loads by itself.  Nothing here prunes.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

MANIFEST = "pruned_shapes.json"
WEIGHTS = "model.safetensors"
FORMAT = 1
INSTALL = 'pip install "hf_actcompress[weights]"'
# What layers remember of their shapes, and attention of its heads.
ATTRIBUTES = (
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "normalized_shape",
    "num_channels", "embedding_dim", "num_attention_heads", "num_heads", "n_heads", "all_head_size", "attn_dim",
)  # fmt: skip


def shape_manifest(model: nn.Module) -> dict[str, Any]:
    """Shapes of all parameters and buffers, and the attributes that go with them, by name."""
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
    config = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    # Not save_pretrained of the model: it renames tensors to what older versions called them.
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
    manifest, weights = read_shapes(folder), _read_weights(folder)
    wrong = [name for name, value in weights.items() if list(value.shape) != manifest["shapes"].get(name)]
    if wrong:
        raise ValueError(f"{folder}: the manifest does not fit the weights at {_few(wrong)}; save the model again.")
    if model is None:
        model = build(folder)
    apply_shapes(model, manifest)
    left = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in left.missing_keys if name not in tied and name in manifest["shapes"]
               and name not in _shared_names(model, weights)]  # fmt: skip
    if missing or left.unexpected_keys:
        raise ValueError(f"{folder}: weights missing for {_few(missing)}, unexpected {_few(left.unexpected_keys)}.")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.eval()


def is_pruned(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def read_shapes(folder: str | os.PathLike[str]) -> dict[str, Any]:
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} holds no {MANIFEST}: it was not written by save_pruned.")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of format {FORMAT}; it may come from a newer version.")
    return manifest


def apply_shapes(model: nn.Module, manifest: dict[str, Any]) -> None:
    """Gives an unpruned `model` the shapes of a pruned one; what changes its shape is left uninitialised.

    Raises ValueError, and changes nothing, where the model has other modules than the manifest.
    """
    if type(model).__name__ != manifest["class"]:
        raise ValueError(f"The manifest is that of a {manifest['class']}, the model a {type(model).__name__}.")
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
            raise ValueError(f"The manifest does not fit {type(model).__name__}: it has {_few(own - names)}, the "
                             f"model {_few(names - own)}.")  # fmt: skip
        odd = [n for n, v in model.state_dict().items() if v.dim() != len(manifest["shapes"][n])]
        if odd:
            raise ValueError(f"The manifest does not fit {type(model).__name__}: other dimensions at {_few(odd)}.")
    for path, dropped in stacks.items():
        stack = model.get_submodule(path)
        for i in reversed(dropped):
            del stack[i]
    for path, kept in manifest["kept_layers"].items():
        model.get_submodule(path).kept_layers = list(kept)
        for i, block in enumerate(model.get_submodule(path)):
            for module in block.modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = i
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


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}.")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); copy or save it again.") from None


def register_vision() -> None:
    """Makes transformers know torchvision's models, where torchvision is there."""
    if importlib.util.find_spec("torchvision"):
        from ..workloads import vision  # noqa: F401


def build(folder: Path) -> nn.Module:
    """The unpruned model of config.json, with random weights."""
    import transformers

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json to build the model from: pass load_pruned(folder, model).")
    register_vision()
    config = transformers.AutoConfig.from_pretrained(folder)
    name = (config.architectures or ["none"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:  # registered from outside
        cls = transformers.AutoModelForImageClassification._model_mapping.get(type(config), None)
    if cls is None:
        raise ValueError(f"{folder}/config.json names the class {name!r}, which transformers does not have: pass "
                         "load_pruned(folder, model).")  # fmt: skip
    return cls(config)


def _shared_names(model: nn.Module, weights: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that another name has loaded already (tied embeddings)."""
    state = model.state_dict()
    loaded = {state[name].data_ptr() for name in weights if name in state}
    return {name for name, value in state.items() if value.data_ptr() in loaded}


def _few(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
