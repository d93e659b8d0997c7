"""Tables of ours beside theirs: an index of rows (benchmarks/tables.py writes it) and the run records that it names.

Like `report.py` it reads JSON alone and knows no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .tables import PERCENT, Record, markdown_table, read_records, settings_of, show, summarize

NEEDED = ("table", "title", "budget", "theirs", "rows")
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
    """The index with `ours` in each row (a row of `report.summarize`, or None without runs), `settings` of our runs
    by task, and `records`, all of them.

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
            ours["value"] = ours["plain" if ours["codec"] == "none" else "compressed"]
            ours["std"] = ours["plain_std" if ours["codec"] == "none" else "compressed_std"]
            setting = str(settings_of(records[0]))
            if ours["codec"] == "none":
                base[setting] = ours
            elif setting in base and ours["value"] is not None:
                none = base[setting]
                ours["drop"] = none["value"] - ours["value"]
                ours["drop_stds"] = ours["drop"] / none["std"] if none["std"] else None
        rows.append({**row, "ours": ours, "speed": rates.get(row["codec"])})
        everything += records
    models = sorted({f"{record['task']}: {record.get('model')}" for record in everything})
    if len(models) > len({record["task"] for record in everything}):
        raise ValueError(f"{path}: runs of several models are mixed ({', '.join(models)}); a table compares codecs on "
                         "one model a task. Run the rows again with one model and --force.")  # fmt: skip
    settings = dict.fromkeys(f"{record['task']}: {', '.join(settings_of(record))}" for record in everything)
    words = ""
    if rates:
        where = f"{speed['model']}, first {speed['first']}, last {speed['last']}"
        words = f"Speed: {where}, steps of all in turn; median and range."
    return {**index, "rows": rows, "settings": list(settings), "records": everything, "speed": words}


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Markdown: one line per row of the index, their figures and ours."""
    rows = comparison["rows"]
    tasks = len({row["task"] for row in rows}) > 1
    theirs = dict.fromkeys(name for row in rows for name in row["theirs"])
    columns: dict[str, Any] = {"": "label"} | ({"task": "task"} if tasks else {})
    for name in theirs:
        columns[f"theirs: {name}"] = lambda row, name=name: row["theirs"].get(name, "")
    columns |= {"ours": ours_text, "seeds": lambda row: show((row["ours"] or {}).get("seeds")),
                "drop": lambda row: drop_text(row["ours"]),
                "ratio": lambda row: show((row["ours"] or {}).get("ratio"), 2)}  # fmt: skip
    if any(row["speed"] for row in rows):
        columns["ours: samples/s over none"] = speed_text
    return markdown_table(rows, columns)


def comparison_section(comparison: Mapping[str, Any]) -> str:
    """The table with its title and with what differs between their runs and ours."""
    done = sum(row["ours"] is not None for row in comparison["rows"])
    total = len(comparison["rows"])
    metrics = dict.fromkeys(row["ours"]["metric"] for row in comparison["rows"] if row["ours"])
    ours = "; ".join(comparison["settings"]) or "no runs yet"
    notes = [f"Theirs: {comparison['theirs']}.", f"Ours ({', '.join(metrics).replace('_', ' ')}): {ours}."]
    notes += [note for note in (comparison.get("differs"), comparison["speed"]) if note]
    notes += [f"{done} of {total} rows are run."] * (done < total)
    return "\n\n".join((f"### {comparison['title']}", comparison_table(comparison), " ".join(notes),
                        f"`{comparison['command']}`."))  # fmt: skip


def ours_text(row: Mapping[str, Any]) -> str:
    ours = row["ours"]
    if ours is None or ours["value"] is None:
        return "-"
    scale, digits = (100, 1) if ours["metric"] in PERCENT else (1, 3)
    spread = f" ± {scale * ours['std']:.{digits}f}" if ours["std"] is not None else ""
    return f"{scale * ours['value']:.{digits}f}{spread}"


def drop_text(ours: Mapping[str, Any] | None) -> str:
    if ours is None or ours.get("drop") is None:
        return "-"
    scale, digits = (100, 1) if ours["metric"] in PERCENT else (1, 3)
    return f"{scale * ours['drop']:.{digits}f}"


def speed_text(row: Mapping[str, Any]) -> str:
    speed = row["speed"]
    if not speed:
        return "-"
    low, high = speed["of_none_range"]
    return f"{speed['of_none']:.3f} ({low:.3f}-{high:.3f})"


def _index(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    if text is None:
        raise ValueError(f"There is no {path}: make it with benchmarks/tables.py.")
    if not text.strip():
        raise ValueError(f"{path} is empty: run benchmarks/tables.py once more, which writes it anew.")
    try:
        index = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}): run benchmarks/tables.py once more.") from None
    missing = [name for name in NEEDED if not isinstance(index, dict) or name not in index]
    if missing:
        raise ValueError(f"{path} is no index of a table: it has no {', '.join(missing)}.")
    return index


def _existing(index: Path, file: str) -> Path:
    path = (index.parent / file).resolve()
    if not path.is_file():
        raise ValueError(f"{index} names the run {file}, which is not there: run benchmarks/tables.py once more.")
    return path


def _throughput(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is not there: measure with benchmarks/tables.py --throughput.")
    return json.loads(path.read_text(encoding="utf-8"))


def records_of(comparisons: Iterable[Mapping[str, Any]]) -> list[Record]:
    """All records of several tables, each once."""
    return list({json.dumps(r, sort_keys=True): r for c in comparisons for r in c["records"]}.values())
