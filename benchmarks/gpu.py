"""What compression costs and gains on a GPU, in one command of less than 8 minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --parts training --codecs block:bits=4
    python benchmarks/gpu.py --device cpu --quick      # a miniature of every part, to see that it runs

codecs: encode, decode and roundtrip beside x.clone() in the same repeat, by CUDA events, in GB of input per second.
training: a BERT of MiniLM's shape, batch 32x128, bf16 autocast, AdamW; boundaries after the first layer and before the
last, blocks of steps in turn; launches of one step by torch.profiler.
memory: saved tensors compressed against checkpointing, offload and activation_memory_budget (compiled), on MiniLM,
ResNet-50 and a Llama of 0.5B: bytes held after the forward pass, the peak of a step, tokens or images per second.
All weights are random.  Each part has its own seconds (--seconds): what takes longer is cut, and named in "cut".
Prints each figure as it is found and writes benchmarks/results/gpu.json, with --quick outputs/gpu_quick.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import harness
import memory
import memory_methods
import torch

from hf_actcompress import ActCompressConfig, compress_model, parse_codec

BEGAN = time.perf_counter()
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
SIZES = ("64M", "1G", "16M", "256M")  # the one that matters most first: what comes last may be cut
CODECS = (
    "identity", "block:bits=4", "rotated:bits=2", "uniform:bits=8", "float8", "block:bits=8", "block:bits=2",
    "block:bits=4,round=stochastic", "sort:bits=8", "kmeans:bits=4", "topk:ratio=0.1", "trellis:bits=2",
)  # fmt: skip


class Cut(BaseException):
    """The seconds of a part are over.  No Exception: a compiler that is at work would wrap it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Cut in the main thread when the seconds are over."""

    def cut(*_: Any) -> None:
        raise Cut

    before = signal.signal(signal.SIGALRM, cut)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """The results so far, written after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = args.results
        self.data: dict[str, Any] = {**harness.about("gpu.py"), "cut": []}

    def __call__(self, part: str, key: str, values: Mapping[str, Any], text: str) -> None:
        self.data.setdefault(part, {})[key] = dict(values)
        self.note(f"{key:48s} {text}")

    def note(self, text: str) -> None:
        print(f"{time.perf_counter() - BEGAN:6.0f} s  {text}", flush=True)
        harness.write(self.path, self.data)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def milliseconds(calls: Mapping[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """Of every call, one of each in every repeat: by events, which the GPU reaches in its own time."""
    if device == "cpu":
        return {name: [1e3 * s for s in found] for name, found in harness.in_turn(calls, repeats, warmup=1).items()}
    marks = []
    for _ in range(repeats + 2):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            marks.append((name, begin, end))
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for name, begin, end in marks[2 * len(calls) :]:
        found[name].append(begin.elapsed_time(end))
    return found


# Codecs


def tensor(size: str, dtype: torch.dtype, device: str, features: int = 768) -> torch.Tensor:
    """[rows, features] of at most that many bytes; Gaussian, each feature with a size of its own."""
    rows = max(1, int(size[:-1]) * UNITS[size[-1]] // dtype.itemsize // features)
    x = torch.empty(rows, features, dtype=dtype, device=device).normal_()
    return x.mul_(torch.linspace(0.5, 4.0, features, dtype=dtype, device=device))


def codecs(args: argparse.Namespace, report: Report) -> None:
    for size in args.sizes:
        for dtype in ("float32", "bfloat16"):
            x = tensor(size, getattr(torch, dtype), args.device)
            for spec in args.codecs:
                with oom(report, f"{size} {dtype} {spec}"):
                    report("codecs", f"{size} {dtype} {spec}", *codec_speed(spec, x, args))
            del x


def codec_speed(spec: str, x: torch.Tensor, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    codec = parse_codec(spec)
    state, other = codec.init_state("encode"), codec.init_state("roundtrip")
    payload = codec.encode(x, state)
    calls = {"clone": x.clone, "encode": lambda: codec.encode(x, state), "decode": lambda: codec.decode(payload),
             "roundtrip": lambda: codec.roundtrip(x, other)}  # fmt: skip
    times = milliseconds(calls, args.repeats, args.device)
    row: dict[str, Any] = {"bytes": x.nbytes, "ratio": payload.ratio, "n": args.repeats}
    for name, found in times.items():
        shares = harness.ratios(times["clone"], found)  # of the clone's speed in the same repeat
        row[name] = {"ms": statistics.median(found), "gb_per_s": x.nbytes / statistics.median(found) / 1e6,
                     "of_clone": statistics.median(shares), "quartiles": harness.quartiles(shares)}  # fmt: skip
    return row, "  ".join(f"{name} {row[name]['gb_per_s']:.0f} GB/s ({row[name]['of_clone']:.2f})" for name in calls)


@contextlib.contextmanager
def oom(report: Report, what: str) -> Iterator[None]:
    """What this device or this model does not take is named, and the rest is measured."""
    try:
        yield
    except (torch.OutOfMemoryError, ValueError) as error:
        report.data["cut"].append(what)
        report.note(f"{what}: {type(error).__name__} {str(error)[:120]}")


# Models: random weights, a batch, and how many rows, tokens or images it has


@dataclass
class Workload:
    model: torch.nn.Module
    batch: dict[str, torch.Tensor]
    amount: int
    unit: str
    autocast: bool

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.model.train()
        self.called: Callable[..., Any] = self.model
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=on_gpu or None)

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.called(**self.batch).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def rate(self, steps: int) -> float:
        """Tokens or images per second."""
        synchronize(self.device.type)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronize(self.device.type)
        return steps * self.amount / (time.perf_counter() - began)


def bert(device: str, quick: bool, rows: int) -> Workload:
    from transformers import BertConfig, BertForSequenceClassification

    layers, hidden, heads, rows, length = (2, 64, 2, 4, 32) if quick else (6, 384, 12, rows, 128)
    config = BertConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=4 * hidden, vocab_size=1000 if quick else 30522)  # fmt: skip
    with torch.device(device):
        batch = memory_methods.tokens(config.vocab_size, rows, length)
        batch["labels"] = torch.randint(0, 2, (rows,))
        return Workload(BertForSequenceClassification(config), batch, rows * length, "tokens", autocast=True)


def resnet(device: str, quick: bool) -> Workload:
    rows, size = (2, 32) if quick else (128, 224)
    model, batch = memory_methods.image("test_resnet" if quick else "resnet50", size)
    made = {name: value.to(device) for name, value in batch(rows).items()}
    made["pixel_values"] = made["pixel_values"].contiguous(memory_format=torch.channels_last)
    model = model.to(device, memory_format=torch.channels_last)
    return Workload(model, made, rows, "images", autocast=not quick)


def llama(device: str, quick: bool) -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, heads, inner, rows, length = (2, 64, 2, 128, 2, 64) if quick else (24, 1280, 20, 3456, 8, 1024)
    config = LlamaConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                         intermediate_size=inner, vocab_size=1000 if quick else 32000, tie_word_embeddings=True,
                         use_cache=False, dtype=torch.bfloat16)  # fmt: skip
    with torch.device(device):
        batch = memory_methods.tokens(config.vocab_size, rows, length)
        batch["labels"] = batch["input_ids"]
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return Workload(model, batch, rows * length, "tokens", autocast=False)


# Training with boundaries


def training(args: argparse.Namespace, report: Report) -> None:
    work, name = bert(args.device, args.quick, 32), "minilm 32x128"
    rates: dict[str, list[float]] = {}
    launches: dict[str, int] = {}
    tried = ["none", *args.codecs]
    for _ in range(args.rounds):
        for codec in list(tried):
            with oom(report, f"{name} {codec}"):
                tried.remove(codec)  # comes back if it works
                config = ActCompressConfig(codec, first=1, last=1) if codec != "none" else None
                with compress_model(work.model, config) if config else nullcontext():
                    work.step()  # the first compiles, and a state is filled
                    if codec not in launches:
                        launches[codec] = launched(work)
                    rates.setdefault(codec, []).append(work.rate(args.steps))
                tried.append(codec)
        for codec in tried:
            shares = harness.ratios(rates[codec], rates["none"])
            rate, share = statistics.median(rates[codec]), statistics.median(shares)
            row = {"tokens_per_second": rate, "of_none": share, "of_none_range": [shares[0], shares[-1]],
                   "launches": launches[codec], "n": len(shares)}  # fmt: skip
            text = f"{rate:10,.0f} tokens/s, {share:.3f} of none ({len(shares)} rounds), {launches[codec]} launches"
            report("training", f"{name} {codec}", row, text)


def launched(work: Workload) -> int:
    """Kernels and copies of a step; on a CPU operations."""
    cuda = work.device.type == "cuda"
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        work.step()
        synchronize(work.device.type)
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return sum(event.device_type == wanted for event in profile.events())


# Memory


@contextlib.contextmanager
def compiled(work: Workload, budget: float = 1.0) -> Iterator[None]:
    # On a CPU what inductor would generate takes a minute of C++ compiler.
    backend = "inductor" if work.device.type == "cuda" else "aot_eager_decomp_partition"
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        work.called = torch.compile(work.model, backend=backend)
        try:
            yield
        finally:
            work.called = work.model


def on_cpu(work: Workload) -> AbstractContextManager:
    return torch.autograd.graph.save_on_cpu(pin_memory=work.device.type == "cuda")


def saved(bits: int) -> Callable[[Workload], AbstractContextManager]:
    return lambda work: compress_model(work.model, ActCompressConfig(saved=f"block:bits={bits}"))


MODELS: dict[str, Callable[[str, bool], Workload]] = {
    "minilm 256x128": functools.partial(bert, rows=256), "llama 0.5B 8x1024": llama, "resnet50 128x224px": resnet,
}
EAGER: dict[str, Callable[[Workload], AbstractContextManager]] = {
    "none": lambda work: nullcontext(), "saved 4": saved(4), "saved 2": saved(2), "saved 8": saved(8),
    "checkpointing": lambda work: memory_methods.checkpointing(work.model),
    "save_on_cpu": on_cpu,
}  # fmt: skip
COMPILED: dict[str, Callable[[Workload], AbstractContextManager]] = {
    "compiled, budget 0.2": functools.partial(compiled, budget=0.2),
    "compiled": compiled,
}
METHODS = {**EAGER, **COMPILED}


def measure_memory(args: argparse.Namespace, report: Report) -> None:
    """What need not be compiled comes first, for all models."""
    for group in (EAGER, COMPILED):
        for name, make in MODELS.items():
            methods = [method for method in group if method in args.methods]
            if methods:
                torch.manual_seed(0)
                work = make(args.device, args.quick)
                measure_methods(name, work, methods, args, report)
                del work
                gc.collect()
                if args.device != "cpu":
                    torch.cuda.empty_cache()


def measure_methods(name: str, work: Workload, methods: list[str], args: argparse.Namespace, report: Report) -> None:
    found: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[float]] = {}
    steps = max(1, args.steps // 3)
    work.step()  # the optimizer's state is there in every peak
    for method in methods:
        with oom(report, f"{name} {method}"), METHODS[method](work):
            found[method] = bytes_of(work)
            if method in COMPILED:  # no turns: entering it again would compile again
                rates[method] = [work.rate(steps) for _ in range(args.rounds)]
        work.optimizer.zero_grad()
    for _ in range(args.rounds):
        for method in (name for name in found if name in EAGER):
            with METHODS[method](work):
                work.step()
                rates.setdefault(method, []).append(work.rate(steps))
    for method, row in found.items():
        row |= {f"{work.unit}_per_second": statistics.median(rates[method]), "n": len(rates[method])}
        text = f"held {row['held'] / 1e6:,.0f} MB, peak {row['peak'] / 1e6:,.0f} MB"
        report("memory", f"{name} {method}", row, f"{text}, {statistics.median(rates[method]):,.0f} {work.unit}/s")


def bytes_of(work: Workload) -> dict[str, int]:
    """held: after the forward pass less before.  peak: of a step, with weights and optimizer.  On a CPU: resident."""
    work.step()
    if work.device.type == "cpu":
        before = memory.status("VmRSS")
        loss = work.loss()
        held = memory.status("VmRSS") - before
        loss.backward()
        work.optimizer.zero_grad()
        return {"held": held, "peak": memory.status("VmHWM")}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = work.loss()
    held = torch.cuda.memory_allocated() - before
    loss.backward()
    work.optimizer.zero_grad()
    del loss
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work.step()
    torch.cuda.synchronize()
    return {"held": held, "peak": torch.cuda.max_memory_allocated()}


PARTS: dict[str, tuple[Callable[[argparse.Namespace, Report], None], float]] = {
    "training": (training, 100), "codecs": (codecs, 130), "memory": (measure_memory, 200),
}


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--codecs", nargs="+", help="default: a dozen, with --quick three")
    parser.add_argument("--sizes", nargs="+", help="like 64M")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seconds", type=float, nargs="+", help="of each part (training 100, codecs 130, memory 200)")
    parser.add_argument("--results", type=harness.Path, help="default: see above")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here; --device cpu --quick shows what this would measure.")
    if args.device == "cpu":
        torch.set_num_threads(1)  # for tensors of such sizes
    args.sizes = args.sizes or (("64K",) if args.quick else SIZES)
    args.codecs = args.codecs or CODECS[: 3 if args.quick else None]
    args.repeats, args.rounds, args.steps = (2, 1, 1) if args.quick else (20, 5, 10)
    own = harness.ROOT / "outputs" / "gpu_quick.json" if args.quick else harness.RESULTS / "gpu.json"
    args.results = args.results or own
    report = Report(args)
    for k, part in enumerate(args.parts):
        measure, seconds = PARTS[part]
        seconds = args.seconds[min(k, len(args.seconds) - 1)] if args.seconds else seconds
        report.note(f"{part}, at most {seconds:.0f} s")
        try:
            with within(seconds):
                measure(args, report)
        except Cut:
            report.data["cut"].append(part)
            report.note(f"{part}: cut after {seconds:.0f} s")
        gc.collect()
    report.data["seconds"] = time.perf_counter() - BEGAN
    report.note(f"done{', cut: ' + ', '.join(report.data['cut']) if report.data['cut'] else ''}")


if __name__ == "__main__":
    main()
