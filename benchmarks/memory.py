"""Memory and time of a training step: what autograd saves kept compressed, against the ways that people use today.

    python benchmarks/memory.py                                        # all models: some hours on 2 cores
    python benchmarks/memory.py --autocast --parts time                # in bf16
    python benchmarks/memory.py --parts time held --malloc libtcmalloc_minimal.so.4
    python benchmarks/memory.py --parts held --malloc kept             # peaks by what malloc does
    python benchmarks/memory.py --models "minilm 32x128" --methods none "saved 4" --parts held

held: bytes that stay between forward and backward as the operating system sees them (RSS after malloc_trim, before and
after the forward pass); the peak of a whole step with AdamW, as tensors that live (torch's profiler) and as resident
memory (VmHWM, with libraries); each in its own process, in which malloc returns what is freed.
time: one step of every method in turn, each in its own process (which waits meanwhile), so that other load meets all
alike and malloc's heap is as that method alone leaves it.  Malloc keeps what is freed (`keep_freed_memory=True`), for
every method; beside them the plain step with glibc's default.  Multiples are of the plain step of the
same round, that with the same malloc and that with the default; of compiled methods also of the compiled step.
error: of the gradient, against plain eager mode.
batch: the largest batch whose step peaks at no more than the plain step of the listed batch; each size in its own
process.
Writes benchmarks/results/memory.json after every measurement; what is there is kept, --force measures again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import torch
from memory_methods import METHODS, MODELS, Batch
from tqdm import tqdm

from hf_actcompress import keep_freed_memory

UNTIMED = ("saved auto 0.07",)  # a measurement would fall into every timed step; between two it is like any other
DEFAULT = " [default]"  # with glibc's malloc as it is


def trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Run:
    def __init__(self, model: str, autocast: bool) -> None:
        torch.manual_seed(0)
        make, self.rows = MODELS[model]
        self.model, self.batch = make()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.autocast = autocast

    def forward(self, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(**batch).loss

    def step(self, batch: Batch) -> None:
        self.forward(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def live_peak(self) -> dict[str, Any]:
        """Most bytes that tensors held at a time during a step, when that was, and what was there all the time: the
        batch, parameters and the optimizer's state (parameters' gradients come and go)."""
        batch = self.batch(self.rows)
        kept = [*self.model.parameters(), *self.model.buffers(), *batch.values()]
        kept += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        phase = torch.profiler.record_function
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            with phase("in forward"):
                loss = self.forward(batch)
            with phase("in backward"):
                loss.backward()
            with phase("in optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
        events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        memory = [e for e in events if e.name() == "[memory]"]
        live = list(itertools.accumulate(e.nbytes() for e in memory))
        most = max(live)
        when = memory[live.index(most)].start_ns()
        began = {e.name(): e.start_ns() for e in events if e.name().startswith("in ")}
        always = sum(t.nbytes for t in kept)
        return {
            "live_peak_mb": (always + most) / 1e6,
            "always_mb": always / 1e6,
            "peak": [name for name, at in began.items() if at <= when][-1],
        }

    def peak(self, rows: int) -> int:
        """Peak RSS of a step."""
        batch = self.batch(rows)
        self.step(batch)
        trim()
        reset_peak()
        self.step(batch)
        return status("VmHWM")


def held(args: argparse.Namespace) -> dict[str, Any]:
    run = Run(args.models[0], args.autocast)
    found = []
    with METHODS[args.methods[0]](run.model) as handle:
        batch = run.batch(run.rows)
        run.step(batch)
        for _ in range(3):
            trim()
            before = status("VmRSS")
            loss = run.forward(batch)
            trim()
            found.append(status("VmRSS") - before)
            loss.backward()
            run.optimizer.zero_grad()
            del loss
        result = {"held_mb": statistics.median(found) / 1e6, "held_range_mb": [min(found) / 1e6, max(found) / 1e6]}
        if getattr(handle, "saved", None) is not None:
            record = handle.meters["saved"]
            result["metered"] = {"plain_mb": record.raw_bytes / record.calls / 1e6,
                                 "held_mb": record.payload_bytes / record.calls / 1e6}  # fmt: skip
        result.update(peak_mb=run.peak(run.rows) / 1e6, **run.live_peak())
    return {"n": len(found), **result}


def steps(args: argparse.Namespace) -> None:
    """A step of the method, and its seconds, for every line of stdin."""
    run = Run(args.models[0], args.autocast)
    with METHODS[args.methods[0]](run.model):
        batch = run.batch(run.rows)
        for _ in range(3):  # until malloc's heap is as it stays
            run.step(batch)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(harness.seconds(lambda: run.step(batch)), flush=True)


def times(args: argparse.Namespace) -> dict[str, Any]:
    """Each method in a process of its own, whose heap is as the method leaves it; one step at a time, in turn.

    As many at a time as memory holds (`--budget` bytes each); a plain step is in every group.
    """
    plain, *others = args.methods
    most = max(2, int(0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / args.budget))
    if args.malloc == "kept":
        others = [plain + DEFAULT, *sorted(others, key=lambda name: name not in ("saved 4", "checkpointing"))]
    pair, n = (plain, "compiled"), max(1, most - 2)
    eager, compiled = ([name for name in others if name.startswith("compiled") == c] for c in (False, True))
    groups = [[plain, *eager[k : k + most - 1]] for k in range(0, len(eager), most - 1)]
    groups += [[*pair, *compiled[k : k + n]] for k in range(1, len(compiled), n)]
    result: dict[str, Any] = {}
    for group in groups:
        seconds = turns(group, args)
        for name, own in seconds.items():
            if name in result:
                continue
            beside = [other for other in group if other != name]
            result[name] = {"ms": 1e3 * statistics.median(own), "n": len(own), "beside": beside}
            for key, reference in (("multiple", plain), ("of default", plain + DEFAULT), ("of compiled", "compiled")):
                if reference in seconds:
                    ratios = harness.ratios(own, seconds[reference])
                    result[name][key] = statistics.median(ratios)
                    result[name][f"{key}, quartiles"] = harness.quartiles(ratios)
    return result


def turns(names: list[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of steps, a random order in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {}
        for name in names:
            malloc = "default" if name.endswith(DEFAULT) else args.malloc
            command = [sys.executable, __file__, "--one", "step", "--models", args.models[0], "--malloc", malloc,
                       "--methods", name.removesuffix(DEFAULT), *["--autocast"] * args.autocast]  # fmt: skip
            worker = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(worker.kill)
            while (line := worker.stdout.readline()) != "ready\n":
                if not line:
                    raise RuntimeError(f"{command}: the process ended before its first timed step; see above.")
            workers[name] = worker
        order = random.Random(0)
        for _ in tqdm(range(args.repeats), desc=", ".join(names), disable=args.quiet):
            for name in order.sample(names, len(names)):
                workers[name].stdin.write("\n")
                workers[name].stdin.flush()
                seconds[name].append(float(workers[name].stdout.readline()))
    return seconds


def error(args: argparse.Namespace) -> dict[str, Any]:
    """|g' - g| / |g| over the gradients of all parameters, against eager mode without anything."""
    run = Run(args.models[0], args.autocast)
    batch = run.batch(run.rows)

    def gradient() -> torch.Tensor:
        run.optimizer.zero_grad()
        run.forward(batch).backward()
        return torch.cat([p.grad.double().flatten() for p in run.model.parameters() if p.grad is not None])

    exact = gradient()
    with METHODS[args.methods[0]](run.model):
        return {"error": float((gradient() - exact).norm() / exact.norm())}


def peak(args: argparse.Namespace) -> dict[str, int]:
    run = Run(args.models[0], args.autocast)
    with METHODS[args.methods[0]](run.model):
        return {"peak": run.peak(args.rows)}


def largest(args: argparse.Namespace) -> dict[str, Any]:
    """The largest batch that peaks at no more than `--budget` bytes, to about 2 %: by straight lines through what was
    measured, at most four times as many rows at once.  Each size has its own process: those before it leave traces
    in the peak."""

    def measured(rows: int) -> int:
        return alone("peak", args, args.models[0], args.methods, rows=rows)["peak"]

    listed = MODELS[args.models[0]][1]
    peaks = {rows: measured(rows) for rows in (max(1, listed // 4), listed)}
    for _ in range(8):
        fits = max((rows for rows, peak in peaks.items() if peak <= args.budget), default=0)
        over = min((rows for rows, peak in peaks.items() if peak > args.budget), default=None)
        if over is not None and over - fits <= max(1, 0.02 * fits):
            break
        (a, at_a), (b, at_b) = sorted(peaks.items())[-2:]
        if over is not None:
            (a, at_a), (b, at_b) = (fits, peaks.get(fits, 0)), (over, peaks[over])
        # A little less than the line says: to know what fits is worth more than to know what does not.
        rows = int(a + (0.995 * args.budget - at_a) * (b - a) / max(1, at_b - at_a))
        rows = min(max(rows, fits + 1), 4 * max(peaks) if over is None else over - 1)
        peaks[rows] = measured(rows)
    fits = max((rows for rows, peak in peaks.items() if peak <= args.budget), default=0)
    return {"budget_mb": args.budget / 1e6, "rows": fits, "processes": len(peaks),
            "peaks_mb": {rows: peak / 1e6 for rows, peak in sorted(peaks.items())}}  # fmt: skip


PARTS = {"held": held, "error": error, "time": times, "batch": largest}
INNER = {**PARTS, "peak": peak}


def alone(
    part: str, args: argparse.Namespace, model: str, methods: list[str], budget: int = 0, rows: int = 0
) -> dict[str, Any]:
    """One measurement in a process of its own."""
    malloc = args.malloc or ("kept" if part == "time" else "returned")
    options = ["--one", part, "--models", model, "--methods", *methods, "--quiet", "--repeats", args.repeats,
               "--budget", budget, "--rows", rows, "--malloc", malloc, *["--autocast"] * args.autocast]  # fmt: skip
    env = {"TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD": str(1 << 40)}
    if malloc == "returned":  # what is measured should be what is needed, not what malloc keeps for later
        env["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    elif malloc not in ("kept", "default"):
        env["LD_PRELOAD"] = malloc
    return harness.fresh_process(__file__, *options, **env)


def main() -> None:
    parser = harness.arguments(__doc__, force=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each method")
    parser.add_argument("--autocast", action="store_true", help="in bf16 autocast")
    parser.add_argument("--malloc", metavar="HOW", help="kept: by keep_freed_memory(); default: glibc's as it is; or "
                        "a library to preload, for example libtcmalloc_minimal.so.4. Without: see above")  # fmt: skip
    parser.add_argument("--one", choices=[*INNER, "step"], help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        if args.malloc == "kept" and not keep_freed_memory():
            raise SystemExit("keep_freed_memory() does nothing here: malloc is not glibc's, or is set already.")
        if args.one == "step":
            steps(args)
        else:
            print(json.dumps(INNER[args.one](args)))
        return
    keep = harness.Kept("memory", "memory.py", args.force)
    data = keep.data
    suffix = " bf16" * args.autocast + f" [{args.malloc}]" * (args.malloc is not None)
    for model in tqdm(args.models, desc="models"):
        for name in args.methods:
            row = {}
            if "held" in args.parts:
                row = keep(f"held {model}{suffix} {name}", lambda m=model, n=name: alone("held", args, m, [n]))
                tqdm.write(f"{model:28s} {name:24s} held {row['held_mb']:7.1f} MB, peak {row['peak_mb']:7.1f} MB")
            if "error" in args.parts:
                row = keep(f"error {model}{suffix} {name}", lambda m=model, n=name: alone("error", args, m, [n]))
                tqdm.write(f"{model:28s} {name:24s} error {row['error']:.4f}")
            if "batch" in args.parts:
                budget = int(1e6 * data[f"held {model}{suffix} none"]["peak_mb"])
                row = keep(
                    f"batch {model}{suffix} {name}",
                    lambda m=model, n=name, b=budget: alone("batch", args, m, [n], b),
                )
                tqdm.write(f"{model:28s} {name:24s} {row['rows']} rows in {row['budget_mb']:.0f} MB")
        if "time" in args.parts:
            timed = [name for name in args.methods if name not in UNTIMED]
            each = int(1e6 * max(row["peak_mb"] for key, row in data.items() if key.startswith(f"held {model} ")))
            rows = keep(f"time {model}{suffix}", lambda m=model, t=timed, b=each: alone("time", args, m, t, b))
            for name, row in rows.items():
                tqdm.write(f"{model:28s} {name:24s} {row['ms']:8.0f} ms  {row['multiple']:.2f}")


if __name__ == "__main__":
    main()
