"""Codecs chosen for each boundary and direction (`auto:ratio=8`) against one codec everywhere at the same ratio.

    python benchmarks/auto_ratio.py                     # everything that is not there yet, then the table
    python benchmarks/auto_ratio.py --tasks cola --seeds 0
    python benchmarks/auto_ratio.py --table             # only the table

Settings of benchmarks/accuracy.py, whose runs without compression and with k-means and sort are read as well.  One
JSON per run under benchmarks/results/auto_ratio/<task>/; a run whose file exists is skipped.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accuracy
import harness
from accuracy import Run, execute

RESULTS = harness.RESULTS / "auto_ratio"
TASKS = {"cola": "matthews_correlation", "cifar10": "accuracy"}
AUTO = "auto:ratio=8"
EVERYWHERE = ("kmeans:bits=4", "block:bits=4", "rotated:bits=4", "sort:bits=4", "uniform:bits=4")


@dataclass(frozen=True)
class Here(Run):
    @property
    def path(self) -> Path:
        return RESULTS / self.task / super().path.name


def plan(tasks: list[str], seeds: list[int]) -> list[Here]:
    """Runs that neither this script nor accuracy.py has done, the most telling ones first."""
    order = [(AUTO, seed) for seed in seeds] + [(codec, seed) for codec in EVERYWHERE[:3] for seed in seeds]
    runs = [Here(task, codec, None, seed) for codec, seed in order for task in tasks]
    return [run for run in runs if not Run(run.task, run.codec, None, run.seed).path.exists()]


def rows(task: str) -> list[dict[str, Any]]:
    """One row per codec: ratio over both directions, gradient errors if recorded, mean and deviation of the metric."""
    found: dict[str, list[dict[str, Any]]] = {}
    for folder in (accuracy.RESULTS, RESULTS):
        for path in sorted((folder / task).glob("*__seed*.json")):
            codec = path.stem.split("__")[0]
            alone = len(path.stem.split("__")) == 2
            record = harness.read(path)
            if alone and (codec == "none" or record["codec"].split(",")[0] in (AUTO, *EVERYWHERE, "block:bits=4")):
                found.setdefault(record["codec"], []).append(record)
    table = []
    for codec, records in found.items():
        raw = sum(row["raw_bytes"] for record in records for row in record["compression"])
        left = sum(row["payload_bytes"] for record in records for row in record["compression"])
        row = {"task": task, "codec": codec, "seeds": len(records), "ratio": raw / left if left else 1.0}
        for side in ("compressed", "plain"):
            values = [record["metrics"][TASKS[task]].get(side) for record in records]
            if None not in values:
                row[side] = statistics.mean(values)
                row[f"{side}_std"] = statistics.stdev(values) if len(values) > 1 else None
        if codec == AUTO:
            row["chosen"] = {record["seed"]: record["config"]["resolved"] for record in records}
        table.append(row)
    return sorted(table, key=lambda row: (row["codec"] != "none", row["codec"] != AUTO, row["codec"]))


def show(tasks: list[str]) -> None:
    for task in tasks:
        found = [(row["codec"], f"{row['ratio']:.2f}", row["seeds"], shown(row, "compressed"), shown(row, "plain"))
                 for row in rows(task)]  # fmt: skip
        head = ("codec in both directions", "ratio", "seeds", "evaluated compressed", "evaluated plain")
        print(f"{task}: {TASKS[task].replace('_', ' ')}\n{harness.table(head, found, 'l')}\n")


def shown(row: dict[str, Any], side: str) -> str:
    if side not in row:
        return "-"
    std = row[f"{side}_std"]
    return f"{row[side]:.4f}" + (f" ± {std:.4f}" if std else "")


def make(run: Here, data: Path, extra: list[str]) -> dict[str, Any]:
    command = f"python benchmarks/auto_ratio.py --tasks {run.task} --seeds {run.seed}"
    return {**execute(run, data, extra), "command": command}


def main() -> None:
    parser = harness.arguments(__doc__, data=True, force=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="show what is there, run nothing")
    args, extra = parser.parse_known_args()
    if not args.table:
        harness.require_data(args.data)
        harness.run_all(plan(args.tasks, args.seeds), lambda run: make(run, args.data, extra), args.force)
    show(args.tasks)


if __name__ == "__main__":
    main()
