"""Result records become tables: means over seeds, compression ratios, and the distance to training without.

Reads the JSON files that the recipes and benchmarks/accuracy.py write.  The command that uses it is
`hf-actcompress report`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .style import PERCENT

Record = dict[str, Any]
Row = dict[str, Any]

METRICS = {"cola": "matthews_correlation"}  # all other tasks: accuracy
BEGIN, END = "<!-- generated: accuracy -->", "<!-- end: accuracy -->"
# What must agree between the runs of a task, or the comparison would be one of settings.
SETTINGS = ("model", "data", "epochs", "batch_size", "learning_rate", "dtype", "image_size")
CUTS = ("first", "last", "placement")
# What a record may hold: the type of each entry that is read, and those that are needed.
TYPES: dict[str, tuple[type, ...]] = {
    "task": (str,), "codec": (str,), "metrics": (dict,), "seed": (int, str), "config": (dict,), "history": (list,),
    "compression": (list,), "environment": (dict,), "epochs": (int, float), "learning_rate": (int, float),
}  # fmt: skip
NEEDED = ("task", "codec", "metrics")
COLUMNS_NEEDED = ("direction", "raw_bytes", "payload_bytes")


# Reading


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
    metric = METRICS.get(record["task"], "accuracy")
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


# The table


class Values(NamedTuple):
    """What several seeds found."""

    mean: float | None  # of the finite values; NaN if all runs diverged, None if nothing was measured
    std: float | None  # sample deviation; None for fewer than two values
    diverged: int  # values that are NaN or infinite
    missing: int  # seeds without a value, where others have one


def summarize_values(values: Iterable[Any]) -> Values:
    found = [number(value) for value in values]
    finite = [value for value in found if value is not None and math.isfinite(value)]
    diverged = sum(value is not None and not math.isfinite(value) for value in found)
    mean = statistics.fmean(finite) if finite else math.nan if diverged else None
    std = statistics.stdev(finite) if len(finite) > 1 else None
    return Values(mean, std, diverged, sum(value is None for value in found) if finite or diverged else 0)


def accuracy_table(records: Iterable[Record]) -> list[Row]:
    """One row per (task, codec, grad_codec), by task and rising forward ratio; `none` comes first.

    A row has `metric` (its name), `seeds`, `compressed` and `plain` (means of evaluation with and without
    compression over the seeds that did not diverge; NaN where all did, None where it was not measured),
    `compressed_std` and `plain_std` (sample deviations, None for one seed), `compressed_diverged` and
    `plain_diverged` (seeds whose metric is NaN or infinite), `compressed_missing` and `plain_missing` (seeds without
    a metric, where others have one), `ratio` and `grad_ratio` (bytes before over bytes after, summed over boundaries
    and seeds; against fp32 where the runs are in fp32), `rel_error` (forward, mean over boundaries and seeds), `drop`
    (mean of `none` minus mean of this row; None where a seed of either diverged or has no metric, since a mean of the
    others would hide that) and `drop_stds` (the drop in standard deviations of `none`).

    Raises ValueError where the runs of a task differ in more than codec and seed, or one seed appears twice.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], *codecs_of(record)), []).append(record)
    for task in {key[0] for key in groups}:
        _check_settings(task, [record for key, group in groups.items() if key[0] == task for record in group])
    rows = [summarize(group) for group in groups.values()]
    base = {row["task"]: row for row in rows if row["codec"] == "none"}
    for row in rows:
        if row["codec"] != "none":
            row["drop"], row["drop_stds"] = drop_against(base.get(row["task"]), row)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(rows, key=lambda row: (tasks.index(row["task"]), row["codec"] != "none", row["ratio"] or 0.0))


def drop_against(none: Row | None, row: Row) -> tuple[float | None, float | None]:
    """What is lost against the row without compression, and the same in its standard deviations."""
    if none is None or not complete(none, "plain") or not complete(row, "compressed"):
        return None, None
    drop = none["plain"] - row["compressed"]
    return drop, drop / none["plain_std"] if none["plain_std"] else None


def complete(row: Row, variant: str) -> bool:
    """Whether every seed of the row has a finite metric."""
    return row[variant] is not None and not row[f"{variant}_diverged"] and not row[f"{variant}_missing"]


def codecs_of(record: Record) -> tuple[str, str]:
    """(codec, grad_codec) of a record; a gradient codec that is not given is the forward one."""
    codec = record["codec"]
    return codec, (record.get("config") or {}).get("grad_codec") or codec


def summarize(group: Sequence[Record]) -> Row:
    """The row of runs that differ in their seeds alone; without the drop, which needs those without compression."""
    task, (codec, grad_codec) = group[0]["task"], codecs_of(group[0])
    seeds = [record.get("seed") for record in group]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{task}, {codec}, {grad_codec}: the seeds {seeds} are not all different; keep one run each.")
    metric = METRICS.get(task, "accuracy")
    row: Row = {"task": task, "codec": codec, "grad_codec": grad_codec, "seeds": len(group), "metric": metric}
    for variant in ("compressed", "plain"):
        values = summarize_values(((record.get("metrics") or {}).get(metric) or {}).get(variant) for record in group)
        row[variant], row[f"{variant}_std"], row[f"{variant}_diverged"], row[f"{variant}_missing"] = values
    channels = [channel for record in group for channel in record.get("compression") or ()]
    forward = [channel for channel in channels if channel["direction"] == "forward"]
    row["ratio"] = 1.0 if codec == "none" else _ratio(forward)
    row["grad_ratio"] = 1.0 if codec == "none" else _ratio([c for c in channels if c["direction"] == "backward"])
    errors = summarize_values(channel["rel_error"] for channel in forward if channel.get("rel_error") is not None)
    return {**row, "rel_error": errors.mean, "drop": None, "drop_stds": None}


def _check_settings(task: str, group: list[Record]) -> None:
    compressed = [record for record in group if record.get("config")]
    settings = [(name, group) for name in SETTINGS] + [(name, [r["config"] for r in compressed]) for name in CUTS]
    for name, holders in settings:
        values = {str(holder.get(name)) for holder in holders}
        if len(values) > 1:
            raise ValueError(f"The runs of {task} differ in {name} ({', '.join(sorted(values))}): a table would "
                             "compare more than codecs. Put them into folders of their own and report each.")


def _ratio(channels: list[Mapping[str, Any]]) -> float | None:
    payload = sum(channel["payload_bytes"] for channel in channels)
    return sum(channel["raw_bytes"] for channel in channels) / payload if payload else None


# As text


class Column(NamedTuple):
    """A column of a table of rows: its heading, the text of a cell, and the value that the page sorts by."""

    name: str
    text: Callable[[Any], str]
    value: Callable[[Any], Any]


def show(value: Any, digits: int = 3) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if math.isfinite(value) else "diverged" if math.isnan(value) else str(value)
    return str(value)


def show_mean(row: Row, variant: str, scale: float = 1.0, digits: int = 3) -> str:
    """ "mean ± std" of a variant over the seeds, and how many of them diverged."""
    mean, std = row[variant], row[f"{variant}_std"]
    if mean is None:
        return "-"
    words = [f"{row[f'{variant}_{what}']} of {row['seeds']} {what}" for what in ("diverged", "missing")
             if row[f"{variant}_{what}"]]  # fmt: skip
    if not math.isfinite(mean):
        return ", ".join(words)
    text = f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std is not None else "")
    return f"{text} ({', '.join(words)})" if words else text


def scale_of(metric: str) -> tuple[int, int]:
    """The factor and the digits with which the page and the tables beside others' figures show a metric."""
    return (100, 1) if metric in PERCENT else (1, 3)


def accuracy_columns(scale: float = 1.0, digits: int = 3) -> list[Column]:
    """The columns of `accuracy_table`; `scale` and `digits` are of the metric."""

    def backward(row: Row) -> str:
        return "same" if row["grad_codec"] == row["codec"] != "none" else row["grad_codec"]

    def measured(name: str, key: str, digits: int = 3, scale: float = 1.0) -> Column:
        return Column(name, lambda row: show(None if row[key] is None else scale * row[key], digits),
                      lambda row: row[key])  # fmt: skip

    return [
        Column("forward", lambda row: row["codec"], lambda row: row["codec"]), Column("backward", backward, backward),
        Column("seeds", lambda row: str(row["seeds"]), lambda row: row["seeds"]),
        Column("compressed", lambda row: show_mean(row, "compressed", scale, digits), lambda row: row["compressed"]),
        Column("plain", lambda row: show_mean(row, "plain", scale, digits), lambda row: row["plain"]),
        measured("drop", "drop", digits, scale), measured("in std", "drop_stds", 1), measured("ratio", "ratio", 2),
        measured("backward ratio", "grad_ratio", 2), measured("rel. error", "rel_error"),
    ]  # fmt: skip


def plain_text(text: Any) -> str:
    """Text in one line that Markdown takes for nothing but text: no HTML, no cell border."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def markdown_table(rows: Sequence[Row], columns: Sequence[Column] | None = None) -> str:
    """A Markdown table (default: of `accuracy_table`).

    Columns whose every cell is a number (or "-") are aligned to the right.
    """
    columns = accuracy_columns() if columns is None else columns
    cells = [[plain_text(column.text(row)) for column in columns] for row in rows]
    right = [all(cell[:1] in "-+0123456789" for cell in column) for column in zip(*cells, strict=True)]
    heads = [plain_text(column.name) for column in columns]
    lines = [heads, ["---:" if number else "---" for number in right or [False] * len(columns)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LEGEND = (
    "compressed and plain: evaluation with and without compression, mean ± sample standard deviation over seeds. "
    "drop: mean of `none` minus mean of compressed; in std: in standard deviations of `none`. ratio: bytes of the "
    "uncompressed activations over bytes of the payloads, all boundaries together. rel. error: of the forward "
    "activations, |y - x| / |x|."
)
DIVERGED = (
    "diverged: seeds whose metric is NaN or infinite; missing: seeds without it. Means are those of the other seeds, "
    "and no drop is computed."
)


class Section(NamedTuple):
    """The table of one task."""

    task: str
    about: str  # metric and settings, in words
    rows: list[Row]


def accuracy_sections(records: Sequence[Record]) -> list[Section]:
    rows = accuracy_table(records)
    sections = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        settings = settings_of([record for record in records if record["task"] == task])
        sections.append(Section(task, f"{own[0]['metric']}; {settings}.", own))
    return sections


def legend_of(rows: Iterable[Row]) -> str:
    unusual = ("compressed_diverged", "compressed_missing", "plain_diverged", "plain_missing")
    return f"{LEGEND} {DIVERGED}" if any(row[key] for row in rows for key in unusual) else LEGEND


def accuracy_section(records: Sequence[Record], figures: Mapping[str, str] | None = None) -> str:
    """The Markdown of a results page: one table per task, with its settings; `figures` maps titles to links."""
    parts, sections = [], accuracy_sections(records)
    for task, about, rows in sections:
        parts += [f"### {plain_text(task)}", plain_text(about), markdown_table(rows)]
    parts += [f"![{plain_text(title)}]({link})" for title, link in (figures or {}).items()]
    parts.append(legend_of(row for section in sections for row in section.rows))
    return "\n\n".join([*parts, *(f"Environment: {plain_text(machine)}." for machine in environments(records))])


def environments(records: Iterable[Record]) -> list[str]:
    """The machines of the runs, in words, each once."""
    known = [record["environment"] for record in records if record.get("environment")]
    return sorted({", ".join(f"{k} {v}" for k, v in sorted(each.items()) if v is not None) for each in known})


def settings_of(records: Sequence[Record], cuts: bool = True) -> str:
    """What the runs of a task were, in words, without codec and seed; with the cuts where a run has any."""
    record, config = records[0], next((record["config"] for record in records if record.get("config")), None)
    settings = [f"{record.get('model')}", f"{record.get('data')}", f"{record.get('epochs') or 0:g} epochs",
                f"batch {record.get('batch_size')}", f"learning rate {record.get('learning_rate') or 0:g}",
                f"{record.get('dtype')}"]  # fmt: skip
    if record.get("image_size"):
        settings.insert(2, f"{record['image_size']} pixels")
    if config and cuts:
        settings.append(", ".join(f"{name} {config.get(name)}" for name in CUTS))
    return ", ".join(settings)


def write_results_page(
    page: str | os.PathLike[str],
    records: Sequence[Record] = (),
    figures: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    text: str | None = None,
    markers: tuple[str, str] = (BEGIN, END),
) -> None:
    """Replace what stands between the markers in the Markdown file `page`: by `text`, or the section of the records.

    figures: titles and image files.
    Raises ValueError if there is no such file, or not exactly one pair of markers in it.
    """
    path, (begin, end) = Path(page), markers
    lines = f"\n{begin}\n{end}\n"
    if not path.is_file():
        raise ValueError(f"There is no page {path}. Make one that holds these two lines:{lines}")
    old = path.read_text(encoding="utf-8")
    if (old.count(begin), old.count(end)) != (1, 1) or old.index(begin) > old.index(end):
        raise ValueError(f"{path} does not hold these two lines once each, in this order:{lines}")
    links = {title: Path(os.path.relpath(file, path.parent)).as_posix() for title, file in (figures or {}).items()}
    new = accuracy_section(records, links) if text is None else text
    before, after = old[: old.index(begin)], old[old.index(end) :]
    path.write_text(f"{before}{begin}\n\n{new}\n\n{after}", encoding="utf-8")
