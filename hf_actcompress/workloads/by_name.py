"""Classifiers by name or folder: untrained ones and their inputs, loaded ones, and whether they take images or texts.

transformers and timm are imported inside.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import models
from .hub import EXAMPLES_INSTALL, hub_state


class ByName(NamedTuple):
    build: Callable[[], nn.Module]  # with random weights
    inputs: Callable[[int, Any], Any]  # of a number of examples on a device
    example: str  # the size of one example, in words


def build_by_name(name: str, *, seq_len: int = 128, image_size: int = 224) -> ByName:
    """The model `name` (timm name, hub id, local folder, "minilm", "efficientnet-lite0") and inputs for it.

    Of a hub id only the configuration is downloaded.

    Raises ValueError for a name that is not found, and a model that is no classifier of texts or images.
    """
    pixels = f"{image_size}x{image_size} pixels"

    def images(batch: int, device: Any, channels: int = 3) -> Tensor:
        return torch.zeros(batch, channels, image_size, image_size, device=device)

    architecture = "tf_efficientnet_lite0" if name == models.EFFICIENTNET else name
    folder = Path(models.packaged_minilm() if name == models.MINILM else name).expanduser()
    if not folder.is_dir() and "/" not in name:
        timm = timm_or_none()
        if timm is None and architecture != name:
            raise ValueError(f"{name!r} needs timm: {EXAMPLES_INSTALL}.")
        if timm is not None and timm.is_model(architecture):
            own = timm.get_pretrained_cfg(architecture)
            extra = {"img_size": image_size} if own is not None and own.fixed_input_size else {}
            return ByName(lambda: timm.create_model(architecture, **extra), images, pixels)

    config, auto = classifier_of(str(folder.resolve()) if folder.is_dir() else name)
    if auto.__name__.endswith("ImageClassification"):
        config.image_size = image_size
        channels = getattr(config, "num_channels", None) or 3
        inputs = lambda *a: {"pixel_values": images(*a, channels)}  # noqa: E731
        return ByName(lambda: auto.from_config(config), inputs, pixels)

    text = config.get_text_config()
    end = text.eos_token_id if isinstance(getattr(text, "eos_token_id", None), int) else 0
    if getattr(text, "pad_token_id", None) is None:
        config.pad_token_id = text.pad_token_id = end  # decoders refuse batches without one

    def tokens(batch: int, device: Any) -> dict[str, Tensor]:
        # No attention mask: transformers would look at its values, which meta tensors lack.
        ids = torch.full((batch, seq_len), 3, device=device)
        ids[:, -1] = end  # encoder-decoders look for the end of the sentence
        return {"input_ids": ids}

    return ByName(lambda: auto.from_config(config), tokens, f"{seq_len} tokens")


def takes_images(name: str) -> bool:
    """Whether a model classifies images, by its name or the configuration in its folder; the others take texts.

    Raises ValueError for a name that is not found, and a model that classifies neither.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name in (models.MINILM, models.TINY_BERT):
            return False
        timm = timm_or_none()
        known = timm is not None and "/" not in name and timm.is_model(name)
        if known or name == models.EFFICIENTNET or name.startswith(models.TORCHVISION):
            return True
    elif not (folder / "config.json").is_file():
        raise ValueError(f"{name} has no config.json, which says what the model is.")
    auto = classifier_of(str(folder.resolve()) if folder.is_dir() else name)[1]
    return auto.__name__.endswith("ForImageClassification")


def load_model(where: str, num_labels: int, images: bool) -> tuple[Any, Path | None, int | None]:
    """(model, its folder, bits that its compressed file counts) of a name, or a folder that transformers or
    hf_actcompress.weights has written.  Raises ValueError."""
    from ..weights import checkpoint, files, manifest, quantize, weight_only

    folder, loader = Path(where).expanduser(), models.load_image_model if images else models.load_text_model
    if not folder.is_dir():
        if folder.is_absolute() or where.startswith("."):
            raise ValueError(f"There is no folder {where}.")
        return loader(where, num_labels)[0], None, None
    if quantize.is_quantized(folder):
        return quantize.load_quantized(folder), folder, None
    if (folder / checkpoint.FILE_NAME).is_file():
        model, structure = files.build_model(folder), checkpoint.read_manifest(folder)["structure"]
        if isinstance(structure, dict) and "shapes" in structure:
            manifest.apply_shapes(model, manifest.check_manifest(structure, folder / checkpoint.FILE_NAME))
        checkpoint.load_compressed(folder, model)
        return model, folder, 8 * (folder / checkpoint.FILE_NAME).stat().st_size
    if weight_only.is_few_bits(folder):
        return weight_only.load_few_bits(folder), folder, 8 * (folder / weight_only.WEIGHTS).stat().st_size
    if manifest.is_pruned(folder):
        return manifest.load_pruned(folder), folder, None
    return loader(where, num_labels)[0], folder, None


def timm_or_none() -> Any:
    try:
        import timm
    except ImportError:
        return None
    return timm


def classifier_of(name: str) -> tuple[Any, Any]:
    """(configuration, transformers' auto class of the classifier) of a folder or hub id."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
    from transformers.models.auto import modeling_auto as auto

    from ..weights.files import read_config

    state = hub_state()
    try:
        config = read_config(name, local_files_only=state != "online")
    except (OSError, ValueError, KeyError) as error:
        timm = timm_or_none()
        close = difflib.get_close_matches(name, timm.list_models(), 3) if timm else []
        hint = f" Did you mean timm's {' or '.join(close)}?" if close else ""
        missing = "" if timm else f" (timm is not installed: {EXAMPLES_INSTALL})"
        raise ValueError(
            f"{name!r} is no timm model{missing} and no folder, and its "
            f"configuration could not be loaded (hub: {state}).{hint} {str(error).strip().splitlines()[0]}"
        ) from None
    # Some classes choose by this list and do not expect None.
    config.architectures = config.architectures or []
    for mapping, cls in (
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),
        (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification),
    ):
        if type(config) in mapping:
            return config, cls
    raise ValueError(
        f"{name!r} is a {config.model_type!r}: transformers has no text or image classifier of it to inspect. Use "
        "hf_actcompress.find_layers(model, example_inputs) in Python."
    )
