"""Accuracy of data-parallel training of two processes with compressed gradients, on SST-2 and CIFAR-10, 3 seeds.

    python benchmarks/reduce_accuracy.py                # everything that is not there yet
    python benchmarks/reduce_accuracy.py --list
    python benchmarks/reduce_accuracy.py --bf16 True    # what is not known here goes to the recipe

One JSON per run under benchmarks/results/reduce_accuracy/; a run whose file exists is skipped, so an interrupted call
goes on where it stopped.  Data: a folder with glue/sst2 and cifar10 (--data, default ../shared/data).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import ROOT
from pipeline_accuracy import free_port

RESULTS = harness.RESULTS / "reduce_accuracy"
METHODS = ("none", "powersgd:rank=4", "ef+block:bits=4", "ef+block:bits=2,round=stochastic", "ef+topk:ratio=0.01")
SEEDS = (0, 1, 2)
TASKS = {
    "sst2": ("examples/glue/run_glue.py", "glue/sst2", "--max_train_samples 5000 --max_length 40 --num_train_epochs 2 "
             "--learning_rate 5e-5 --per_device_train_batch_size 16"),
    "cifar10": ("examples/cifar/run_cifar.py", "cifar10", "--model efficientnet-lite0 --image_size 96 "
                "--max_train_samples 5000 --max_eval_samples 2000 --num_train_epochs 2 --learning_rate 1e-3 "
                "--per_device_train_batch_size 16"),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    seed: int

    @property
    def path(self) -> Path:
        return RESULTS / harness.file_name(self.task, self.method, f"seed{self.seed}")


def execute(run: Run, data: Path, extra: list[str]) -> dict[str, Any]:
    script, folder, options = TASKS[run.task]
    reduce = [] if run.method == "none" else ["--reduce", run.method]
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
            "--master_port", free_port(), ROOT / script, "--dataset", data / folder, "--codec", "none", *reduce,
            "--seed", run.seed, "--output_dir", out, "--use_cpu", "True", "--disable_tqdm", "True", *options.split(),
            *extra,
        ]  # fmt: skip
        began = time.time()
        found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True)
        record = harness.read(Path(out) / "results.json")
    record["seconds"] = round(time.time() - began, 1)
    record["command"] = " ".join(["python benchmarks/reduce_accuracy.py", *extra])
    return record


def main() -> None:
    parser = harness.arguments(__doc__, data=True, force=True, plan=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    args, extra = parser.parse_known_args()
    runs = [Run(task, method, seed) for seed in SEEDS for task in args.tasks for method in METHODS]
    if args.list:
        harness.list_runs(runs)
        return
    data = harness.require_data(args.data).resolve()
    harness.run_all(runs, lambda run: execute(run, data, extra), args.force)


if __name__ == "__main__":
    main()
