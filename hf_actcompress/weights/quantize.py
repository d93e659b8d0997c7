"""Static int8 on CPUs, after training (PTQ) or in training (QAT), through torchao's PT2E and its x86 quantizer.

The model is exported, so what comes back is a graph with the inputs of the calibration batch, no longer the class that
went in.  Weights alone: `weight_only.py`.
"""

from __future__ import annotations

import gzip
import inspect
import io
import json
import os
import platform
import warnings
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from .manifest import INSTALL, register_vision

GRAPH, ABOUT = "int8.pt2.gz", "int8.json"
FORMAT = 1


class ExportedClassifier(nn.Module):
    """A graph with the face of a transformers model: keyword inputs, perhaps labels, to loss and logits.

    `lower(inputs)` prepares fast int8 kernels for batches of exactly these shapes (some seconds, no compiler);
    batches of other shapes run the reference graph, which gives the same values slowly.  In a Trainer set
    remove_unused_columns=False: the inputs' names are not in the signature.
    """

    accepts_loss_kwargs = False  # the Trainer would take **inputs for a way to pass num_items_in_batch

    def __init__(self, graph: nn.Module, names: list[str], config: Any, quantized: bool) -> None:
        super().__init__()
        self.graph, self.names, self.quantized = graph, names, quantized
        self.config = config  # of the transformers model that went in, or None
        self._fast: dict[tuple[Any, ...], Any] = {}  # not modules: their weights are copies in another layout

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
    """An int8 version of `model`; ranges of activations come from `batches` (mappings of inputs, labels ignored).

    Weights: symmetric per channel; activations: per tensor.  The first batch, of two rows or more, shows the inputs
    by name and shape; the number of rows, and of tokens in a text, stays free.  `model` is not changed.
    reduce_range: activations in 7 bits.  On x86 CPUs without VNNI int8 kernels add two products in 16 bits, which
        overflow with 8: by default it is on where this CPU is one of them.  Say True for a model that is to run there.
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
    """`model` with int8 rounding simulated, to be trained by any loop or Trainer and then given to `convert`.

    Start from trained weights and train briefly with a small learning rate.  `example`, reduce_range: as in
    `quantize_static`.
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
    """The int8 model of what `prepare_qat` has made and training has changed."""
    if not isinstance(model, ExportedClassifier) or model.quantized:
        raise ValueError("convert takes the model that prepare_qat has returned, once.")
    pt2e = _pt2e()
    model.eval()
    with torch.no_grad():
        quantized = pt2e["convert_pt2e"](model.graph)
    return _finish(quantized, model.names, model.config)


# Files


def save_quantized(model: ExportedClassifier, folder: str | os.PathLike[str], example: Mapping[str, Any]) -> Path:
    """Writes the graph with its int8 weights (gzip) and a small JSON; returns `folder`.  `example`: as before."""
    if not isinstance(model, ExportedClassifier) or not model.quantized:
        raise ValueError("save_quantized takes what quantize_static or convert has returned.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = tuple(example[name] for name in model.names)
    for node in model.graph.graph.nodes:
        # Where each node came from in the source: several times the size of the graph.
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
            node.meta.pop(key, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model.graph, values, dynamic_shapes=_dynamic(values))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
    data = gzip.compress(buffer.getvalue(), 6, mtime=0)
    (folder / GRAPH).write_bytes(data)
    about = {"format": FORMAT, "inputs": model.names, "nbytes": len(data),
             "torch": torch.__version__}  # fmt: skip
    (folder / ABOUT).write_text(json.dumps(about))
    if hasattr(model.config, "save_pretrained"):
        model.config.save_pretrained(folder)
    return folder


def load_quantized(folder: str | os.PathLike[str]) -> ExportedClassifier:
    """What `save_quantized` has written, in eval mode.  Raises ValueError for a missing, cut or damaged file."""
    folder = Path(folder)
    if not is_quantized(folder):
        raise ValueError(f"{folder} holds no {ABOUT} and {GRAPH}: it was not written by save_quantized.")
    register_vision()
    _pt2e()  # registers the operators that the graph calls
    about = json.loads((folder / ABOUT).read_text())
    data = (folder / GRAPH).read_bytes()
    if len(data) != about.get("nbytes") or about.get("format") != FORMAT:
        raise ValueError(f"{folder / GRAPH} has {len(data)} bytes, {ABOUT} says {about.get('nbytes')} (format "
                         f"{about.get('format')}, known {FORMAT}): the file is cut off or from another version.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch.export.load(io.BytesIO(gzip.decompress(data))).module()
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error) as error:
        raise ValueError(f"{folder / GRAPH} is damaged ({str(error).splitlines()[0]}); save it again.") from None
    config = AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
    return _finish(graph, about["inputs"], config)


def is_quantized(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / ABOUT).is_file() and (Path(folder) / GRAPH).is_file()


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
    asks = getattr(torch.cpu, "_is_vnni_supported", None)  # torch has no public question for this
    return platform.machine().lower() not in ("x86_64", "amd64") or asks is None or asks()


class _Logits(nn.Module):
    """Positional inputs to logits, which is what a graph can be.  A plain network gets its inputs by position."""

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
    """Rows are free, and so are tokens: the second dimension of whole numbers."""
    auto = torch.export.Dim.AUTO
    return tuple({0: auto} if v.is_floating_point() or v.dim() < 2 else {0: auto, 1: auto} for v in values)


def _inputs(batch: Mapping[str, Any]) -> tuple[list[str], tuple[Tensor, ...]]:
    names = [name for name, value in batch.items() if isinstance(value, Tensor) and name not in ("labels", "label")]
    values = tuple(batch[name] for name in names)
    if not names or min(len(value) for value in values) < 2:
        raise ValueError(f"The batch has {({n: list(batch[n].shape) for n in names}) or 'no tensors'}: two rows or "
                         "more are needed, or the number of rows would be fixed to one.")  # fmt: skip
    return names, values


def _finish(graph: nn.Module, names: list[str], config: Any) -> ExportedClassifier:
    """Drops what the graph no longer reads (the fp32 weights, for one, stay as attributes after conversion)."""
    used = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    stale = [name for name in (*dict(graph.named_parameters()), *dict(graph.named_buffers())) if name not in used]
    for name in stale:
        path, _, leaf = name.rpartition(".")
        delattr(graph.get_submodule(path), leaf)
    from torchao.quantization import pt2e

    pt2e.allow_exported_model_train_eval(graph)
    graph.requires_grad_(False)  # biases are parameters still
    return ExportedClassifier(graph, names, config, quantized=True).eval()


def _shapes(values: Iterable[Tensor]) -> tuple[Any, ...]:
    return tuple(tuple(value.shape) for value in values)
