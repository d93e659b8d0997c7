"""Weights of few bits, activations unchanged: int8 and int4 through torchao, and layers binarized in training.

All three are saved in one format: packed codes with a scale for each row or group.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.packing import ceil8, pack, unpack
from .files import INSTALL, build_model, read_json, read_safetensors, save_config, some
from .manifest import apply_shapes, check_manifest, shape_manifest

ABOUT, WEIGHTS = "few_bits.json", "few_bits.safetensors"
FORMAT = 1
BITS = (1, 4, 8)
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def quantize_weights(model: nn.Module, bits: int = 8, group: int | None = None, layers: str = "*") -> list[str]:
    """Quantizes the weights of linear layers whose path matches `layers` to int8 or int4, in place.

    Symmetric, with one scale for each row, or for each `group` inputs (default 32 for int4).  In memory an int4 weight
    takes a byte; `save_few_bits` packs two into one.  Returns the layers' paths.
    Raises ValueError for other bits, a group that does not divide a layer's inputs, and a pattern without a match.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits={bits!r}: weight-only quantization has 8 and 4; binarize has 1.")
    group = 32 if group is None and bits == 4 else group
    chosen = [path for path, module in model.named_modules()
              if isinstance(module, nn.Linear) and fnmatch.fnmatchcase(path, layers)]  # fmt: skip
    if not chosen:
        raise ValueError(f"layers={layers!r} matches no linear layer of {type(model).__name__}.")
    odd = [path for path in chosen if group and model.get_submodule(path).in_features % group]
    if odd:
        raise ValueError(f"group={group} does not divide the {model.get_submodule(odd[0]).in_features} inputs of "
                         f"{odd[0]}; choose a divisor, or leave the layer out with layers=.")  # fmt: skip
    _torchao(model, bits, group, set(chosen))
    return chosen


def _torchao(model: nn.Module, bits: int, group: int | None, chosen: set[str]) -> None:
    try:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
    except ImportError:
        raise ValueError(f"Quantization needs torchao: {INSTALL}.") from None
    config = IntxWeightOnlyConfig(
        weight_dtype={4: torch.int4, 8: torch.int8}[bits], granularity=PerGroup(group) if group else PerAxis(0)
    )
    quantize_(model, config, filter_fn=lambda module, path: path in chosen)


class Binarize(nn.Module):
    """w -> sign(w) * mean|w| of its row; the gradient passes straight through where |w| <= 1.

    XNOR-Net's weights (Rastegari et al. 2016) with the clipped straight-through estimator (Hubara et al. 2016).
    """

    def forward(self, w: Tensor) -> Tensor:
        return _Signs.apply(w)


class _Signs(torch.autograd.Function):
    # Not w + (sign - w).detach(): rounding would leave more than two values.
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        scale = w.abs().flatten(1).mean(1).view(-1, *[1] * (w.dim() - 1))
        return torch.where(w < 0, -scale, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return gradient * (w.abs() <= 1)


def binarize(model: nn.Module, layers: str | Callable[[str, nn.Module], bool] = "*") -> list[str]:
    """Makes matching linear and convolutional layers use the signs of their weights, with a scale for each row.

    The real weights remain the trained parameters (by torch's parametrization) until `finish_binarize` replaces them.
    Leave the first and the last layer out: binarize(model, "layer*").  Returns the layers' paths.
    """
    match = layers if callable(layers) else lambda path, module: fnmatch.fnmatchcase(path, layers)
    chosen = [path for path, module in model.named_modules() if isinstance(module, LAYERS) and match(path, module)]
    if not chosen:
        raise ValueError(f"layers={layers!r} matches no linear or convolutional layer of {type(model).__name__}.")
    for path in chosen:
        parametrize.register_parametrization(model.get_submodule(path), "weight", Binarize())
    return chosen


def finish_binarize(model: nn.Module) -> list[str]:
    """Replaces the weights that `binarize` trained by their binary values; returns the layers' paths."""
    done = []
    for path, module in list(model.named_modules()):
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], Binarize):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            module.binary = True
            done.append(path)
    return done


# Files


def save_few_bits(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Writes packed codes, scales and all other tensors (safetensors) and a description (JSON); returns `folder`.

    Raises ValueError where no layer has weights of few bits.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, packed, shared = {}, {}, {}
    binary = {f"{path}.weight" for path, m in model.named_modules() if getattr(m, "binary", False)}
    seen: dict[Any, str] = {}
    for name, value in model.state_dict().items():
        if hasattr(value, "qdata"):
            bits = 4 if value.target_dtype == torch.int4 else 8
            codes = value.qdata.to(torch.int16) + 2 ** (bits - 1)
            tensors[f"{name}:codes"], tensors[f"{name}:scale"] = _pack(codes, bits), value.scale
            packed[name] = {"bits": bits, "group": value.block_size[1] if value.scale.shape[-1] > 1 else None}
        elif name in binary:
            tensors[f"{name}:codes"] = _pack(value >= 0, 1)
            tensors[f"{name}:scale"] = value.abs().flatten(1)[:, 0].contiguous()
            packed[name] = {"bits": 1}
        else:
            key = (value.data_ptr(), tuple(value.shape)) if value.numel() else name
            if key in seen:
                shared[name] = seen[key]
                continue
            seen[key] = name
            tensors[name] = value.contiguous()
    if not packed:
        raise ValueError("No weights of few bits: call quantize_weights, or binarize and finish_binarize, first.")
    save_file(tensors, str(folder / WEIGHTS))
    save_config(model, folder)
    about = {"format": FORMAT, "packed": packed, "shared": shared, "shapes": shape_manifest(model)}
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


def load_few_bits(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save_few_bits` has written, in eval mode; `model` and errors as in `load_pruned`."""
    folder = Path(folder)
    if not (folder / ABOUT).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {ABOUT} and {WEIGHTS}: it was not written by save_few_bits.")
    about, tensors = read_json(folder / ABOUT, FORMAT), read_safetensors(folder / WEIGHTS)
    packed, shapes, shared = _check(about, tensors, folder)
    model = build_model(folder) if model is None else model
    apply_shapes(model, about["shapes"])
    few = {(entry["bits"], entry.get("group")) for entry in packed.values() if entry["bits"] > 1}
    for bits, group in few:
        names = {n.rpartition(".")[0] for n, e in packed.items() if (e["bits"], e.get("group")) == (bits, group)}
        _torchao(model, bits, group, names)
    state = model.state_dict()
    with torch.no_grad():
        for name, shape in shapes.items():
            if name in shared:
                continue
            if name not in packed:
                state[name].copy_(tensors[name])
                continue
            bits, scale = packed[name]["bits"], tensors[f"{name}:scale"]
            codes = _unpack(tensors[f"{name}:codes"], bits, shape)
            if bits == 1:
                scale = scale.view(-1, *[1] * (len(shape) - 1))
                state[name].copy_(torch.where(codes.bool(), scale, -scale))
                model.get_submodule(name.rpartition(".")[0]).binary = True
            else:
                state[name].qdata.copy_((codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8))
                state[name].scale.copy_(scale)
    return model.eval()


def _check(about: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> tuple[dict, dict, dict]:
    """(packed, shapes, shared) of the JSON, if they fit the tensors; ValueError, which names the field, otherwise."""
    path = folder / ABOUT
    shapes = check_manifest(about.get("shapes"), path)["shapes"]
    packed, shared = about.get("packed"), about.get("shared")
    if not isinstance(packed, dict) or not isinstance(shared, dict):
        raise ValueError(f"{path}: packed or shared is no mapping; save the model again.")
    wanted = {n for n in shapes if n not in packed and n not in shared}
    wanted |= {f"{n}:{part}" for n in packed for part in ("codes", "scale")}
    if wanted != set(tensors):
        raise ValueError(f"{folder}: {ABOUT} does not fit {WEIGHTS} at {some(wanted ^ set(tensors))}.")
    for name, of in shared.items():
        if of not in shapes or shapes[of] != shapes.get(name):
            raise ValueError(f"{path}: shared[{name!r}]={of!r} is no tensor of the same shape.")
    for name, shape in shapes.items():
        if name in shared:
            continue
        if name not in packed:
            if list(tensors[name].shape) != shape:
                raise ValueError(f"{path}: shapes[{name!r}]={shape} and the tensor is {list(tensors[name].shape)}.")
            continue
        entry, codes, scale = packed[name], tensors[f"{name}:codes"], tensors[f"{name}:scale"]
        bits, group = (entry.get("bits"), entry.get("group")) if isinstance(entry, dict) else (None, None)
        if bits not in BITS or not (group is None or (type(group) is int and group > 0)) or len(shape) < 2:
            raise ValueError(f"{path}: packed[{name!r}]={entry!r} with shape {shape} is not understood.")
        nbytes, rows = ceil8(math.prod(shape)) * bits // 8, shape[0]
        scales = rows if bits == 1 or group is None else rows * (shape[1] // group)
        if codes.dtype != torch.uint8 or codes.numel() != nbytes or scale.numel() != scales:
            raise ValueError(f"{path}: {name!r} of shape {shape} and {bits} bits has {codes.numel()} bytes of codes "
                             f"and {scale.numel()} scales, where {nbytes} and {scales} are needed.")  # fmt: skip
    return packed, shapes, shared


def is_few_bits(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / ABOUT).is_file()


def _pack(codes: Tensor, bits: int) -> Tensor:
    flat = codes.flatten().to(torch.uint8)
    return pack(nn.functional.pad(flat, (0, ceil8(len(flat)) - len(flat))), bits)


def _unpack(data: Tensor, bits: int, shape: list[int]) -> Tensor:
    number = int(torch.Size(shape).numel())
    return unpack(data, bits, ceil8(number))[:number].view(shape)
