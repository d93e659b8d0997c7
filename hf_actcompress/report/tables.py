"""Result records become tables: means over seeds, compression ratios, and the distance to training without."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .records import Record, metric_of, number
from .style import PERCENT

Row = dict[str, Any]

BEGIN, END = "<!-- generated: accuracy -->", "<!-- end: accuracy -->"
# What must agree between the runs of a task, or the comparison would be one of settings.
SETTINGS = ("model", "data", "epochs", "batch_size", "learning_rate", "dtype", "image_size")
CUTS = ("first", "last", "placement")


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
    metric = metric_of(task)
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
