"""Tables of our results beside published ones: an index of rows (benchmarks/tables.py writes it), and our records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .records import Record, read_json, read_records
from .tables import (
    DIVERGED,
    Column,
    Row,
    complete,
    drop_against,
    markdown_table,
    plain_text,
    scale_of,
    settings_of,
    show,
    show_mean,
    summarize,
)

NEEDED = ("table", "title", "budget", "theirs", "rows", "command")
NEEDED_IN_ROWS = ("label", "codec", "task", "theirs", "runs")
BUDGETS = ("full", "cpu", "smoke")  # the most telling first


def find_indices(folder: str | os.PathLike[str]) -> list[Path]:
    """The index of the largest budget of each table that has runs, in `folder` and its sub-folders."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}: give the one that benchmarks/tables.py writes to.")
    best: dict[Path, Path] = {}
    for path in sorted(root.rglob("*.json")):
        if path.stem in BUDGETS and any(row["runs"] for row in _index(path)["rows"]):
            known = best.get(path.parent)
            if known is None or BUDGETS.index(path.stem) < BUDGETS.index(known.stem):
                best[path.parent] = path
    if not best:
        raise ValueError(f"{root} holds no table with runs: make one with benchmarks/tables.py.")
    return list(best.values())


def load_comparison(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The index with `ours` in each row (a row of `tables.summarize`, or None without runs), `settings` of our runs
    by task, and `records`, all of them.

    `ours` has besides: `variant` ("plain" for the codec none, else "compressed"), `value` and `std` of it.
    Raises ValueError for a file that is no index, a run that is not there or cut off, and runs of several models.
    """
    path = Path(path)
    index = _index(path)
    speed = _throughput(path.parent / index["throughput"]) if index.get("throughput") else {"rows": []}
    rates = {row["codec"]: row for row in speed["rows"]}
    rows, everything, base = [], [], {}
    for row in index["rows"]:
        records = [record for file in row["runs"] for record in read_records(_existing(path, file))]
        ours = summarize(records) if records else None
        if ours is not None:
            variant = ours["variant"] = "plain" if ours["codec"] == "none" else "compressed"
            ours["value"], ours["std"] = ours[variant], ours[f"{variant}_std"]
            settings = settings_of(records, cuts=False)
            if variant == "plain":
                base[settings] = ours
            else:
                ours["drop"], ours["drop_stds"] = drop_against(base.get(settings), ours)
        rows.append({**row, "ours": ours, "speed": rates.get(row["codec"])})
        everything += records
    models = sorted({f"{record['task']}: {record.get('model')}" for record in everything})
    if len(models) > len({record["task"] for record in everything}):
        raise ValueError(f"{path}: runs of several models are mixed ({', '.join(models)}); a table compares codecs on "
                         "one model a task. Run the rows again with one model and --force.")  # fmt: skip
    settings = dict.fromkeys(f"{record['task']}: {settings_of([record], cuts=False)}" for record in everything)
    words = ""
    if rates:
        where = f"{speed['model']}, first {speed['first']}, last {speed['last']}"
        words = f"Speed: {where}, steps of all in turn; median and range."
    return {**index, "rows": rows, "settings": list(settings), "records": everything, "speed": words}


def comparison_columns(comparison: Mapping[str, Any]) -> list[Column]:
    """The columns of the table: the row's label, their figures, ours."""
    rows = comparison["rows"]

    def ours(key: str) -> Callable[[Row], Any]:
        return lambda row: (row["ours"] or {}).get(key)

    columns = [Column("", lambda row: row["label"], lambda row: row["label"])]
    if len({row["task"] for row in rows}) > 1:
        columns.append(Column("task", lambda row: row["task"], lambda row: row["task"]))
    for name in dict.fromkeys(name for row in rows for name in row["theirs"]):
        columns.append(Column(f"theirs: {name}", lambda row, n=name: str(row["theirs"].get(n, "")),
                              lambda row, n=name: _leading(row["theirs"].get(n, ""))))  # fmt: skip
    columns += [
        Column("ours", _ours, ours("value")), Column("seeds", lambda row: show(ours("seeds")(row)), ours("seeds")),
        Column("drop", _drop, ours("drop")), Column("ratio", lambda row: show(ours("ratio")(row), 2), ours("ratio")),
    ]  # fmt: skip
    if any(row["speed"] for row in rows):
        columns.append(Column("ours: samples/s over none", _speed, lambda row: (row["speed"] or {}).get("of_none")))
    return columns


def comparison_notes(comparison: Mapping[str, Any]) -> str:
    """What their runs and ours are, and what differs."""
    rows = comparison["rows"]
    done = [row["ours"] for row in rows if row["ours"]]
    metrics = ", ".join(dict.fromkeys(ours["metric"] for ours in done)).replace("_", " ")
    notes = [f"Theirs: {comparison['theirs']}.",
             f"Ours ({metrics}): {'; '.join(comparison['settings']) or 'no runs yet'}."]  # fmt: skip
    notes += [note for note in (comparison.get("differs"), comparison["speed"]) if note]
    notes += [f"{len(done)} of {len(rows)} rows are run."] * (len(done) < len(rows))
    return " ".join(notes + [DIVERGED] * (not all(complete(ours, ours["variant"]) for ours in done)))


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Markdown: one line per row of the index, their figures and ours."""
    return markdown_table(comparison["rows"], comparison_columns(comparison))


def comparison_section(comparison: Mapping[str, Any]) -> str:
    """The table with its title and with what differs between their runs and ours."""
    return "\n\n".join((f"### {plain_text(comparison['title'])}", comparison_table(comparison),
                        plain_text(comparison_notes(comparison)), f"`{plain_text(comparison['command'])}`."))


def _ours(row: Row) -> str:
    return show_mean(row["ours"], row["ours"]["variant"], *scale_of(row["ours"]["metric"])) if row["ours"] else "-"


def _drop(row: Row) -> str:
    if row["ours"] is None or row["ours"].get("drop") is None:
        return "-"
    scale, digits = scale_of(row["ours"]["metric"])
    return show(scale * row["ours"]["drop"], digits)


def _speed(row: Row) -> str:
    if not row["speed"]:
        return "-"
    low, high = row["speed"]["of_none_range"]
    return f"{row['speed']['of_none']:.3f} ({low:.3f}-{high:.3f})"


def _leading(text: Any) -> float | None:
    """The number that a figure of theirs begins with."""
    try:
        return float(str(text).split(" ")[0])
    except ValueError:
        return None


def _index(path: Path) -> dict[str, Any]:
    index = read_json(path, "make it once more with benchmarks/tables.py")
    missing = [name for name in NEEDED if not isinstance(index, dict) or name not in index]
    if missing:
        raise ValueError(f"{path} is no index of a table: it has no {', '.join(missing)}.")
    for number, row in enumerate(index["rows"]):
        missing = [name for name in NEEDED_IN_ROWS if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path} is no index of a table: rows[{number}] has no {', '.join(missing)}.")
    return index


def _existing(index: Path, file: str) -> Path:
    path = (index.parent / file).resolve()
    if not path.is_file():
        raise ValueError(f"{index} names the run {file}, which is not there: run benchmarks/tables.py once more.")
    return path


def _throughput(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is not there: measure with benchmarks/tables.py --throughput.")
    return read_json(path, "measure again with benchmarks/tables.py --throughput")


def records_of(comparisons: Iterable[Mapping[str, Any]]) -> list[Record]:
    """All records of several tables, each once."""
    return list({json.dumps(r, sort_keys=True): r for c in comparisons for r in c["records"]}.values())
