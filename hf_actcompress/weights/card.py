"""The report card: size, error, speed, memory and energy of one or several models, side by side.

It measures modules that are loaded, on batches that are prepared; `report/card.py` makes tables of the result.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bitstream import gap_width

BATCHES = (1, 32)
RAPL = Path("/sys/class/powercap")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")


@dataclass
class Candidate:
    """One model of a card.

    name: in the table.
    model: its forward takes a batch as keyword arguments and returns logits.
    folder: of its files, if any.
    bits: counted bits of a compressed file; None: bits of the tensors, of sparse ones those of positions and values.
    """

    name: str
    model: nn.Module
    folder: Path | None = None
    bits: int | None = None
    results: dict[str, Any] = field(default_factory=dict)


def measure(
    candidates: Sequence[Candidate], example: Mapping[str, Tensor], evaluation: Iterable[Mapping[str, Any]],
    compute_metrics: Callable[[Any, Any], dict[str, float]] | None = None, *, batch_sizes: Sequence[int] = BATCHES,
    repeats: int = 20, watts: float = 15.0, tick: Callable[[str], None] = lambda what: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row of measurements for each candidate.

    example: a batch of one row or more; rows are repeated to the batch sizes that are timed.
    evaluation: batches with labels; read once for each candidate, so pass a list or a loader.
    compute_metrics: (logits [N, C], labels [N]) -> metrics, besides the top-1 and top-5 error.
    repeats: timed forward passes for each batch size.  The candidates alternate, so that other load on the machine
        affects all of them alike.
    watts: power of one busy core, for an estimate where no power counter can be read.
    tick: called with what is measured next.

    Raises ValueError without candidates or with an empty evaluation.
    """
    if not candidates:
        raise ValueError("A card needs at least one model.")
    if isinstance(evaluation, Iterator):
        evaluation = list(evaluation)
    for each in candidates:
        each.model.eval()
        tick(f"{each.name}: size and FLOPs")
        each.results = {"name": each.name, **size(each), "flops": flops(each.model, rows(example, 1))}
        if hasattr(each.model, "lower"):
            tick(f"{each.name}: int8 kernels")
            shapes = [rows(example, batch) for batch in batch_sizes]
            for inputs in (*shapes, *(batch for batch, _ in zip(evaluation, range(1), strict=False))):
                each.model.lower(inputs)
        tick(f"{each.name}: evaluation")
        each.results |= evaluate(each.model, evaluation, compute_metrics)
        tick(f"{each.name}: memory")
        each.results["peak_bytes"] = peak_memory(each.model, rows(example, 1))
    for batch in batch_sizes:
        inputs = rows(example, batch)
        tick(f"latency, {batch} at once")
        for each, timing in zip(candidates, latency([c.model for c in candidates], inputs, repeats), strict=True):
            each.results |= {f"{key}_{batch}": value for key, value in timing.items()}
    joules = [energy(each.model, rows(example, batch_sizes[-1]), batch_sizes[-1], watts) for each in candidates]
    first = candidates[0].results
    for each, (used, how) in zip(candidates, joules, strict=True):
        row = each.results
        row |= {"joules": used, "energy": how}
        row["compression"] = _ratio(first["file_bytes"] or first["bits"], row["file_bytes"] or row["bits"])
        row["speed_up"] = {str(b): _ratio(first[f"median_ms_{b}"], row[f"median_ms_{b}"]) for b in batch_sizes}
        row["notes"] = _notes(row, batch_sizes)
    return [each.results for each in candidates]


def rows(example: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The example's inputs, without labels, cut or repeated to `number` rows."""
    def fit(value: Tensor) -> Tensor:
        return value.repeat(-(-number // len(value)), *[1] * (value.dim() - 1))[:number].contiguous()

    return {name: fit(value) for name, value in example.items() if name not in ("labels", "label")}


# Size


def size(candidate: Candidate) -> dict[str, Any]:
    """Parameters, non-zeros, counted bits and bytes of files.  Those of an int8 graph are its weights and biases."""
    tensors = _distinct(candidate.model)
    weights = [t for t in tensors.values() if t.is_floating_point() or t.dtype in (torch.int8, torch.uint8)]
    nonzero = sum(int(torch.count_nonzero(getattr(t, "qdata", t))) for t in weights)
    found = None
    if candidate.folder is not None:
        files = {f for pattern in WEIGHT_FILES for f in Path(candidate.folder).glob(pattern)}
        found = sum(f.stat().st_size for f in files) or None
    return {
        "parameters": sum(t.numel() for t in weights), "nonzeros": nonzero,
        "bits": sum(map(tensor_bits, tensors.values())) if candidate.bits is None else candidate.bits,
        "file_bytes": found,
    }  # fmt: skip


def tensor_bits(x: Tensor) -> int:
    """Bits of a tensor, or, where that is less, of its non-zero values and their gap-coded positions."""
    if hasattr(x, "qdata"):  # torchao's weights of few bits
        return x.numel() * (4 if x.target_dtype == torch.int4 else 8) + 8 * x.scale.nbytes
    dense = 8 * x.numel() * x.element_size()
    kept = int(torch.count_nonzero(x))
    if kept > 0.97 * x.numel():  # positions would take more
        return dense
    width, fields = gap_width(x.detach().flatten().nonzero().flatten().cpu().numpy())
    return min(dense, 8 * kept * x.element_size() + width * fields)


def flops(model: nn.Module, inputs: Mapping[str, Tensor]) -> int | None:
    """Floating point (or int8) operations of one forward of one row; a multiplication and an addition are two."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops() or None


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the weights that a graph keeps as buffers; shared ones once, without counters and statistics."""
    found, seen = {}, set()
    exported = hasattr(model, "graph")
    named = [*model.named_parameters(), *(model.named_buffers() if exported else ())]
    for name, tensor in named:
        scalar = exported and tensor.dim() == 0
        if id(tensor) not in seen and not scalar:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


# Quality


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Mapping[str, Any]],
             compute_metrics: Callable[[Any, Any], dict[str, float]] | None = None) -> dict[str, Any]:  # fmt: skip
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    logits, labels = [], []
    for batch in batches:
        inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and k not in ("labels", "label")}
        logits.append(_logits(model(**inputs)).float().cpu())
        labels.append(batch["labels"])
    if not logits:
        raise ValueError("There is nothing to evaluate: the data has no batches.")
    logits, labels = torch.cat(logits), torch.cat(labels)
    result: dict[str, Any] = {"evaluated": len(labels)}
    if logits.shape[-1] > 1:
        order = logits.argsort(dim=-1, descending=True)
        result["top1_error"] = float((order[:, 0] != labels).float().mean())
        if logits.shape[-1] > 5:
            result["top5_error"] = float((order[:, :5] != labels[:, None]).all(-1).float().mean())
    if compute_metrics is not None:
        result["metrics"] = compute_metrics(logits.numpy(), labels.numpy())
    return result


def _logits(output: Any) -> Tensor:
    return output["logits"] if type(output) is dict else getattr(output, "logits", output)


# Cost


def peak_memory(model: nn.Module, inputs: Mapping[str, Tensor]) -> int | None:
    """Bytes of the weights plus the peak of one forward pass beyond them; None where it cannot be measured."""
    weights = sum(t.qdata.nbytes + t.scale.nbytes if hasattr(t, "qdata") else t.nbytes
                  for t in _distinct(model).values())  # fmt: skip
    device = next(iter(inputs.values())).device
    with torch.no_grad():
        model(**inputs)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            model(**inputs)
            return weights + torch.cuda.max_memory_allocated(device) - before
        if not _reset_peak():
            return None
        before = _status("VmRSS")
        model(**inputs)
        return weights + max(0, _status("VmHWM") - before)


def _reset_peak() -> bool:
    """Returns free memory to the system and resets the process's peak.  Linux only."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def latency(models: Sequence[nn.Module], inputs: Mapping[str, Tensor], repeats: int) -> list[dict[str, float]]:
    """Median and 95th percentile of milliseconds per row, rows a second, and CPU (and CUDA) milliseconds per row."""
    number = len(next(iter(inputs.values())))
    cuda = next(iter(inputs.values())).is_cuda
    walls, cpus, devices = ([[] for _ in models] for _ in range(3))
    with torch.no_grad():
        for repeat in range(-2, repeats):
            for i, model in enumerate(models):
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else None
                wall, cpu = time.perf_counter(), time.process_time()
                if events:
                    events[0].record()
                model(**inputs)
                if events:
                    events[1].record()
                    torch.cuda.synchronize()
                if repeat >= 0:
                    cpus[i].append(time.process_time() - cpu)
                    walls[i].append(time.perf_counter() - wall)
                    devices[i] += [events[0].elapsed_time(events[1])] if events else []
    results = []
    for wall, cpu, device in zip(walls, cpus, devices, strict=True):
        wall = [1e3 * t / number for t in wall]
        p95 = statistics.quantiles(wall, n=20)[-1] if len(wall) > 1 else wall[0]
        row = {"median_ms": statistics.median(wall), "p95_ms": p95, "per_second": 1e3 / statistics.median(wall),
               "cpu_ms": 1e3 * statistics.median(cpu) / number}  # fmt: skip
        results.append(row | ({"cuda_ms": statistics.median(device) / number} if device else {}))
    return results


def energy(model: nn.Module, inputs: Mapping[str, Tensor], number: int, watts: float) -> tuple[float, str]:
    """(joules per row, how): by the processor's counter where it can be read, else CPU time x watts."""
    calls = 3
    with torch.no_grad(), _rapl() as read:
        began, cpu = read() if read else 0.0, time.process_time()
        for _ in range(calls):
            model(**inputs)
        if read:
            return (read() - began) / (calls * number), "measured (RAPL, the whole processor)"
        return (time.process_time() - cpu) * watts / (calls * number), f"estimated: CPU time x {watts:g} W a core"


@contextlib.contextmanager
def _rapl() -> Iterator[Callable[[], float] | None]:
    """A function that returns joules; overflows of the counter (about every hour) are ignored."""
    counters = [path for path in RAPL.glob("intel-rapl:*/energy_uj") if path.parent.name.count(":") == 1]
    if not counters or not all(os.access(path, os.R_OK) for path in counters):
        yield None
        return
    yield lambda: sum(int(path.read_text()) for path in counters) / 1e6


def _ratio(first: float | None, own: float | None) -> float | None:
    return first / own if first and own else None


def _notes(row: Mapping[str, Any], batch_sizes: Sequence[int]) -> list[str]:
    zeros = 1 - row["nonzeros"] / max(1, row["parameters"])
    gains = [row["speed_up"][str(b)] for b in batch_sizes]
    if zeros > 0.02 and all(gain is not None and gain < 1.05 for gain in gains):
        return [f"{100 * zeros:.0f} % of the weights are zero, which brings no speed: dense kernels multiply zeros."]
    return []
