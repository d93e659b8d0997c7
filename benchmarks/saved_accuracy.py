"""Accuracy of training whose saved tensors are compressed: the runs behind the last table of docs/memory.md.

    python benchmarks/saved_accuracy.py                 # everything that is not there yet: 18 runs
    python benchmarks/saved_accuracy.py --seeds 0 1 2 3 4 5 --tasks cifar10
    python benchmarks/saved_accuracy.py --list

SST-2 (5,000 rows) and CIFAR-10 (5,000 images), three seeds (six of CIFAR-10), settings as in benchmarks/accuracy.py,
no layer boundaries.  Runs without compression are made here as well: those of another machine differ by as much as
other seeds do.  Resumable; several calls may share the work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy
import harness

RESULTS = harness.RESULTS / "saved"
SPECS = ("none", "block:bits=4", "auto:budget=0.07")  # the share of about 2 bits
TASKS = ("sst2", "cifar10")


@dataclass(frozen=True)
class Run:
    task: str
    saved: str
    seed: int

    @property
    def path(self) -> Path:
        return RESULTS / self.task / harness.file_name(self.saved, f"seed{self.seed}")

    def __str__(self) -> str:
        return f"{self.task} {self.saved} seed {self.seed}"


def execute(run: Run, data: Path, extra: list[str]) -> dict[str, Any]:
    script, folder, options = accuracy.TASKS[run.task]
    options = re.sub(r"--(first|last|placement) \w+ ?", "", options)  # of layer boundaries
    saved = ["--codec", "none"] if run.saved == "none" else ["--saved", run.saved]
    argv = [*options.split(), "--dataset", str(data / folder), "--logging_steps", "20", "--evaluate", "on", *saved]
    record = accuracy.train(script, [*argv, *extra], run.seed)
    return {**record, "saved": run.saved, "command": "python benchmarks/saved_accuracy.py"}


def main() -> None:
    parser = harness.arguments(__doc__, data=True, force=True, plan=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    args, extra = parser.parse_known_args()
    runs = [Run(task, spec, seed) for seed in args.seeds for task in args.tasks for spec in SPECS]
    if args.list:
        return harness.list_runs(runs)
    harness.require_data(args.data)
    harness.run_all(runs, lambda run: execute(run, args.data, extra), args.force)


if __name__ == "__main__":
    main()
