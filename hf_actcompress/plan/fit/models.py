"""Models by name for `fit`: built without weights, at any depth, and the batches that they take.

transformers, timm and peft are imported inside.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENS, PIXELS = "tokens", "pixels"
# How a batch's labels look, by the end of the class's name.
TASKS = {
    "ForCausalLM": "tokens", "LMHeadModel": "tokens", "ForMaskedLM": "tokens", "ForPreTraining": "tokens",
    "ForConditionalGeneration": "tokens", "ForTokenClassification": "tokens",
    "ForSequenceClassification": "row", "ForImageClassification": "row",
}  # fmt: skip
EXAMPLES = 'pip install "hf_actcompress[examples]"'
LLM = 'pip install "hf_actcompress[llm]"'


@dataclass(frozen=True)
class Subject:
    """A model that is to be counted.

    make: builds it, with so many layers, or all.
    batch: rows and size (tokens, or pixels of a side) -> its inputs; on the device of the context.
    size: of an example, and what it counts.
    depth: its layers where all are alike and their number may be chosen, else None.
    """

    name: str
    make: Callable[[int | None], nn.Module]
    batch: Callable[[int, int], dict[str, Any]]
    size: int
    unit: str
    depth: int | None = None
    most: int | None = None  # positions that the model knows
    absolute: bool = False  # whether it has no more


def find_model(
    model: Any, *, seq_len: int | None, image_size: int | None, config: Mapping[str, Any] | None, dtype: str,
    lora: Mapping[str, Any] | None, local_files_only: bool = True,
) -> Subject:  # fmt: skip
    """A folder with config.json, a kind that transformers knows ("llama"), the name of a model's or configuration's
    class, a timm model, a hub id, or a configuration object.

    Raises ValueError for a name that is none of these, with what is close to it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; choose one of: {', '.join(DTYPES)}.")
    if isinstance(model, (str, Path)):
        timm = None if _is_kind(str(model)) else _timm_named(str(model))
        if timm is not None:
            return _timm(str(model), timm, image_size, seq_len, config, dtype, lora)
        config_object, cls = _configuration(str(model), local_files_only)
        name = str(model)
    elif hasattr(model, "model_type"):
        config_object, cls, name = copy.deepcopy(model), None, type(model).__name__
    else:
        raise ValueError(f"model={model!r} is neither a name nor a configuration of transformers.")
    for key, value in (config or {}).items():
        _set(config_object, key, value)
    return _transformers(name, config_object, cls, seq_len, image_size, dtype, lora)


# -- transformers ---------------------------------------------------------------------------------------------


def _is_kind(name: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def _configuration(name: str, local_files_only: bool) -> tuple[Any, Any]:
    """(configuration, class of the model or None)"""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ...weights.files import read_config

    if Path(name).expanduser().is_dir():
        if not (Path(name).expanduser() / "config.json").is_file():
            raise ValueError(f"{name} has no config.json, which says what the model is.")
        return read_config(str(Path(name).expanduser().resolve()), local_files_only=True), None
    if name in CONFIG_MAPPING:
        return CONFIG_MAPPING[name](), None
    cls = getattr(transformers, name, None) if name.isidentifier() else None
    if isinstance(cls, type) and issubclass(cls, transformers.PretrainedConfig):
        return cls(), None
    if isinstance(cls, type) and getattr(cls, "config_class", None) is not None:
        return cls.config_class(), cls
    why = ""
    if "/" in name and not name.startswith((".", "/", "~")):
        try:
            return read_config(name, local_files_only=local_files_only), None
        except (OSError, ValueError, KeyError) as error:
            why = " " + str(error).strip().splitlines()[0]
    known = [*CONFIG_MAPPING, *_timm_names()]
    close = difflib.get_close_matches(name, known, 3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"{name!r} is no folder with a config.json, no kind or class of transformers, no timm model, and no hub id "
        f"whose configuration could be read.{hint}{why} Of a gated or absent model a folder with its config.json is "
        "enough."
    )


def _set(config: Any, key: str, value: Any) -> None:
    if not hasattr(config, key):
        names = [*config.to_dict(), *getattr(config, "attribute_map", {})]
        close = difflib.get_close_matches(key, names, 3)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"--config {key}: {type(config).__name__} has no {key}.{hint}")
    setattr(config, key, value)
    kinds = getattr(config, "layer_types", None)
    if key in ("num_hidden_layers", config.attribute_map.get("num_hidden_layers")) and kinds:
        config.layer_types = [kinds[i % len(kinds)] for i in range(value)]


def _class_of(config: Any) -> Any:
    """The class that trains with such a configuration: what it names, else a language model where the kind is a
    decoder, else a classifier."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    for name in config.architectures or []:
        cls = getattr(transformers, name, None)
        if cls is not None and name.endswith(tuple(TASKS)):
            return cls
    kind, masked = type(config), type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING
    for mapping, fits in (
        (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, True), (auto.MODEL_FOR_CAUSAL_LM_MAPPING, not masked),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, getattr(config, "is_encoder_decoder", False)),
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, True), (auto.MODEL_FOR_CAUSAL_LM_MAPPING, True),
    ):  # fmt: skip
        if fits and kind in mapping:
            return mapping[kind]
    raise ValueError(
        f"transformers has no language model and no classifier of texts or images of the kind {config.model_type!r}."
    )


def _transformers(
    name: str, config: Any, cls: Any, seq_len: int | None, image_size: int | None, dtype: str, lora: Any
) -> Subject:
    config.architectures = getattr(config, "architectures", None) or []
    cls = cls or _class_of(config)
    cls = cls[0] if isinstance(cls, tuple) else cls
    task = next((labels for end, labels in TASKS.items() if cls.__name__.endswith(end)), None)
    if task is None:
        raise ValueError(
            f"{cls.__name__} has no loss of its own that is known here; name a class that ends in one of: "
            f"{', '.join(TASKS)}."
        )
    config.use_cache = False
    images = cls.main_input_name == "pixel_values"
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not images and getattr(text, "pad_token_id", None) is None:
        end = text.eos_token_id if isinstance(getattr(text, "eos_token_id", None), int) else 0
        config.pad_token_id = text.pad_token_id = end  # decoders refuse batches without one
    if images:
        _refuse("seq_len", seq_len, name, "image_size (--image-size)")
        if image_size is not None and hasattr(config, "image_size"):
            config.image_size = image_size
    else:
        _refuse("image_size", image_size, name, "seq_len (--seq-len)")

    def make(depth: int | None) -> nn.Module:
        chosen = copy.deepcopy(config)
        if depth is not None:
            for key, value in list(vars(chosen).items()):
                if isinstance(value, list) and len(value) == full and key != "architectures":
                    setattr(chosen, key, value[:depth])
            chosen.num_hidden_layers = depth
        with torch.device("meta"), _quiet():
            model = cls._from_config(chosen, dtype=DTYPES[dtype])
            return add_lora(model, lora)

    full = getattr(config, "num_hidden_layers", None)
    depth = full if isinstance(full, int) and _uniform(config, full) else None
    most = getattr(text, "max_position_embeddings", None)
    most = most if isinstance(most, int) and not images else None
    known = getattr(config, "image_size", None)
    known = known[0] if isinstance(known, (list, tuple)) else known
    size = (image_size or known or 224) if images else (seq_len or min(512, most or 512))
    if images:
        channels = getattr(config, "num_channels", None) or 3

        def batch(rows: int, size: int) -> dict[str, Any]:
            pixels = torch.zeros(rows, channels, size, size, dtype=DTYPES[dtype])
            return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}

    else:

        def batch(rows: int, size: int) -> dict[str, Any]:
            # No attention mask: transformers would look at its values.
            ids = torch.full((rows, size), 3)
            return {"input_ids": ids, "labels": ids if task == "tokens" else torch.zeros(rows, dtype=torch.long)}

    absolute = most is not None and getattr(text, "rope_parameters", None) is None
    return Subject(name, make, batch, size, PIXELS if images else TOKENS, depth, most, absolute)


def _refuse(option: str, value: Any, name: str, instead: str) -> None:
    if value is not None:
        raise ValueError(f"{option}={value}: {name} does not take that kind of input; use {instead}.")


def _uniform(config: Any, depth: int) -> bool:
    """Whether no setting tells the layers apart."""
    lists = [value for key, value in vars(config).items()
             if isinstance(value, (list, tuple)) and len(value) == depth and key != "architectures"]  # fmt: skip
    many = getattr(config, "is_encoder_decoder", False) or getattr(config, "first_k_dense_replace", 0)
    return not many and all(len({str(item) for item in values}) == 1 for values in lists)


def add_lora(model: Any, lora: Mapping[str, Any] | None) -> Any:
    """The model with adapters by PEFT, or itself."""
    if lora is None:
        return model
    try:
        import peft
    except ImportError:
        raise ValueError(f"--lora needs peft: {LLM}.") from None
    options = {"r": 16, "target_modules": "all-linear", **lora}
    if "alpha" in options:
        options["lora_alpha"] = options.pop("alpha")
    if "target" in options:
        options["target_modules"] = options.pop("target")
    try:
        made = peft.LoraConfig(**options)
        return peft.get_peft_model(model, made, low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--lora {','.join(f'{k}={v}' for k, v in lora.items())}: {error}") from None


# -- timm -----------------------------------------------------------------------------------------------------


def _timm_named(name: str) -> Any:
    if "/" in name or Path(name).expanduser().is_dir():
        return None
    try:
        import timm
    except ImportError:
        return None
    return timm if timm.is_model(name) else None


def _timm_names() -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    return timm.list_models()


def _timm(
    name: str, timm: Any, image_size: int | None, seq_len: int | None, config: Any, dtype: str, lora: Any
) -> Subject:
    _refuse("seq_len", seq_len, name, "image_size (--image-size)")
    own = timm.get_pretrained_cfg(name)
    options = dict(config or {})
    if own is not None and own.fixed_input_size and image_size is not None:
        options["img_size"] = image_size
    size = image_size or (own.input_size[-1] if own is not None else 224)

    def make(depth: int | None) -> nn.Module:
        with torch.device("meta"):
            try:
                model = timm.create_model(name, **options)
            except TypeError as error:
                raise ValueError(f"--config: {name} does not take that: {error}") from None
            return add_lora(model.to(DTYPES[dtype]), lora)

    def batch(rows: int, size: int) -> dict[str, Any]:
        return {"args": (torch.zeros(rows, 3, size, size, dtype=DTYPES[dtype]),),
                "targets": torch.zeros(rows, dtype=torch.long)}  # fmt: skip

    return Subject(name, make, batch, size, PIXELS)


# -- for both -------------------------------------------------------------------------------------------------


def parse_value(text: str) -> Any:
    """The value of `--config key=value`: JSON, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def empty_of(model: nn.Module, device: str) -> nn.Module:
    """The model of the meta device with tensors of `device`, in training mode; under FakeTensorMode without memory."""
    model = model.to_empty(device=device)
    for module in model.modules():  # tensors that are no parameters or buffers
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.device.type == "meta":
                setattr(module, key, torch.zeros_like(value, device=device))
    return model.train()
