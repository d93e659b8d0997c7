"""Short trainings under many codecs, with analysis records of their first steps: the data of predictor_study.py.

    python benchmarks/predictor.py                      # everything that is not there yet: about 20 core-seconds a run
    python benchmarks/predictor.py --tasks cola --list
    python benchmarks/predictor.py --beginnings         # the first two steps of each run of accuracy.py, some seconds

Two text tasks (MiniLM on SST-2; on CoLA from a MiniLM that has learned CoLA without compression, for 60 steps teach
it nothing else) and two of images (EfficientNet-Lite0 with its weights on CIFAR-10, a random ResNet-10t on MNIST), 60
steps each; every codec at one of three ways to cut.  One JSON per run under benchmarks/results/predictor/<task>/,
resumable, several calls may share the work.  A run keeps the metric and loss at its end and the records of its first
tenth, averaged over that tenth by boundary and direction.  --beginnings gives the whole trainings of accuracy.py such
records, too: of their first two steps, in results/predictor_beginnings/.
"""

from __future__ import annotations

import fcntl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy
import harness

from hf_actcompress.observe import read_records

RESULTS = harness.RESULTS / "predictor"
STEPS, EARLY, EVERY = 60, 6, 5  # of each run; those whose records count; one in so many of them is recorded
TEXT = "--num_train_epochs 1 --per_device_train_batch_size 16 --max_train_samples 960 --max_eval_samples 600"
IMAGES = "--num_train_epochs 1 --per_device_train_batch_size 32 --max_train_samples 1920 --max_eval_samples 1000"
TASKS = {
    "cola": ("glue", "glue/cola", f"{TEXT} --learning_rate 5e-5 --max_length 32"),
    "sst2": ("glue", "glue/sst2", f"{TEXT} --learning_rate 1e-4 --max_length 32"),
    "cifar10": ("cifar", "cifar10", f"{IMAGES} --learning_rate 2e-3 --image_size 48"),
    "mnist": ("cifar", "mnist", f"{IMAGES} --learning_rate 2e-3 --image_size 32 --model resnet10t"),
}
STARTS = {"cola": f"{accuracy.TEXT} --max_length 32"}  # trained without compression before the first run
BEGINNING = ("--max_steps 2 --max_train_samples 256 --max_eval_samples 8 --do_eval False --logging_steps 1 "
             "--analysis True --analysis_every 1")  # fmt: skip
CUTS = {
    "cuts": "--first 1 --last 1 --placement cuts",
    "late": "--first 1 --last 2 --placement cuts",
    "every": "--first 3 --last 2 --placement every",
}
GRADIENT = "block:bits=8,round=stochastic"


@dataclass(frozen=True)
class Run:
    task: str
    codec: str
    grad_codec: str | None = None
    cuts: str = "late"
    seed: int = 0

    @property
    def path(self) -> Path:
        name = harness.file_name(self.codec, self.grad_codec or "same", self.cuts, f"seed{self.seed}")
        return RESULTS / self.task / name

    def __str__(self) -> str:
        return f"{self.task} {self.codec}"


def plan(tasks: list[str]) -> list[Run]:
    """Per task: none with three seeds, then codecs from harmless to ruinous; the tasks in turn."""
    ranks = {"cola": (96, 32), "sst2": (96, 32), "cifar10": (16, 4), "mnist": (16, 4)}
    both = [("uniform:bits=4", "late"), ("block:bits=4", "late"), ("sort:bits=4", "late"), ("topk:ratio=0.2", "late"),
            ("uniform:bits=3", "cuts"), ("kmeans:bits=3", "late"), ("block:bits=2", "late"),
            ("topk:ratio=0.05", "cuts"), ("uniform:bits=8", "every"), ("uniform:bits=6", "every"),
            ("uniform:bits=5", "late"), ("block:bits=3", "every"), ("sort:bits=3", "every"), ("kmeans:bits=2", "cuts"),
            ("float8:format=e5m2", "every"), ("topk:ratio=0.5", "every")]  # fmt: skip
    forward = [("rotated:bits=2", "late"), ("uniform:bits=4", "every"), ("block:bits=2", "cuts")]
    runs = []
    for task in tasks:
        own = [Run(task, "none", None, "late", seed) for seed in (0, 1, 2)]
        own += [Run(task, codec, None, cuts) for codec, cuts in both]
        own += [Run(task, codec, GRADIENT, cuts) for codec, cuts in forward]
        own += [Run(task, f"lowrank:rank={rank}", None, "late") for rank in ranks[task]]
        runs.append(own)
    return [run for group in zip(*runs, strict=True) for run in group]


def execute(run: Run, data: Path, extra: list[str]) -> dict[str, Any]:
    script, folder, options = TASKS[run.task]
    argv = [*options.split(), *CUTS[run.cuts].split(), "--dataset", str(data / folder), "--codec", run.codec,
            "--logging_steps", "5", *extra]  # fmt: skip
    if run.grad_codec is not None:
        argv += ["--grad_codec", run.grad_codec]
    if run.task in STARTS:
        argv += ["--model", str(start(run.task, data))]
    if run.codec != "none":
        argv += ["--analysis", "True", "--analysis_every", str(EVERY)]
    with tempfile.TemporaryDirectory() as out:
        record = accuracy.train(script, argv, run.seed, out)
        rows = read_records(out) if run.codec != "none" else []
    whole = [row for row in rows if row["site"] == "parameters" and row["layer"] is None]
    if run.task in STARTS:
        record["model"] = f"minilm, fine-tuned on {run.task}"
    record.update(cuts=run.cuts, early=early_rows([row for row in rows if row["step"] < EARLY]),
                  grad_cosine=[[row["step"], row["grad_cosine"]] for row in whole],
                  command=f"python benchmarks/predictor.py --tasks {run.task}")  # fmt: skip
    return record


@dataclass(frozen=True)
class Beginning:
    """The first steps of a run of accuracy.py; seeds differ too little to take them all."""

    run: accuracy.Run

    @property
    def task(self) -> str:
        return self.run.task

    @property
    def codec(self) -> str:
        return self.run.codec

    @property
    def path(self) -> Path:
        return RESULTS.with_name("predictor_beginnings") / self.task / self.run.path.name

    def __str__(self) -> str:
        return str(self.run)


def begin(beginning: Beginning, data: Path, extra: list[str]) -> dict[str, Any]:
    run, (script, folder, options) = beginning.run, accuracy.TASKS[beginning.task]
    argv = [*options.split(), *BEGINNING.split(), "--dataset", str(data / folder), "--codec", run.codec, *extra]
    if run.grad_codec is not None:
        argv += ["--grad_codec", run.grad_codec]
    with tempfile.TemporaryDirectory() as out:
        record = accuracy.train(script, argv, run.seed, out)
        rows = read_records(out)
    return {"task": run.task, "codec": record["codec"], "grad_codec": record["config"]["grad_codec"],
            "early": early_rows(rows), "model": record["model"], "commit": record["commit"], "steps": 2,
            "command": "python benchmarks/predictor.py --beginnings"}  # fmt: skip


def start(task: str, data: Path) -> Path:
    """The folder of a model that has learned the task; made by the first who needs it, while the others wait."""
    folder = harness.ROOT / "outputs" / "predictor" / task
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / "results.json").is_file():  # written last
            script, place, _ = TASKS[task]
            argv = [*STARTS[task].split(), "--dataset", str(data / place), "--codec", "none"]
            accuracy.train(script, argv, 0, str(folder))
    return folder


def early_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per site, layer and direction: the measures averaged over the sampled steps."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["site"], row["layer"], row["name"], row["direction"]), []).append(row)
    result = []
    for (site, layer, name, direction), group in groups.items():
        mean = {"site": site, "layer": layer, "name": name, "direction": direction, "samples": len(group)}
        for key, first in group[0].items():
            if key in mean or key in ("model", "step", "epoch", "codec", "call") or isinstance(first, str):
                continue
            values = [row[key] for row in group if row[key] is not None]
            mean[key] = sum(values) / len(values) if values else None
        result.append(mean)
    return result


def main() -> None:
    parser = harness.arguments(__doc__, data=True, force=True, plan=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="+", help="run these forward codecs only ('none' is one)")
    parser.add_argument("--beginnings", action="store_true", help="the first steps of the runs of accuracy.py instead")
    args, extra = parser.parse_known_args()
    if args.beginnings:
        long = accuracy.plan([task for task in accuracy.TASKS if task in args.tasks])
        runs: list[Any] = [Beginning(run) for run in long if run.codec != "none" and run.seed == 0]
    else:
        runs = plan(args.tasks)
    runs = [run for run in runs if args.only is None or run.codec in args.only]
    if args.list:
        return harness.list_runs(runs)
    harness.require_data(args.data)
    make = begin if args.beginnings else execute
    harness.run_all(runs, lambda run: make(run, args.data, extra), args.force)


if __name__ == "__main__":
    main()
