"""Result records: the JSON files that the recipes and benchmarks/accuracy.py write, read and checked.

A record is a dict, of one run: task, codec, seed, config, metrics ({"accuracy": {"plain": 0.91, "compressed": 0.90}}),
compression (a row for each boundary and direction), history (log lines), and the settings of the training.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]

METRICS = {"cola": "matthews_correlation"}  # all other tasks: accuracy
# What a record may hold: the type of each entry that is read, and those that are needed.
TYPES: dict[str, tuple[type, ...]] = {
    "task": (str,), "codec": (str,), "metrics": (dict,), "seed": (int, str), "config": (dict,), "history": (list,),
    "compression": (list,), "environment": (dict,), "epochs": (int, float), "learning_rate": (int, float),
}  # fmt: skip
NEEDED = ("task", "codec", "metrics")
COLUMNS_NEEDED = ("direction", "raw_bytes", "payload_bytes")


def metric_of(task: str) -> str:
    """The metric by which runs of a task are compared."""
    return METRICS.get(task, "accuracy")


def load_records(folder: str | os.PathLike[str]) -> list[Record]:
    """Every record in the JSON files of `folder` and its sub-folders, in the order of their paths.

    A file holds one record, or several under "runs".  Beside and below the results.json of a recipe nothing else is
    read: there lie the model, its tokenizer and checkpoints.
    Raises ValueError, with the file's name, for a folder without records and a file that is empty, cut off or of
    another kind.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}: give the one that holds the results, such as outputs/demo.")
    found = (path for path in root.rglob("*.json") if path.is_file())
    paths = sorted(path for path in found if path.name == "results.json" or not _belongs_to_a_run(path, root))
    if not paths:
        raise ValueError(f"{root} holds no JSON file: run a recipe or benchmarks/accuracy.py first.")
    return [record for path in paths for record in read_records(path)]


def _belongs_to_a_run(path: Path, root: Path) -> bool:
    folders = [path.parent, *path.parent.parents]
    return any((folder / "results.json").is_file() for folder in folders[: folders.index(root) + 1])


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file.  Raises ValueError, with the file's name and the remedy, where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError(f"{path} is empty: {remedy}.")
        return json.loads(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no whole JSON file ({error}): {remedy}.") from None


def read_records(path: Path) -> list[Record]:
    """The records of one file.  Raises ValueError, with the file's name, for what is no record."""
    content = read_json(path, "delete it and run that result again")
    records = content["runs"] if isinstance(content, dict) and isinstance(content.get("runs"), list) else [content]
    for record in records:
        problem = _problem(record)
        if problem:
            raise ValueError(f"{path} {problem}")
    return records


def _problem(record: Any) -> str | None:
    """What is wrong with a record, as the rest of a sentence that begins with its file."""
    missing = [key for key in NEEDED if not isinstance(record, dict) or key not in record]
    if missing:
        return f"is no result record: it has no {', '.join(missing)}. Move it elsewhere."
    for key, types in TYPES.items():
        value = record.get(key)
        if not isinstance(value, types) and (value is not None or key in NEEDED):
            return f"is no result record: its {key} is {value!r}. Move it elsewhere, or run it again."
    metric = metric_of(record["task"])
    if metric not in record["metrics"]:
        return (f"has no {metric} in the metrics of {record['task']}; they are "
                f"{', '.join(record['metrics']) or 'empty'}. Run it again with evaluation.")  # fmt: skip
    values = record["metrics"][metric]
    if values is not None and not isinstance(values, dict):
        return f'holds {values!r} as {metric}, instead of {{"plain": ..., "compressed": ...}}. Run it again.'
    for variant, value in (values or {}).items():
        if not is_number(value):
            return f"holds {value!r} as {variant} {metric}, which is no number. Run it again."
    for channel in record.get("compression") or ():
        if not isinstance(channel, dict):
            return f"holds {channel!r} in the compression of {record['codec']}. Run it again."
        missing = [column for column in COLUMNS_NEEDED if channel.get(column) is None]
        if missing:
            return (f"has no column {', '.join(missing)} in the compression of {record['codec']}; each boundary and "
                    f"direction needs {', '.join(COLUMNS_NEEDED)}. Run it again.")  # fmt: skip
        sizes = (channel["raw_bytes"], channel["payload_bytes"])
        if not all(isinstance(size, int | float) for size in sizes) or not is_number(channel.get("rel_error")):
            return f"holds what is no number in the compression of {record['codec']}: {channel}. Run it again."
    for entry in record.get("history") or ():
        usable = isinstance(entry, dict) and ("loss" not in entry or (
            is_number(entry["loss"]) and isinstance(entry.get("step"), int | float)))  # fmt: skip
        if not usable:
            return f"holds {entry!r} in its history, which is no log line. Run it again."
    return None


def is_number(value: Any) -> bool:
    """Also None, and NaN and infinities as the strings that a record has for them."""
    if isinstance(value, str):
        return value in ("nan", "inf", "-inf")
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def number(value: Any) -> float | None:
    """A number of a record, in which "nan", "inf" and "-inf" are strings; None where it was not measured."""
    return None if value is None else float(value)
