"""Memory and time of a training step on a GPU: saved tensors kept compressed, against what people use today.

    python benchmarks/gpu_memory.py                                  # some minutes on one GPU
    python benchmarks/gpu_memory.py --models "minilm 256x128" --fp32

held: bytes that the allocator has given out after the forward pass, less those before it.  peak: the most during a
step with AdamW, parameters and the optimizer's state included.  ms: CUDA events around a step, all methods in turn in
one process; a multiple is that of the plain step of the same round.  rows: the largest batch whose step peaks at no
more than the plain step of the listed batch.  In bf16 autocast, with --fp32 without.
Writes benchmarks/results/gpu_memory.json after every model; what is there is kept, --force measures again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import harness
import memory
import torch
from tqdm import tqdm

MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "minilm 256x128": (lambda: memory.minilm(128), 256),
    "gpt2 16x512": (lambda: memory.gpt2(512), 16),
    "vit_base 64x224px": (lambda: memory.image("vit_base_patch16_224", 224), 64),
    "resnet50 128x224px": (lambda: memory.image("resnet50", 224), 128),
    "mobilenetv2_100 128x224px": (lambda: memory.image("mobilenetv2_100", 224), 128),
}


class Run(memory.Run):
    """The same step on a GPU."""

    def __init__(self, make: Callable[[], Any], autocast: bool) -> None:
        torch.manual_seed(0)
        self.model, self.batch = make()
        self.model.cuda().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.autocast = autocast

    def rows_of(self, rows: int) -> memory.Batch:
        return {name: value.cuda() for name, value in self.batch(rows).items()}

    def forward(self, batch: memory.Batch) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            return self.model(**batch).loss

    def held(self, batch: memory.Batch) -> int:
        self.step(batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = self.forward(batch)
        after = torch.cuda.memory_allocated()
        loss.backward()
        self.optimizer.zero_grad()
        return after - before

    def peak_of(self, rows: int) -> int:
        batch = self.rows_of(rows)
        self.step(batch)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.step(batch)
        return torch.cuda.max_memory_allocated()

    def fits(self, rows: int, budget: int) -> bool:
        try:
            return self.peak_of(rows) <= budget
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def largest(self, start: int, budget: int) -> int:
        """By straight lines through two peaks, then downwards in steps of a thirty-second."""
        a, b = max(1, start // 4), start
        at_a, at_b = self.peak_of(a), self.peak_of(b)
        rows = int(b + (budget - at_b) / max(1.0, (at_b - at_a) / (b - a)))
        while rows > 1 and not self.fits(rows, budget):
            rows = min(rows - 1, rows * 31 // 32)
        return rows

    def time(self, batch: memory.Batch) -> float:
        """Milliseconds."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        self.step(batch)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def measure(name: str, methods: list[str], autocast: bool, repeats: int) -> dict[str, Any]:
    make, rows = MODELS[name]
    run = Run(make, autocast)
    batch = run.rows_of(rows)
    result: dict[str, Any] = {}
    times: dict[str, list[float]] = {}
    for method in list(methods):
        try:
            with memory.METHODS[method](run.model):
                row = {"held_mb": run.held(batch) / 1e6, "peak_mb": run.peak_of(rows) / 1e6}
        except ValueError as error:  # a budget below one bit for every value
            methods = [other for other in methods if other != method]
            tqdm.write(f"{name:28s} {method:24s} left out: {error}")
            continue
        result[method] = row
        tqdm.write(f"{name:28s} {method:24s} held {row['held_mb']:8.0f} MB, peak {row['peak_mb']:8.0f} MB")
    for repeat in range(-2, repeats):
        for method in methods:
            with memory.METHODS[method](run.model):
                run.step(batch)
                took = run.time(batch)
            if repeat >= 0 and method not in memory.UNTIMED:
                times.setdefault(method, []).append(took)
    for method, own in times.items():
        multiples = harness.ratios(own, times[methods[0]])
        result[method] |= {"ms": statistics.median(own), "multiple": statistics.median(multiples),
                           "quartiles": harness.quartiles(multiples), "n": len(own)}  # fmt: skip
        tqdm.write(f"{name:28s} {method:24s} {result[method]['ms']:8.1f} ms, {result[method]['multiple']:.2f}")
    budget = int(1e6 * result[methods[0]]["peak_mb"]) + 1
    for method in methods:
        with memory.METHODS[method](run.model):
            result[method]["rows"] = rows if method == methods[0] else run.largest(rows, budget)
        tqdm.write(f"{name:28s} {method:24s} {result[method]['rows']} rows in {budget / 1e6:.0f} MB")
    return result


def main() -> None:
    parser = harness.arguments(__doc__, force=True, results="gpu_memory")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--methods", nargs="+", default=list(memory.METHODS), choices=list(memory.METHODS),
                        metavar="METHOD")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each method")
    parser.add_argument("--fp32", action="store_true", help="without autocast")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here; on a CPU use benchmarks/memory.py.")
    keep = harness.Kept(args.results, "gpu_memory.py", args.force)
    for name in tqdm(args.models, desc="models"):
        key = f"{name} {'fp32' if args.fp32 else 'bf16'}"
        keep(key, lambda name=name: measure(name, args.methods, not args.fp32, args.repeats))


if __name__ == "__main__":
    main()
