"""Small inputs with which a model may run: made up from the names of its arguments and the sizes in its config.

Nobody's processor or data set is asked.  A guess may be wrong: whoever uses one tries the next.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRIES = 40  # of all combinations


def guesses(model: nn.Module, rows: int = 1, device: torch.device | str | None = None) -> Iterator[Any]:
    """Inputs that the model may accept, the likeliest and smallest first: keyword arguments, or one tensor.

    rows: samples in the batch.
    device: where the tensors are made; None for that of the parameters.
    """
    shape = Shapes(model, rows, device)
    taken = _arguments(model)
    known = [name for name in taken if name in MADE]
    main = getattr(model, "main_input_name", None)
    if main is None and getattr(model, "config", None) is None and (not taken or next(iter(taken)) not in MADE):
        yield from _by_layer_type(shape)
        return
    main = main if main in known else next((name for name in known if name != "attention_mask"), None)
    if main is not None:
        fewest = {main: 0} | {n: 0 for n in known if taken[n].default is inspect.Parameter.empty}
        both = fewest | {n: 0 for n in known if n in DECODER and shape.read("is_encoder_decoder")}
        data = both | {n: 0 for n in known if n not in OPTIONAL}
        most = data | {n: 0 for n in known if n != "inputs_embeds"}
        for names in dict.fromkeys([tuple(both), tuple(data), tuple(most), tuple(fewest)]):
            yield from _combined(names, shape)
    if isinstance(getattr(model, "dummy_inputs", None), Mapping):
        yield model.dummy_inputs
    if main is None:
        yield from _by_layer_type(shape)


def _combined(names: tuple[str, ...], shape: Shapes) -> Iterator[dict[str, Tensor]]:
    made = {name: MADE[name](shape) for name in names}
    made = {name: values for name, values in made.items() if values}
    for values in itertools.islice(itertools.product(*made.values()), TRIES):
        yield dict(zip(made, values, strict=True))


def _arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return {}


class Shapes:
    """The sizes of a model's inputs, from its config, the configs inside that, and its layers."""

    def __init__(self, model: nn.Module, rows: int = 1, device: Any = None) -> None:
        self.model, self.rows = model, rows
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.dtype, self.device = weight.dtype, torch.device(device) if device else weight.device
        self.configs = _with_inner(getattr(model, "config", None))

    def read(self, *names: str, default: Any = None) -> Any:
        """The first of these that a config has; outer configs before inner ones."""
        for config in self.configs:
            for name in names:
                value = config.get(name) if isinstance(config, Mapping) else _attribute(config, name)
                if value is not None and not callable(value):
                    return value
        return default

    def zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(self.rows, *map(int, sizes), dtype=self.dtype, device=self.device)

    def ones(self, *sizes: int) -> Tensor:
        return torch.ones(self.rows, *map(int, sizes), dtype=torch.long, device=self.device)

    def first(self, kinds: Any) -> Any:
        return next((m for m in self.model.modules() if isinstance(m, kinds)), None)


def _with_inner(config: Any) -> list[Any]:
    if config is None:
        return []
    found, todo = [], [config]
    while todo and len(found) < 20:
        config = todo.pop(0)
        if not any(config is each for each in found):
            found.append(config)
            values = config.values() if isinstance(config, Mapping) else vars(config).values()
            todo += [value for value in values if hasattr(value, "to_dict")]
    return found


def _attribute(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 - transformers raises errors of its own for values that differ by layer
        return None


# -- one function a kind of input ----------------------------------------------------------------------------------
LENGTH = 8


def _tokens(shape: Shapes) -> list[Tensor]:
    config = getattr(shape.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    embedding = shape.first(nn.Embedding)
    size = _attribute(text, "vocab_size") or shape.read("vocab_size") or getattr(embedding, "num_embeddings", LENGTH)
    size = size if isinstance(size, int) else LENGTH
    special = {value for each in shape.configs if not isinstance(each, Mapping) for name, value in vars(each).items()
               if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)}  # fmt: skip
    plain = [i for i in range(3, min(size, 200)) if i not in special] or [0]  # 0 and 1 are usual for padding
    ids = torch.tensor([plain[i % len(plain)] for i in range(LENGTH)], device=shape.device)
    eos = _attribute(text, "eos_token_id")
    if isinstance(eos, int) and 0 <= eos < size:
        ids[-1] = eos  # encoder-decoder classifiers look for the end of the sentence
    return [ids.expand(shape.rows, -1).clone()]


def _pretrained(shape: Shapes) -> list[tuple[int, ...]]:
    """[channels, height, width] that timm notes with its models."""
    sizes = []
    for owner in (shape.model, getattr(shape.model, "timm_model", None)):
        cfg = getattr(owner, "pretrained_cfg", None)
        sizes.append(cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None))
    return [tuple(size) for size in sizes if size]


def _image_sizes(shape: Shapes) -> list[tuple[int, int]]:
    known = [shape.read("image_size"), shape.read("img_size", "input_size", "sample_size"), *_pretrained(shape)]
    sizes = [(x, x) if isinstance(x, int) else (x["height"], x["width"]) if isinstance(x, Mapping) else tuple(x)[-2:]
             for x in known if x and not isinstance(x, (float, str))]  # fmt: skip
    # 64 pixels are enough to see the order; where the size is fixed (ViT) they fail, and its own size follows.
    small = [size for size in sizes if max(size) <= 64]
    return list(dict.fromkeys([*small, (64, 64), *sizes, (224, 224), (32, 32), (28, 28), (128, 128), (256, 256)]))


def _channels(shape: Shapes) -> list[int]:
    conv = shape.first(CONVOLUTIONS)
    # The convolution registered first need not be the one that sees the image.
    known = [shape.read("num_channels", "in_channels", "in_chans"), getattr(conv, "in_channels", None), 3, 1]
    return [c for c in dict.fromkeys(known) if isinstance(c, int)]


def _images(shape: Shapes) -> list[Tensor]:
    frames = _frames(shape)
    still = [shape.zeros(c, *size) for c in _channels(shape) for size in _image_sizes(shape)]
    moving = [shape.zeros(frames, c, *size) for c in _channels(shape)[:1] for size in _image_sizes(shape)]
    return [*moving, *still] if shape.read("num_frames", "frames_per_clip", "tubelet_size") else [*still, *moving[:3]]


def _frames(shape: Shapes) -> int:
    frames = shape.read("num_frames", "frames_per_clip", "tubelet_size", "temporal_patch_size", default=2)
    return int(frames[0] if isinstance(frames, (tuple, list)) else frames)


def _videos(shape: Shapes) -> list[Tensor]:
    return [shape.zeros(_frames(shape), c, *size) for c in _channels(shape) for size in _image_sizes(shape)]


def _patches(shape: Shapes) -> list[Tensor]:
    """Images cut into patches, with a row and a column in front (Pix2Struct) or without."""
    size = shape.read("patch_embed_hidden_size", "patch_size", default=16)
    size = size[0] if isinstance(size, (tuple, list)) else int(size)
    return [shape.zeros(16, 2 + 3 * size * size), shape.zeros(16, 3 * size * size), shape.zeros(16, size)]


def _mel(shape: Shapes) -> int:
    return shape.read("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim",
                      "feature_size", "num_mel_channels", "n_mels", default=80)  # fmt: skip


def _sound(shape: Shapes) -> list[Tensor]:
    """Samples of a wave, with a channel of their own or without; or the frames of a spectrogram."""
    spectrum = []
    if shape.read("num_mel_bins"):
        spectrum = [shape.zeros(shape.read("max_length", default=64), _mel(shape)), shape.zeros(64, _mel(shape))]
    wave = [shape.zeros(*lead, n) for n in (1600, 16000, 32000) for lead in ((), (1,), (2,))]
    return spectrum + wave


def _spectrogram(shape: Shapes) -> list[Tensor]:
    bins, positions = _mel(shape), shape.read("max_source_positions")
    lengths = dict.fromkeys([*([2 * positions] if isinstance(positions, int) else []), 64, 128, 1024, 3000])
    layouts = [(bins, n) for n in lengths] + [(n, bins) for n in lengths]
    # Where a convolution sees the bins as its channels they come first (Whisper).
    conv = shape.first(nn.Conv1d)
    if conv is None or conv.in_channels != bins:
        layouts.sort(key=lambda sizes: sizes[1] != bins)
    return [shape.zeros(*sizes) for sizes in layouts] + [shape.zeros(1, n, bins) for n in (1001, 256)]


def _history(shape: Shapes) -> int:
    lags = shape.read("lags_sequence")
    length = shape.read("context_length", "prediction_length", default=32)
    return int(length) + (max(lags) if isinstance(lags, (tuple, list)) and lags else 0)


def _past(shape: Shapes) -> list[Tensor]:
    length = _history(shape)
    channels = shape.read("num_input_channels", "input_size", "num_channels", default=1)
    wide, plain = shape.zeros(length, channels), shape.zeros(length)
    noise = torch.linspace(-1, 1, length, dtype=shape.dtype, device=shape.device)
    values = [plain + noise, wide + noise[:, None]]
    return values if channels == 1 else values[::-1]


def _times(length: Callable[[Shapes], int]) -> Callable[[Shapes], list[Tensor]]:
    return lambda shape: [shape.zeros(length(shape), shape.read("num_time_features", default=1))]


def _future(shape: Shapes) -> int:
    return int(shape.read("prediction_length", default=1))


def _hidden(shape: Shapes) -> list[Tensor]:
    sizes = [shape.read(name) for name in ("hidden_size", "d_model", "cross_attention_dim", "joint_attention_dim",
                                           "caption_channels", "embed_dim")]  # fmt: skip
    linear = shape.first(nn.Linear)
    sizes += [getattr(linear, "in_features", None)]
    return [shape.zeros(LENGTH, size) for size in dict.fromkeys(sizes) if isinstance(size, int)]


def _context(shape: Shapes) -> list[Tensor]:
    """What a diffusion model attends to beside the image."""
    sizes = [shape.read(name) for name in ("cross_attention_dim", "joint_attention_dim", "caption_channels",
                                           "encoder_hid_dim", "text_embed_dim", "hidden_size")]  # fmt: skip
    return [shape.zeros(LENGTH, size) for size in dict.fromkeys(sizes) if isinstance(size, int)]


def _noisy(shape: Shapes) -> list[Tensor]:
    """What a diffusion model cleans: an image, or a sequence of its patches."""
    images = [shape.zeros(c, *size) for c in _channels(shape)[:2] for size in _image_sizes(shape)[:4]]
    return images + [shape.zeros(16, c) for c in _channels(shape)[:1]] + _hidden(shape)


def _by_layer_type(shape: Shapes) -> Iterator[Tensor]:
    """For a model without names: what its first embedding, convolution or linear layer takes."""
    embedding, conv, linear = shape.first(nn.Embedding), shape.first(CONVOLUTIONS), shape.first(nn.Linear)
    if embedding is not None:
        yield from _tokens(shape)
    if conv is not None or _pretrained(shape):
        dims = 2 if conv is None else len(conv.kernel_size)
        for channels, size in itertools.product(_channels(shape), _image_sizes(shape)):
            yield shape.zeros(channels, *(size if dims == 2 else size[:1] * dims))
        if dims == 1:
            yield from _sound(shape)
    if linear is not None:
        yield shape.zeros(linear.in_features)
        yield shape.zeros(LENGTH, linear.in_features)
    recurrent = shape.first(nn.RNNBase)
    if recurrent is not None:
        yield shape.zeros(LENGTH, recurrent.input_size)


def _mask(shape: Shapes) -> list[Tensor]:
    return [shape.ones(LENGTH)]


# Argument of `forward` -> what it may be given.
MADE: dict[str, Callable[[Shapes], list[Tensor]]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "flattened_patches": _patches,
    "input_values": _sound,
    "audio_values": _sound,
    "input_features": _spectrogram,
    "audio_features": _spectrogram,
    "audio_mel": _spectrogram,
    "spectrogram": _spectrogram,
    "past_values": _past,
    "past_time_features": _times(_history),
    "past_observed_mask": lambda shape: [torch.ones_like(value) for value in _past(shape)],
    "future_values": lambda shape: [shape.zeros(_future(shape))],
    "future_time_features": _times(_future),
    "inputs_embeds": _hidden,
    "hidden_states": lambda shape: _noisy(shape) if shape.read("in_channels", "sample_size") else _hidden(shape),
    "sample": _noisy,
    "timestep": lambda shape: [shape.ones()],
    "encoder_hidden_states": _context,
    "class_labels": lambda shape: [shape.ones()],
    "pooled_projections": lambda shape: [shape.zeros(shape.read("pooled_projection_dim", default=8))],
    "attention_mask": _mask,
    "decoder_attention_mask": _mask,
    "token_type_ids": lambda shape: [0 * shape.ones(LENGTH)],
    "visual_feats": lambda shape: [shape.zeros(4, shape.read("visual_feat_dim", default=LENGTH))],
    "visual_embeds": lambda shape: [shape.zeros(4, shape.read("visual_embedding_dim", default=LENGTH))],
    "visual_pos": lambda shape: [shape.zeros(4, 4)],
    "bbox": lambda shape: [0 * shape.ones(LENGTH, 4)],
}
# Without them an encoder-decoder stops after its encoder.
DECODER = {"decoder_input_ids", "decoder_input_values", "future_values", "future_time_features"}
# Given only where the model did not run without: they say nothing new, or exclude another argument.
OPTIONAL = {"attention_mask", "decoder_attention_mask", "token_type_ids", "inputs_embeds", "timestep",
            "hidden_states", "encoder_hidden_states", "class_labels", "pooled_projections", "future_values",
            "future_time_features", "pixel_values_videos"}  # fmt: skip
