"""Accuracy under compressed layer boundaries: the runs behind docs/results.md.

    python benchmarks/accuracy.py                       # everything that is not there yet
    python benchmarks/accuracy.py --tasks cola --only none block:bits=4
    python benchmarks/accuracy.py --list

One JSON per run under benchmarks/results/accuracy/<task>/.  A run whose file exists is skipped, so an interrupted
call goes on where it stopped; --force runs it again.  Several calls may work side by side: each run is claimed by a
lock that ends with its process.  Data: a folder with glue/cola, glue/sst2 and cifar10 in Parquet (--data, default
../shared/data).  Options that are not known here go to the recipe.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

RESULTS = harness.RESULTS / "accuracy"
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
}  # task: (recipe, folder of the data, options)
# How version 0.1 spelled them: its records keep these names.
OLD = {"rotated": "rotate=hadamard,levels=gauss,allocate=energy",
       "trellis": "rotate=hadamard,levels=trellis,allocate=energy,patch=dct,prototypes=3"}


@dataclass(frozen=True)
class Run:
    task: str
    codec: str
    grad_codec: str | None
    seed: int

    @property
    def path(self) -> Path:
        old = self._path(recorded(self.codec, self.task))
        return old if old.is_file() else self._path(self.codec)

    def _path(self, codec: str) -> Path:
        codecs = (codec,) if self.grad_codec is None else (codec, self.grad_codec)
        return RESULTS / self.task / harness.file_name(*codecs, f"seed{self.seed}")

    def __str__(self) -> str:
        return f"{self.task} {self.codec} seed {self.seed}"


def recorded(codec: str, task: str) -> str:
    """The name of a codec in the records of version 0.1."""
    name, _, bits = codec.partition(":")
    if name not in OLD:
        return codec
    return f"block:{bits},{OLD[name]}{',patch=dct' if name == 'rotated' and task == 'cifar10' else ''}"


def plan(tasks: list[str]) -> list[Run]:
    """All runs, the most telling ones first."""
    seeds = (0, 1, 2)
    main = [("none", None), ("block:bits=4", GRADIENT), ("rotated:bits=3", GRADIENT),
            ("rotated:bits=2", GRADIENT), ("trellis:bits=2", GRADIENT)]  # fmt: skip
    runs = []
    for seed in seeds:
        runs += [Run("cifar10", "rotated:bits=4", GRADIENT, seed)] if "cifar10" in tasks else []
        runs += [Run(task, codec, grad, seed) for task in tasks for codec, grad in main]
        runs += [Run("cola", "rotated:bits=4", GRADIENT, seed)] if "cola" in tasks else []
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


def recipe(name: str) -> Any:
    return harness.recipe(f"{name}/run_{name}")


def execute(run: Any, data: Path, extra: list[str]) -> dict[str, Any]:
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
    record["data"] = harness.without_folders(record["data"])
    record["seconds"] = round(time.time() - began, 1)
    record["commit"] = harness.commit()
    record["history"] = [
        {k: h[k] for k in ("step", "loss", "grad_norm") if k in h} for h in record["history"] if "loss" in h
    ]
    return record


def main() -> None:
    parser = harness.arguments(__doc__, data=True, force=True, plan=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="+", help="run these forward codecs only ('none' is one)")
    parser.add_argument("--seeds", nargs="+", type=int)
    args, extra = parser.parse_known_args()
    runs = [
        run for run in plan(args.tasks)
        if (args.only is None or run.codec in args.only) and (args.seeds is None or run.seed in args.seeds)
    ]  # fmt: skip
    if args.list:
        return harness.list_runs(runs)
    harness.require_data(args.data)
    harness.run_all(runs, lambda run: execute(run, args.data, extra), args.force)


if __name__ == "__main__":
    main()
