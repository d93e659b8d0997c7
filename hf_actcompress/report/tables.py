"""Result records become tables: means over seeds, compression ratios, and the distance to training without.

Reads the JSONs that the recipes and benchmarks/accuracy.py write; knows no torch, no codec and no model.  The command
that uses it is `hf-actcompress report`.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Row = dict[str, Any]

METRICS = {"cola": "matthews_correlation"}  # all other tasks: accuracy
PERCENT = {"accuracy"}
BEGIN, END = "<!-- generated: accuracy -->", "<!-- end: accuracy -->"
# What must agree between the runs of a task, or the comparison would be one of settings.
SETTINGS = ("model", "data", "epochs", "batch_size", "learning_rate", "dtype", "image_size")
CUTS = ("first", "last", "placement")
COLUMNS_NEEDED = ("direction", "raw_bytes", "payload_bytes")


def load_records(folder: str | os.PathLike[str]) -> list[Record]:
    """Every record in the JSON files of `folder` and its sub-folders, in the order of their paths.

    A file holds one record, or several under "runs".  Beside and below the results.json of a recipe nothing else is
    looked at: there lie the model, its tokenizer and checkpoints.
    Raises ValueError, with the file's name, for a folder without records and a file that is empty, cut off or of
    another kind.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"There is no folder {root}: give the one that holds the results, such as outputs/demo.")
    paths = sorted(path for path in root.rglob("*.json") if path.name == "results.json" or not _of_a_run(path, root))
    if not paths:
        raise ValueError(f"{root} holds no JSON file: run a recipe or benchmarks/accuracy.py first.")
    return [record for path in paths for record in read_records(path)]


def _of_a_run(path: Path, root: Path) -> bool:
    folders = [path.parent, *path.parent.parents]
    return any((folder / "results.json").is_file() for folder in folders[: folders.index(root) + 1])


def read_records(path: Path) -> list[Record]:
    """The records of one file."""
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"{path} is empty: delete it and run that result again.")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}): delete it and run that result again.") from None
    records = content["runs"] if isinstance(content, dict) and isinstance(content.get("runs"), list) else [content]
    for record in records:
        missing = [key for key in ("task", "codec", "metrics") if not isinstance(record, dict) or key not in record]
        if missing:
            raise ValueError(f"{path} is no result record: it has no {', '.join(missing)}. Move it elsewhere.")
        for channel in record.get("compression") or ():
            missing = [column for column in COLUMNS_NEEDED if column not in channel]
            if missing:
                raise ValueError(f"{path}: the compression of {record['codec']} has no column {', '.join(missing)}; "
                                 f"each boundary and direction needs {', '.join(COLUMNS_NEEDED)}. Run it again.")
        metric = METRICS.get(record["task"], "accuracy")
        if not isinstance(record["metrics"], dict) or metric not in record["metrics"]:
            raise ValueError(f"{path}: the metrics of {record['task']} have no {metric}; they have "
                             f"{', '.join(record['metrics']) or 'none'}. Run it again with evaluation.")
    return records


# The table


def accuracy_table(records: Iterable[Record]) -> list[Row]:
    """One row per (task, codec, grad_codec), by task and rising forward ratio; `none` comes first.

    A row has `metric` (its name), `seeds`, `compressed` and `plain` (means of evaluation with and without
    compression, None where it was not measured), `compressed_std` and `plain_std` (sample deviations, None for one
    seed), `ratio` and `grad_ratio` (bytes before over bytes after, summed over boundaries and seeds; against fp32
    where the runs are in fp32), `rel_error` (forward, mean over boundaries and seeds), `drop` (mean of `none` minus
    mean of this row) and `drop_stds` (the drop in standard deviations of `none`).

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
        none = base.get(row["task"], {})
        mean, std = none.get("plain"), none.get("plain_std")
        if row["codec"] != "none" and mean is not None and row["compressed"] is not None:
            row["drop"] = mean - row["compressed"]
            row["drop_stds"] = row["drop"] / std if std else None
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    return sorted(rows, key=lambda row: (tasks.index(row["task"]), row["codec"] != "none", row["ratio"] or 0.0))


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
        found = (_number((record["metrics"].get(metric) or {}).get(variant)) for record in group)
        row[variant], row[f"{variant}_std"] = _mean_std([value for value in found if value is not None])
    channels = [channel for record in group for channel in record.get("compression") or ()]
    forward = [channel for channel in channels if channel["direction"] == "forward"]
    errors = [_number(channel["rel_error"]) for channel in forward if channel.get("rel_error") is not None]
    row["ratio"] = 1.0 if codec == "none" else _ratio(forward)
    row["grad_ratio"] = 1.0 if codec == "none" else _ratio([c for c in channels if c["direction"] == "backward"])
    return {**row, "rel_error": _mean_std(errors)[0], "drop": None, "drop_stds": None}


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


def _mean_std(values: list[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _number(value: Any) -> float | None:
    return None if value is None else float(value)  # "nan" and "inf" are strings in a record


# As text


def show(value: Any, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def mean_std(variant: str, scale: float = 1.0, digits: int = 3) -> Callable[[Row], str]:
    """A column "mean ± std" of `variant`."""

    def text(row: Row) -> str:
        mean, std = row[variant], row[f"{variant}_std"]
        if mean is None:
            return "-"
        return f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if std is not None else "")

    return text


COLUMNS: dict[str, str | Callable[[Row], str]] = {
    "forward": "codec",
    "backward": lambda row: "same" if row["grad_codec"] == row["codec"] != "none" else row["grad_codec"],
    "seeds": "seeds",
    "compressed": mean_std("compressed"),
    "plain": mean_std("plain"),
    "drop": "drop",
    "in std": lambda row: show(row["drop_stds"], 1),
    "ratio": lambda row: show(row["ratio"], 2),
    "backward ratio": lambda row: show(row["grad_ratio"], 2),
    "rel. error": "rel_error",
}


def markdown_table(rows: Sequence[Row], columns: Mapping[str, str | Callable[[Row], str]] = COLUMNS) -> str:
    """A Markdown table; `columns` maps each heading to a key of the rows, or to a function of a row.

    Columns whose every cell is a number (or "-") are aligned to the right.
    """
    cells = [[show(row[get]) if isinstance(get, str) else get(row) for get in columns.values()] for row in rows]
    right = [all(cell[:1] in "-+0123456789" for cell in column) for column in zip(*cells, strict=True)]
    lines = [list(columns), ["---:" if number else "---" for number in right or [False] * len(columns)], *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def accuracy_section(records: Sequence[Record], figures: Mapping[str, str] | None = None) -> str:
    """The Markdown of a results page: one table per task, with its settings; `figures` maps titles to links."""
    rows, parts = accuracy_table(records), []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        record = next(record for record in records if record["task"] == task)
        config = next((r["config"] for r in records if r["task"] == task and r.get("config")), None)
        settings = settings_of(record)
        if config:
            settings.append(f"first {config['first']}, last {config['last']}, placement {config['placement']}")
        parts += [f"### {task}", f"{own[0]['metric']}; {', '.join(settings)}.", markdown_table(own)]
    for title, link in (figures or {}).items():
        parts.append(f"![{title}]({link})")
    known = [record["environment"] for record in records if record.get("environment")]
    machines = {", ".join(f"{key} {value}" for key, value in sorted(e.items()) if value is not None) for e in known}
    legend = (
        "compressed and plain: evaluation with and without compression, mean ± sample standard deviation over seeds. "
        "drop: mean of `none` minus mean of compressed; in std: in standard deviations of `none`. ratio: bytes of the "
        "uncompressed activations over bytes of the payloads, all boundaries together. rel. error: of the forward "
        "activations, |y - x| / |x|."
    )
    return "\n\n".join([*parts, legend, *(f"Environment: {machine}." for machine in sorted(machines))])


def settings_of(record: Record) -> list[str]:
    """What a run was, in words, without codec, cuts and seed."""
    settings = [f"{record.get('model')}", f"{record.get('data')}", f"{record.get('epochs') or 0:g} epochs",
                f"batch {record.get('batch_size')}", f"learning rate {record.get('learning_rate') or 0:g}",
                f"{record.get('dtype')}"]  # fmt: skip
    if record.get("image_size"):
        settings.insert(2, f"{record['image_size']} pixels")
    return settings


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
