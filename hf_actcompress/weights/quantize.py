"""Static int8 on CPUs, after training (PTQ) or in training (QAT), through torchao's PT2E and its x86 quantizer.

The model is exported: the result is a graph with the inputs of the calibration batch, no longer the model's class.
Quantization of weights alone: `weight_only.py`.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import types
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .files import INSTALL, read_config, read_json, read_safetensors
from .graph import graph_from_json, graph_to_json

WEIGHTS, ABOUT = "int8.safetensors", "int8.json"
OLD_GRAPH = "int8.pt2.gz"  # of version 0.1
FORMAT = 2


class ExportedClassifier(nn.Module):
    """A graph that is called like a transformers model: inputs and optional labels as keywords, loss and logits out.

    `lower(inputs)` prepares fast int8 kernels for batches of exactly these shapes (some seconds, no compiler); batches
    of other shapes run the reference graph, which is slow and gives the same values.  In a Trainer set
    remove_unused_columns=False, since the inputs' names are not in the signature.
    """

    accepts_loss_kwargs = False  # the Trainer would take **inputs for a way to pass num_items_in_batch

    def __init__(self, graph: nn.Module, names: list[str], config: Any, quantized: bool) -> None:
        super().__init__()
        self.graph, self.names, self.quantized = graph, names, quantized
        self.config = config  # of the transformers model that went in, or None
        self._fast: dict[tuple[Any, ...], Any] = {}  # no submodules: their weights are copies in another layout

    def forward(self, labels: Tensor | None = None, return_dict: bool | None = None, **inputs: Any) -> Any:
        missing = [name for name in self.names if name not in inputs]
        if missing:
            raise ValueError(f"The exported model takes {', '.join(self.names)}; {', '.join(missing)} is missing.")
        values = [inputs[name] for name in self.names]
        logits = self._fast.get(_shapes(values), self.graph)(*values)
        loss = None
        if labels is not None:
            regression = logits.shape[-1] == 1
            loss = (nn.functional.mse_loss(logits.float().squeeze(-1), labels.float()) if regression
                    else nn.functional.cross_entropy(logits.float(), labels))  # fmt: skip
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def lower(self, inputs: Mapping[str, Tensor]) -> ExportedClassifier:
        """Prepare int8 kernels for batches of these shapes; ValueError before `convert`."""
        if not self.quantized:
            raise ValueError("This model is still in training; convert(model) makes it int8 first.")
        from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

        values = tuple(inputs[name] for name in self.names)
        if _shapes(values) not in self._fast:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._fast[_shapes(values)] = lower_pt2e_quantized_to_x86(self.graph, values)
        return self


def quantize_static(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, reduce_range: bool | None = None
) -> ExportedClassifier:
    """An int8 version of `model`, which is not changed.

    Weights are quantized symmetrically per channel, activations per tensor.

    batches: mappings of inputs (labels are ignored), from which the ranges of activations are taken.  The first, of
        two rows or more, determines the inputs' names and shapes; the number of rows, and of tokens, stays free.
    reduce_range: activations in 7 bits.  On x86 CPUs without VNNI int8 kernels add two products in 16 bits, which
        overflows with 8 bits.  Default: on where this CPU is one of them; pass True for a model that will run there.
    Raises ValueError for no batches, a first batch of one row, and a model that cannot be exported.
    """
    pt2e = _pt2e()
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("batches is empty: static quantization needs a few batches to take ranges from.")
    names, values = _inputs(first)
    was = model.training
    model.eval()
    try:
        graph = _export(model, names, values)
    finally:
        model.train(was)
    prepared = pt2e["prepare_pt2e"](graph, _quantizer(pt2e, False, reduce_range))
    with torch.no_grad():
        prepared(*values)
        for batch in batches:
            prepared(*(batch[name] for name in names))
        quantized = pt2e["convert_pt2e"](prepared)
    return _finish(quantized, names, getattr(model, "config", None))


def prepare_qat(
    model: nn.Module, example: Mapping[str, Any], *, reduce_range: bool | None = None
) -> ExportedClassifier:
    """`model` with simulated int8 rounding, to be trained by any loop or Trainer and then passed to `convert`.

    Start from trained weights and train briefly with a small learning rate.

    example: a batch of two rows or more; reduce_range: as in `quantize_static`.
    """
    pt2e = _pt2e()
    names, values = _inputs(example)
    was = model.training
    model.train()
    try:
        graph = _export(model, names, values)
    finally:
        model.train(was)
    prepared = pt2e["prepare_qat_pt2e"](graph, _quantizer(pt2e, True, reduce_range))
    pt2e["allow"](prepared)
    return ExportedClassifier(prepared, names, getattr(model, "config", None), quantized=False)


def convert(model: ExportedClassifier) -> ExportedClassifier:
    """The int8 model from the trained result of `prepare_qat`."""
    if not isinstance(model, ExportedClassifier) or model.quantized:
        raise ValueError("convert takes the model that prepare_qat has returned, once.")
    pt2e = _pt2e()
    model.eval()
    with torch.no_grad():
        quantized = pt2e["convert_pt2e"](model.graph)
    return _finish(quantized, model.names, model.config)


# Files


def save_quantized(model: ExportedClassifier, folder: str | os.PathLike[str]) -> Path:
    """Writes the int8 weights (safetensors) and the graph (JSON) of a model; returns `folder`.

    Raises ValueError for a model that is not quantized, or whose graph calls something else than torch's operators.
    """
    if not isinstance(model, ExportedClassifier) or not model.quantized:
        raise ValueError("save_quantized takes what quantize_static or convert has returned.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    nodes = graph_to_json(model.graph.graph)
    about = {"format": FORMAT, "inputs": model.names, "nodes": nodes,
             "parameters": [name for name, _ in model.graph.named_parameters()]}  # fmt: skip
    # Shared tensors under each of their names: safetensors stores each on its own.
    tensors = {node["target"]: _attribute(model.graph, node["target"]) for node in nodes if node["op"] == "get_attr"}
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, str(folder / WEIGHTS))
    (folder / ABOUT).write_text(json.dumps(about))
    if hasattr(model.config, "save_pretrained"):
        model.config.save_pretrained(folder)
    return folder


def load_quantized(folder: str | os.PathLike[str]) -> ExportedClassifier:
    """What `save_quantized` has written, in eval mode.  Raises ValueError for a missing, cut or damaged file."""
    folder = Path(folder)
    if (folder / OLD_GRAPH).is_file() and not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder / OLD_GRAPH} was written by version 0.1 as a torch.export archive, which can run "
                         "code when it is read: quantize the model again with this version.")  # fmt: skip
    if not (is_quantized(folder) and (folder / WEIGHTS).is_file()):
        raise ValueError(f"{folder} holds no {ABOUT} and {WEIGHTS}: it was not written by save_quantized.")
    _pt2e()  # registers the operators that the graph calls
    about, tensors = read_json(folder / ABOUT, FORMAT), read_safetensors(folder / WEIGHTS)
    try:
        names, parameters = about["inputs"], set(about["parameters"])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"inputs={names!r} are no names")
        values = {name: nn.Parameter(value, requires_grad=False) if name in parameters else value
                  for name, value in tensors.items()}  # fmt: skip
        graph = graph_from_json(about["nodes"], values)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder / ABOUT} is damaged ({error}); save the model again.") from None
    config = read_config(folder) if (folder / "config.json").is_file() else None
    return _finish(graph, names, config)


def is_quantized(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / ABOUT).is_file()


def _attribute(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


# PT2E


def _pt2e() -> dict[str, Any]:
    try:
        from torchao.quantization import pt2e
        from torchao.quantization.pt2e import quantize_pt2e as steps
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError:
        raise ValueError(f"Quantization needs torchao: {INSTALL}.") from None
    return {"prepare_pt2e": steps.prepare_pt2e, "prepare_qat_pt2e": steps.prepare_qat_pt2e,
            "convert_pt2e": steps.convert_pt2e, "allow": pt2e.allow_exported_model_train_eval, "x86": x86}  # fmt: skip


def _quantizer(pt2e: dict[str, Any], qat: bool, reduce_range: bool | None) -> Any:
    quantizer = pt2e["x86"].X86InductorQuantizer()
    if reduce_range is None:
        reduce_range = not _adds_in_32_bits()
    config = pt2e["x86"].get_default_x86_inductor_quantization_config(is_qat=qat, reduce_range=reduce_range)
    return quantizer.set_global(config)


def _adds_in_32_bits() -> bool:
    """Whether int8 kernels of this CPU add their products in 32 bits (VNNI, or no x86 at all)."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)  # torch has no public function for this
    return platform.machine().lower() not in ("x86_64", "amd64") or supported is None or supported()


class _Logits(nn.Module):
    """Positional inputs to logits, as a graph needs them.  Models that do not know the names get them by position."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        known = inspect.signature(model.forward).parameters
        self.by_name = all(name in known for name in names)

    def forward(self, *values: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, values, strict=True))) if self.by_name else self.model(*values)
        return output["logits"] if type(output) is dict else getattr(output, "logits", output)


def _export(model: nn.Module, names: list[str], values: tuple[Tensor, ...]) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Without strict, parameters come under two names and the file doubles.
            program = torch.export.export(
                _Logits(model, names), values, dynamic_shapes=(_dynamic(values),), strict=True
            )
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        raise ValueError(f"{type(model).__name__} could not be exported for quantization: "
                         f"{str(error).strip().splitlines()[0]}") from error  # fmt: skip
    return program.module()


def _dynamic(values: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """The number of rows is free, and that of tokens: the second dimension of integer inputs."""
    auto = torch.export.Dim.AUTO
    return tuple({0: auto} if v.is_floating_point() or v.dim() < 2 else {0: auto, 1: auto} for v in values)


def _inputs(batch: Mapping[str, Any]) -> tuple[list[str], tuple[Tensor, ...]]:
    names = [name for name, value in batch.items() if isinstance(value, Tensor) and name not in ("labels", "label")]
    values = tuple(batch[name] for name in names)
    if not names or min(len(value) for value in values) < 2:
        raise ValueError(f"The batch has {({n: list(batch[n].shape) for n in names}) or 'no tensors'}: give two rows "
                         "or more, or export would fix the number of rows to one.")  # fmt: skip
    return names, values


def _finish(graph: nn.Module, names: list[str], config: Any) -> ExportedClassifier:
    """Drops attributes that the graph does not read: after conversion the fp32 weights are among them."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    stale = [name for name in (*dict(graph.named_parameters()), *dict(graph.named_buffers())) if name not in used]
    for name in stale:
        path, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(path), leaf)
    # Nothing of it trains: it has one mode, where torchao would look for what to change, which takes a second.
    graph.train = types.MethodType(lambda self, mode=True: self, graph)
    graph.eval = types.MethodType(lambda self: self, graph)
    graph.requires_grad_(False)  # biases are parameters still
    return ExportedClassifier(graph, names, config, quantized=True).eval()


def _shapes(values: Iterable[Tensor]) -> tuple[Any, ...]:
    return tuple(tuple(value.shape) for value in values)
