"""What the scripts of this folder share: arguments, JSON results, runs that resume, timing in turn, tables.

A script measures and calls `save`; `pages.py` makes the tables of docs/ from what was saved.  Both sides of a
comparison are timed in turn in one process (`in_turn`), so that other load on the machine meets both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from hf_actcompress.workloads.results import FILE_NAME, environment, write_results

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
DATA = ROOT.parent / "shared" / "data"


# Arguments


def arguments(
    doc: str, *, data: bool = False, force: bool = False, plan: bool = False, results: str | None = None
) -> argparse.ArgumentParser:
    """A parser whose help is the script's docstring, with the options that several scripts have.

    results: name of the JSON file that --results replaces.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if data:
        parser.add_argument("--data", type=Path, default=DATA, help="folder of data sets in Parquet")
    if force:
        parser.add_argument("--force", action="store_true", help="measure again what has a result")
    if plan:
        parser.add_argument("--list", action="store_true", help="show the runs and which are done, and run nothing")
    if results is not None:
        parser.add_argument("--results", type=Path, default=RESULTS / f"{results}.json", help="file of the results")
    return parser


def require_data(folder: Path) -> Path:
    if not folder.is_dir():
        raise SystemExit(f"There is no data folder at {folder}; give one with --data.")
    return folder


def data_or_embedded(name: str, root: Path = DATA) -> str:
    """The folder of a data set, or the data embedded in the package where there is none."""
    return str(root / name) if (root / name).is_dir() else "embedded"


# Results


def read(path: Path | str, default: Any = None) -> Any:
    """A JSON file; a name is one of the results.  `default` where there is none."""
    path = RESULTS / f"{path}.json" if isinstance(path, str) else path
    return json.loads(path.read_text()) if path.is_file() else default


def read_all(folder: Path | str) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted((RESULTS / folder).glob("*.json"))]


def write(path: Path | str, record: Any) -> None:
    """Written beside its place and renamed: a script that is stopped leaves no half file."""
    path = RESULTS / f"{path}.json" if isinstance(path, str) else path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def about(command: str) -> dict[str, Any]:
    return {"command": f"python benchmarks/{command}", "environment": environment()}


def commit() -> str | None:
    """Of this checkout: which code a figure stands for."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or None


def save(name: str, **values: Any) -> None:
    """The whole result of the script benchmarks/<name>.py."""
    write(name, {**about(f"{name}.py"), **values})


class Kept:
    """A JSON file of measurements, written after each; what is there is not measured again."""

    def __init__(self, path: Path | str, command: str, force: bool = False) -> None:
        self.path, self.command, self.force = path, command, force
        self.data: dict[str, Any] = read(path, {})

    def __call__(self, key: str, make: Callable[[], Any], part: str | None = None) -> Any:
        known = self.data if part is None else self.data.setdefault(part, {})
        if key not in known or self.force:
            known[key] = make()
            self.data.update(about(self.command))
            write(self.path, self.data)
        return known[key]


# Runs that resume


class Run(Protocol):
    """One training: where its result lies, and what it is called in the progress bar (`str(run)`)."""

    @property
    def path(self) -> Path: ...


def file_name(*parts: object) -> str:
    return re.sub("[^a-zA-Z0-9.=+_]+", "-", "__".join(map(str, parts))) + ".json"


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether the run is ours; False where another process is at it.  The lock ends with its process."""
    # Of the whole path: another checkout's results are not these.
    name = f"hf_actcompress-{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def save_run(path: Path, record: Mapping[str, Any]) -> None:
    """As `write`, with sorted keys, and NaN and infinities as strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write_results(folder, record)
        (Path(folder) / FILE_NAME).replace(path)


def list_runs(runs: Iterable[Run]) -> None:
    for run in runs:
        print("done" if run.path.exists() else "open", run.path.relative_to(RESULTS))


def run_all(
    runs: Sequence[Run], make: Callable[[Any], Mapping[str, Any]], force: bool = False,
    said: Callable[[Mapping[str, Any]], str] = lambda record: json.dumps(record.get("metrics")),
) -> None:
    """Makes the results that are missing.  Several calls may share the work."""
    for run in (bar := tqdm(runs, desc="runs")):
        with claimed(run.path) as ours:
            if ours and (force or not run.path.exists()):
                bar.set_postfix_str(str(run))
                record = make(run)
                save_run(run.path, record)
                tqdm.write(f"{run}: {said(record)}")


def recipe(path: str) -> Any:
    """A script of examples/ as a module: "glue/run_glue"."""
    file = ROOT / "examples" / f"{path}.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass fields look their types up there
    spec.loader.exec_module(module)
    return module


def without_folders(data: object) -> str:
    """The name of a data set without the folders of this machine."""
    return re.sub(r"(/[^ ]*)/(?=shared|data)", "", str(data))


# Time


def seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, one of each in every round; the first rounds do not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-warmup, repeats):
        for name, call in calls.items():
            took = seconds(call)
            if repeat >= 0:
                found[name].append(took)
    return found


def median_ms(calls: Mapping[str, Callable[[], Any]], repeats: int = 30) -> dict[str, float]:
    return {name: 1e3 * statistics.median(values) for name, values in in_turn(calls, repeats).items()}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs of the same round, sorted."""
    return sorted(a / b for a, b in zip(ours, theirs, strict=True))


def quartiles(values: Sequence[float]) -> list[float]:
    """Of sorted values."""
    quarter = len(values) // 4
    return [values[quarter], values[-1 - quarter]]


def fresh_process(script: str, *options: object, **env: str) -> Any:
    """The JSON of the last line that `script options` prints in a process of its own."""
    command = [sys.executable, script, *map(str, options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **env})
    return json.loads(done.stdout.splitlines()[-1])


# Tables


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str = "l") -> str:
    """A Markdown table.  align: a letter for each column, l or r; the columns after the last letter are as r."""
    sides = align.ljust(len(head), "r")
    lines = [head, [{"l": "---", "r": "---:"}[side] for side in sides], *rows]
    title, *rest = (f"| {' | '.join(map(str, cells))} |" for cells in lines)
    return "\n".join([title.replace("|  |", "| |"), *rest])


def mean_std(values: Sequence[float], digits: int = 1) -> str:
    """"93.4 ± 0.2"; the mean alone of a single value."""
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{std}"


def against(value: object, met: bool) -> str:
    """What was asked for, and whether it was missed."""
    return f"{value}" if met else f"{value} **missed**"
