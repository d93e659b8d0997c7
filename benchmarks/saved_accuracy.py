"""Accuracy of training whose saved tensors are compressed: the runs behind the last table of docs/memory.md.

    python benchmarks/saved_accuracy.py                 # everything that is not there yet: 18 runs
    python benchmarks/saved_accuracy.py --seeds 0,1,2,3,4,5 --tasks cifar10
    python benchmarks/saved_accuracy.py --list

SST-2 (5,000 rows) and CIFAR-10 (5,000 images), three seeds (six of CIFAR-10), settings as in benchmarks/accuracy.py.
Plain runs belong to it: those of another machine differ by as much as other seeds do.  No layer boundaries.
Resumable; several calls may share the work.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "saved"
SPECS = ("none", "block:bits=4", "auto:budget=0.07")  # the share of about 2 bits
TASKS = ("sst2", "cifar10")
OPTIONS = ("--first", "0", "--last", "0", "--evaluate", "on")


@dataclass(frozen=True)
class Run:
    task: str
    saved: str
    seed: int
    codec: str = "block:bits=4"  # of no boundary
    grad_codec: None = None

    @property
    def path(self) -> Path:
        return RESULTS / self.task / f"{re.sub('[^a-zA-Z0-9.=+_]+', '-', self.saved)}__seed{self.seed}.json"


def plan(seeds: Sequence[int] = (0, 1, 2), tasks: Sequence[str] = TASKS) -> list[Run]:
    return [Run(task, spec, seed) for seed in seeds for task in tasks for spec in SPECS]


def slim(record: dict[str, Any], run: Run) -> dict[str, Any]:
    return {**record, "saved": run.saved, "command": "python benchmarks/saved_accuracy.py"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=accuracy.ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--list", action="store_true", help="show the plan and what is done")
    args, extra = parser.parse_known_args()
    runs = plan([int(seed) for seed in args.seeds.split(",")], args.tasks.split(","))
    if args.list:
        for run in runs:
            print("done" if run.path.exists() else "open", run.path.relative_to(RESULTS))
        return
    if not args.data.is_dir():
        raise SystemExit(f"There is no data folder at {args.data}; give one with --data.")
    for run in (progress := tqdm(runs, desc="runs")):
        with accuracy.claimed(run) as ours:
            if not ours or run.path.exists():
                continue
            progress.set_postfix_str(f"{run.task} {run.saved} seed {run.seed}")
            saved = ["--codec", "none"] if run.saved == "none" else ["--saved", run.saved]
            record = accuracy.execute(run, args.data, [*OPTIONS, *saved, *extra])
            accuracy.save(run, slim(record, run))
            print(json.dumps(record["metrics"]))


if __name__ == "__main__":
    main()
