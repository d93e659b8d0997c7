"""Every reference table from one command: the runs behind "Ours beside theirs" in docs/results.md.

    python benchmarks/tables.py --table kmeans                  # the cpu budget: minutes a run on one core
    python benchmarks/tables.py --all --budget full             # the original settings, for a machine with GPUs
    python benchmarks/tables.py --table text --list
    python benchmarks/tables.py --table svd --throughput        # samples per second, both sides in turn
    python benchmarks/tables.py --table vision -- --bf16 True   # what follows -- goes to the recipe

One JSON per run under benchmarks/results/tables/<table>/<budget>/.  A run whose file exists is skipped, so a table
that was interrupted goes on where it stopped (with --budget full at the last epoch); --force runs it again, and
nothing else overwrites a result.  Runs of equal settings are made once: those that another table or
benchmarks/accuracy.py has are read from there.  <budget>.json beside the folder lists the rows, what others measured,
and where our runs lie; `hf-actcompress report` makes tables of it.  Rows and settings are in reference.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import accuracy
import harness
from reference import BUDGETS, TABLES, TASKS, Row
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hf_actcompress.codecs import parse_codec
from hf_actcompress.report.comparison import comparison_table, load_comparison

RESULTS = harness.RESULTS / "tables"
SEEDS = {"smoke": (0,), "cpu": (0,), "full": (0, 1, 2)}
MODEL = {"smoke": "mobilenetv2_100 96 px, batch 64", "cpu": "mobilenetv2_100 96 px, batch 64",
         "full": "mobilenetv2_100 224 px, batch 32"}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: a row of a table, under a budget and a seed."""

    table: str
    row: Row
    budget: str
    seed: int

    @property
    def task(self) -> str:
        return TASKS[self.row.task].folder.rpartition("/")[2]

    @property
    def options(self) -> tuple[str, ...]:
        """All that decides the result but the seed, as arguments of the recipe."""
        task = TASKS[self.row.task]
        own = [word.replace("HALF:", "") for word in self.row.options]
        if "--schedule" in own:
            epochs = int(re.search(r"epochs (\d+)|$", task.options[self.budget])[1] or 2)
            at = own.index("--schedule") + 1
            own[at] = json.dumps({str(epochs // 2): own[at]})
        return (*setting(task.options[self.budget], self.row.codec), *own)

    @property
    def key(self) -> tuple[Any, ...]:
        task = TASKS[self.row.task]
        return task.recipe, task.folder, self.options, self.seed

    @property
    def path(self) -> Path:
        name = self.row.codec + "".join(f"__{word}" for word in self.row.options if word != "--schedule")
        name = harness.file_name(self.row.task, name, f"seed{self.seed}")
        return RESULTS / self.table / self.budget / name


def setting(options: str, codec: str) -> tuple[str, ...]:
    """Options with their codec; where nothing is compressed the cuts make no difference."""
    if codec == "none":
        options = re.sub(r"--(first|last|placement) \w+ ?", "", options)
    return (*options.split(), "--codec", canonical(codec))


def canonical(codec: str) -> str:
    return codec if codec == "none" else str(parse_codec(codec))


def plan(table: str, budget: str) -> list[Run]:
    return [Run(table, row, budget, seed) for seed in SEEDS[budget] for row in TABLES[table].rows]


@cache
def _owners(budget: str) -> dict[tuple[Any, ...], Run]:
    """The first run of each setting, over all tables: there the result lies."""
    runs = [run for table in TABLES for run in plan(table, budget)]
    return {run.key: run for run in reversed(runs)}


@cache
def _accuracy_runs() -> dict[tuple[Any, ...], Path]:
    """What benchmarks/accuracy.py has of runs that compress both directions alike."""
    found = {}
    for path in accuracy.RESULTS.rglob("*.json"):
        record, task = harness.read(path), path.parent.name
        if task in accuracy.TASKS and not (record["config"] or {}).get("grad_codec"):
            script, folder, options = accuracy.TASKS[task]
            found[script, folder, setting(options, record["codec"]), record["seed"]] = path
    return found


def place(run: Run) -> Path:
    """Where the result of `run` is or will be."""
    return _accuracy_runs().get(run.key) or _owners(run.budget)[run.key].path


def found(run: Run) -> bool:
    path = place(run)
    if not path.is_file():
        return False
    try:
        harness.read(path)
    except json.JSONDecodeError:
        raise ValueError(f"{path} is cut off or empty: delete it, or run it again with --force.") from None
    return True


def execute(run: Run, data: Path | None, extra: list[str]) -> dict[str, Any]:
    task = TASKS[run.row.task]
    folder = data / task.folder if data is not None else None
    if folder is not None and folder.is_dir():
        source = ["--dataset", str(folder)]
    elif run.budget == "full":
        source = ["--dataset", *task.hub]
    else:
        raise ValueError(f"There is no folder {folder}: give the folder that holds {task.folder} with --data.")
    argv, output = [*run.options, *source, "--logging_steps", "20", *extra], None
    if run.budget == "full":  # hours a run: an interrupted one goes on at its last epoch
        output = str(harness.ROOT / "outputs" / "tables" / run.table / run.path.stem)
        argv += ["--save_strategy", "epoch", "--save_total_limit", "1"]
        if kept := sorted(Path(output).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
            argv += ["--resume_from_checkpoint", str(kept[-1])]
    record = accuracy.train(task.recipe, argv, run.seed, output)
    if output is not None:
        shutil.rmtree(output, ignore_errors=True)
    return {**record, "budget": run.budget, "options": list(run.options),
            "command": f"python benchmarks/tables.py --table {run.table} --budget {run.budget}"}  # fmt: skip


def work(runs: list[Run], args: argparse.Namespace, extra: list[str]) -> list[str]:
    """Make what is missing; returns what failed, in words.  The rest goes on after a failure."""
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(runs))
        for run in runs:
            owner = _owners(run.budget)[run.key]
            progress.update(bar, description=f"{run.table}: {run.row.label}, seed {run.seed}")
            with harness.claimed(owner.path) as ours:
                if ours and (args.force and place(run) == run.path or not found(run)):
                    said, began = io.StringIO(), time.time()
                    try:
                        with contextlib.redirect_stdout(said):  # the recipe's own tables
                            record = execute(run, args.data, extra)
                    except Exception as error:  # of whatever kind: the other runs do not depend on it
                        failed.append(f"{run.table}, {run.row.label}: {type(error).__name__}: {error}")
                        progress.console.print(f"[red]failed[/]  {failed[-1]}\n{said.getvalue()[-2000:]}")
                    else:
                        harness.save_run(owner.path, record)
                        _accuracy_runs.cache_clear()
                        progress.console.print(f"done    {run.row.label}: {time.time() - began:.0f} s")
            progress.advance(bar)
    return failed


def write_index(table: str, budget: str) -> Path:
    """`<budget>.json` beside the runs: rows, their figures, and the files of our runs as far as they are there."""
    about, folder = TABLES[table], RESULTS / table
    rows = []
    for row in about.rows:
        runs = [run for run in plan(table, budget) if run.row == row]
        if budget == "cpu":  # seeds that benchmarks/accuracy.py has besides
            runs += [run for seed in range(1, 10) if (run := Run(table, row, budget, seed)).key in _accuracy_runs()]
        files = [os.path.relpath(place(run), folder) for run in runs if found(run)]
        rows.append({"label": row.label, "codec": canonical(row.codec), "task": runs[0].task, "theirs": row.theirs,
                     "runs": [Path(file).as_posix() for file in files]})  # fmt: skip
    index = {"table": table, "title": about.title, "budget": budget, "theirs": about.theirs, "differs": about.differs,
             "command": f"python benchmarks/tables.py --table {table} --budget {budget}", "rows": rows}  # fmt: skip
    speed = folder / f"{budget}.throughput.json"
    if speed.is_file():
        index["throughput"] = speed.name
    path = folder / f"{budget}.json"
    harness.write(path, index)
    return path


def throughput(table: str, budget: str, args: argparse.Namespace) -> None:
    """Samples per second of each codec of a table, in turn in one process, as benchmarks/training.py measures them."""
    import training

    first_last = TABLES[table].throughput
    path = RESULTS / table / f"{budget}.throughput.json"
    if first_last is None:
        raise ValueError(f"--throughput: the table {table!r} compares no speed; those that do: "
                         f"{', '.join(name for name, about in TABLES.items() if about.throughput)}.")  # fmt: skip
    if path.is_file() and not args.force:
        print(f"{path.relative_to(RESULTS)} is there; --force measures again.")
        return
    codecs = dict.fromkeys(canonical(row.codec) for row in TABLES[table].rows if row.codec != "none")
    options = argparse.Namespace(rounds=args.rounds, steps=2, device=args.device, codecs=list(codecs))
    rows = training.measure(MODEL[budget], options, *first_last)
    record = {"model": MODEL[budget], "first": first_last[0], "last": first_last[1], "rows": rows}
    harness.write(path, {**record, **harness.about(f"tables.py --table {table} --budget {budget} --throughput")})


def main(argv: list[str] | None = None) -> int:
    parser = harness.arguments(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", nargs="+", choices=list(TABLES), help="one or more tables")
    which.add_argument("--all", action="store_true", help="every table")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu", help="size of our side (default cpu)")
    parser.add_argument("--data", type=Path, help="folder with cifar10 and glue/* in Parquet (default ../shared/data; "
                        "with --budget full the hub where it is not there)")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="CODEC", help="rows of these codecs only")
    parser.add_argument("--force", action="store_true", help="run again what has a result in these tables")
    parser.add_argument("--list", action="store_true", help="show the runs and what is done, and run nothing")
    parser.add_argument("--summary", action="store_true", help="print the tables of what is there, and run nothing")
    parser.add_argument("--throughput", action="store_true", help="measure speed instead of training to the end")
    parser.add_argument("--rounds", type=int, default=5, help="of --throughput")
    parser.add_argument("--device", default="cpu", help="of --throughput")
    argv = sys.argv[1:] if argv is None else argv
    at = argv.index("--") if "--" in argv else len(argv)
    args, extra = parser.parse_args(argv[:at]), argv[at + 1 :]
    if args.data is None:
        args.data = harness.DATA if harness.DATA.is_dir() else None
    elif not args.data.is_dir():
        parser.error(f"--data: there is no folder {args.data}.")
    only = {canonical(codec) for codec in args.only or ()}
    tables, failed = list(TABLES) if args.all else args.table, []
    try:
        runs = [run for table in tables for run in plan(table, args.budget)
                if not only or canonical(run.row.codec) in only]  # fmt: skip
        if args.list:
            for run in runs:
                print("done" if found(run) else "open", os.path.relpath(place(run), RESULTS), f"({run.row.label})")
            return 0
        if args.throughput:
            for table in tables:
                throughput(table, args.budget, args)
        elif not args.summary:
            failed = work(runs, args, extra)
        for table in tables:
            print(comparison_table(load_comparison(write_index(table, args.budget))))
    except ValueError as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(sys.argv)
        print(f"\ntables: interrupted; what is done is kept, `python {again}` goes on.", file=sys.stderr)
        return 130
    for line in failed:
        print(f"tables: failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
