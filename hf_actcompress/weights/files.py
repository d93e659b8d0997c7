"""How files of compressed models are read: safetensors and JSON, none of which can hold code."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

INSTALL = 'pip install "hf_actcompress[weights]"'


def read_json(path: Path, version: int) -> dict[str, Any]:
    """The mapping in a JSON file with `"format": version`.  Raises ValueError for any other file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again.") from None
    if not isinstance(found, dict) or found.get("format") != version:
        raise ValueError(f"{path} is not of format {version}: another version of the package has written it. Save the "
                         "model again with this one.")  # fmt: skip
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises ValueError for a file that is missing, damaged or cut short."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}.")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); copy or save it again.") from None


def is_shape(value: Any) -> bool:
    """Whether a value from a file is a list of whole numbers of 0 or more."""
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def read_config(where: str | Path, **options: Any) -> Any:
    """The transformers configuration of a folder or hub id, those of torchvision's models included.

    options: of `AutoConfig.from_pretrained`.
    Raises ValueError for a folder without one, and for one that would make timm read other files.
    """
    from transformers import AutoConfig

    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise ValueError(f"{where} has no config.json to build the model from: pass the model, such as "
                         "load_pruned(folder, model).")  # fmt: skip
    if importlib.util.find_spec("torchvision"):
        from . import vision  # noqa: F401  registers torchvision's models with transformers
    config = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    arguments = getattr(config, "model_args", None) or {}
    reads = [name for name in arguments if name == "checkpoint_path" or name.startswith("pretrained")]
    if reads or ":" in str(getattr(config, "architecture", "")):
        raise ValueError(f"{where}: its config.json names files beyond the folder ({reads or config.architecture}); "
                         "a saved model needs none.")  # fmt: skip
    return config


def save_config(model: nn.Module, folder: Path) -> None:
    """The configuration of a transformers model, with its class; nothing for other models."""
    config = getattr(model, "config", None)
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)


def build_model(folder: Path) -> nn.Module:
    """The model of a folder's config.json, with random weights."""
    import transformers

    config = read_config(folder)
    name = (config.architectures or ["none"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:  # registered from outside
        cls = transformers.AutoModelForImageClassification._model_mapping.get(type(config), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{folder}/config.json names the class {name!r}, which is no model of transformers: pass the "
                         "model, such as load_pruned(folder, model).")  # fmt: skip
    return cls(config)


def some(names: Iterable[str]) -> str:
    """The first three of them, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
