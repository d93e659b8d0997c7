"""Accuracy under compressed layer boundaries: the runs behind docs/results.md.

    python benchmarks/accuracy.py                       # everything that is not there yet
    python benchmarks/accuracy.py --tasks cola --only none block:bits=4
    python benchmarks/accuracy.py --list

One JSON per run under benchmarks/results/accuracy/<task>/.  A run whose file exists is skipped, so an interrupted
call goes on where it stopped; --force runs it again.  Several calls may work side by side: each run is claimed by a
lock that ends with its process.  Data: a folder with glue/cola, glue/sst2 and cifar10 in Parquet (--data, default
../shared/data).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
GRADIENT = "block:bits=8,round=stochastic"

TEXT = (
    "--num_train_epochs 2 --learning_rate 5e-5 --per_device_train_batch_size 32 --first 1 --last 2 --placement cuts"
)
TASKS = {
    "cola": ("glue", "glue/cola", TEXT),
    "sst2": ("glue", "glue/sst2", TEXT + " --max_train_samples 5000"),
    "cifar10": (
        "cifar",
        "cifar10",
        "--num_train_epochs 2 --learning_rate 1e-3 --per_device_train_batch_size 64 --first 1 --last 1 "
        "--placement cuts --max_train_samples 5000 --max_eval_samples 5000 --image_size 96",
    ),
}
ROTATED = "rotate=hadamard,levels=gauss,allocate=energy"
PATCHED = ROTATED + ",patch=dct"  # differs on images alone
TRELLIS = "rotate=hadamard,levels=trellis,allocate=energy,patch=dct,prototypes=3"


@dataclass(frozen=True)
class Run:
    task: str
    codec: str
    grad_codec: str | None
    seed: int

    @property
    def path(self) -> Path:
        name = self.codec if self.grad_codec is None else f"{self.codec}__{self.grad_codec}"
        return RESULTS / self.task / f"{re.sub('[^a-zA-Z0-9.=+_]+', '-', name)}__seed{self.seed}.json"


def plan(tasks: list[str]) -> list[Run]:
    """All runs, the most telling ones first."""
    seeds = (0, 1, 2)
    main = [("none", None), ("block:bits=4", GRADIENT), (f"block:bits=3,{ROTATED}", GRADIENT),
            (f"block:bits=2,{ROTATED}", GRADIENT), (f"block:bits=2,{TRELLIS}", GRADIENT)]  # fmt: skip
    runs = []
    for seed in seeds:
        runs += [Run("cifar10", f"block:bits={b},{PATCHED}", GRADIENT, seed) for b in (4, 3, 2) if "cifar10" in tasks]
        runs += [Run(task, codec, grad, seed) for task in tasks for codec, grad in main]
        runs += [Run("cola", f"block:bits=4,{ROTATED}", GRADIENT, seed)] if "cola" in tasks else []
        if seed == 0:
            runs += [Run(task, codec, None, 0) for codec in single("cola") for task in tasks if codec in single(task)]
            runs += [Run(task, codec, None, 0) for task in tasks for codec in single(task) if codec.startswith("low")]
    # Three seeds do not settle a difference of about one standard deviation.
    # SST-2 needs none: there all agree.
    extra = {"cola": (3, 4), "cifar10": (3, 4, 5)}
    runs += [Run(t, codec, grad, seed) for t in tasks for seed in extra.get(t, ()) for codec, grad in main[:2]]
    return list(dict.fromkeys(runs))


def single(task: str) -> list[str]:
    """Codecs that run once, in both directions alike."""
    ranks = (8, 16) if task == "cifar10" else (48, 96)
    return [
        "uniform:bits=8", "uniform:bits=4", "sort:bits=8", "sort:bits=4", "block:bits=8", "block:bits=2",
        "topk:ratio=0.5", "topk:ratio=0.2", "kmeans:bits=4", "uniform:bits=16", "uniform:bits=10", "sort:bits=16",
        "sort:bits=12", *(f"lowrank:rank={r}" for r in ranks),
    ]  # fmt: skip


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[bool]:
    """Whether the run is ours; False where another process is at it."""
    # Of the whole path: another checkout's results are not these.
    name = f"hf_actcompress-{hashlib.sha256(str(run.path).encode()).hexdigest()[:24]}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def recipe(name: str) -> Any:
    """The example script as a module."""
    path = ROOT / "examples" / name / f"run_{name}.py"
    spec = importlib.util.spec_from_file_location(f"run_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass fields look their types up there
    spec.loader.exec_module(module)
    return module


def execute(run: Run, data: Path, extra: list[str]) -> dict[str, Any]:
    script, folder, options = TASKS[run.task]
    argv = [*options.split(), "--dataset", str(data / folder), "--codec", run.codec, "--logging_steps", "20", *extra]
    if run.grad_codec is not None:
        argv += ["--grad_codec", run.grad_codec]
    record = train(script, argv, run.seed)
    record["command"] = f"python benchmarks/accuracy.py --tasks {run.task} --only '{run.codec}'"
    return record


def train(script: str, argv: list[str], seed: int, output: str | None = None) -> dict[str, Any]:
    """The record of one run of a recipe, evaluated with and without compression at its end."""
    began = time.time()
    with tempfile.TemporaryDirectory() as out:
        record = recipe(script).main(
            ["--output_dir", output or out, "--seed", str(seed), "--codec_seed", str(seed), "--eval_strategy", "no",
             "--evaluate", "both", "--disable_tqdm", "True", *argv]
        )  # fmt: skip
    record["data"] = re.sub(r"(/[^ ]*)/(?=shared|data)", "", str(record["data"]))
    record["seconds"] = round(time.time() - began, 1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    record["commit"] = commit.stdout.strip() or None  # which code a figure stands for
    record["history"] = [
        {k: h[k] for k in ("step", "loss", "grad_norm") if k in h} for h in record["history"] if "loss" in h
    ]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="+", help="run these forward codecs only ('none' is one)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--force", action="store_true", help="run again what has a result")
    parser.add_argument("--list", action="store_true", help="show the plan and what is done")
    args, extra = parser.parse_known_args()
    runs = [
        run for run in plan(args.tasks)
        if (args.only is None or run.codec in args.only) and (args.seeds is None or run.seed in args.seeds)
    ]  # fmt: skip
    if args.list:
        for run in runs:
            print("done" if run.path.exists() else "open", run.path.relative_to(RESULTS))
        return
    if not args.data.is_dir():
        raise SystemExit(f"There is no data folder at {args.data}; give one with --data.")
    progress = tqdm(runs, desc="runs")
    for run in progress:
        with claimed(run) as ours:
            if not ours or (run.path.exists() and not args.force):
                continue
            progress.set_postfix_str(f"{run.task} {run.codec} seed {run.seed}")
            record = execute(run, args.data, extra)
            save(run, record)
            print(json.dumps(record["metrics"]))


def save(run: Run, record: dict[str, Any]) -> None:
    """Written beside its place and renamed: a killed run leaves no half file."""
    from hf_actcompress.workloads.results import FILE_NAME, write_results

    run.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run.path.parent) as folder:
        write_results(folder, record)
        (Path(folder) / FILE_NAME).replace(run.path)


if __name__ == "__main__":
    main()
