"""The page: sections by task, tables of ours beside published ones, and the configuration of every run.

What comes from records is text, never markup: everything goes through `escape`, also in attributes and ids.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from .charts import Point, Series, curves, legend, scatter
from .comparison import comparison_columns, comparison_notes, records_of
from .plots import chosen_curves, mean_curve
from .records import Record, is_number, number
from .style import NAMES, PERCENT, STYLES, family, label
from .tables import (
    Column,
    Row,
    Section,
    accuracy_columns,
    accuracy_sections,
    codecs_of,
    environments,
    legend_of,
    scale_of,
    show,
    show_mean,
)


def build_page(records: Sequence[Record], comparisons: Sequence[Mapping[str, Any]] = (),
               title: str = "Activation compression: results") -> str:
    """One HTML file as text; it loads nothing.  `comparisons` are of comparison.load_comparison.

    Raises ValueError without records and where the runs of a task do not compare (tables.accuracy_table).
    """
    if not records and not comparisons:
        raise ValueError("There is nothing to show: no records were given.")
    sections = accuracy_sections(records)
    everything = records_of([{"records": records}, *comparisons])
    anchors = _anchors([section.task for section in sections])
    body = [_task(section, anchors[section.task], [r for r in records if r["task"] == section.task])
            for section in sections]  # fmt: skip
    links = [(anchors[section.task], section.task) for section in sections]
    if comparisons:
        body.append('<section id="theirs"><h2>Ours beside theirs</h2>' + "".join(map(_comparison, comparisons))
                    + "</section>")  # fmt: skip
        links.append(("theirs", "Ours beside theirs"))
    body.append(_runs(everything))
    links.append(("runs", "Runs"))
    notes = [legend_of(row for section in sections for row in section.rows), *environments(everything)]
    parts = {
        "title": escape(title), "js": _asset("page.js"),
        "css": _asset("page.css").replace("/* colours */", _colours()),
        "nav": "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links),
        "lead": _lead(sections, anchors, everything), "body": "\n".join(body),
        "footer": "".join(f"<p>{escape(note.replace('`', ''))}</p>" for note in notes),
    }  # fmt: skip
    return re.sub(r"<!-- (\w+) -->", lambda match: parts[match[1]], _asset("page.html"))


def _anchors(tasks: Sequence[str]) -> dict[str, str]:
    """An id for each task: its name, without what an id or a link cannot hold, and never one id twice."""
    anchors: dict[str, str] = {}
    for task in tasks:
        anchor = base = "task-" + re.sub(r"[^A-Za-z0-9_-]+", "-", task).strip("-")
        for again in range(2, len(tasks) + 2):
            if anchor not in anchors.values():
                break
            anchor = f"{base}-{again}"
        anchors[task] = anchor
    return anchors


# Sections


def _lead(sections: Sequence[Section], anchors: Mapping[str, str], records: Sequence[Record]) -> str:
    """A card per task: how far activations can be compressed within one deviation of none."""
    cards = []
    for task, _, rows in sections:
        none = next((row for row in rows if row["codec"] == "none"), None)
        std = none["plain_std"] if none else None
        within = [row for row in rows if row["codec"] != "none" and row["drop"] is not None and row["ratio"]
                  and row["drop"] <= (std or 0.0)]  # fmt: skip
        best = max(within, key=lambda row: row["ratio"], default=None)
        if best:
            lost = f"{'at most one standard deviation' if std else 'nothing'} of {_words(rows[0]['metric'])} lost"
            text = (f"<b>{best['ratio']:.1f}×</b><span>smaller activations with <code>{escape(label(best['codec']))}"
                    f"</code>, and {escape(lost)}</span>")  # fmt: skip
        else:
            text = "<b>–</b><span>No codec here keeps what training without compression reaches.</span>"
        cards.append(f'<a class="card" href="#{anchors[task]}"><h3>{escape(task)}</h3><p>{text}</p></a>')
    codecs = len({codecs_of(record) for record in records if record["codec"] != "none"})
    about = f"{len(records)} training runs, {codecs} codecs or pairs of codecs."
    return f'<p class="about">{about}</p><div class="cards">{"".join(cards)}</div>'


def _task(section: Section, anchor: str, records: Sequence[Record]) -> str:
    task, about, rows = section
    metric = _metric_name(rows[0])
    parts = [f'<section id="{anchor}"><h2>{escape(task)}</h2><p class="settings">{escape(about)}</p>',
             '<div class="charts">']  # fmt: skip
    points = [_point(row) for row in rows if row["codec"] != "none" and row["ratio"] and _finite(row["compressed"])]
    none = next((row for row in rows if row["codec"] == "none" and _finite(row["plain"])), None)
    scale = scale_of(rows[0]["metric"])[0]
    if points:
        base = (scale * none["plain"], scale * none["plain_std"] if none["plain_std"] else None) if none else None
        gone = [label(row["codec"]) for row in rows
                if row["compressed"] is not None and not _finite(row["compressed"])]
        note = f"Not drawn, since every seed diverged: {'; '.join(gone)}." if gone else ""
        families = dict.fromkeys(point.family for point in points)
        parts.append(_figure(
            f"{metric} against compression", scatter(
                points, title=f"{task}: {metric} against the forward compression ratio",
                x_name="forward compression ratio (log scale)", y_name=metric, base=base, least=0.05 * scale,
            ), legend([(name, NAMES.get(name, name)) for name in families]), note))  # fmt: skip
    series = _loss_series(rows, records)
    if series:
        parts.append(_figure("Training loss", curves(series, title=f"{task}: training loss", x_name="step",
                                                     y_name="training loss"),
                             legend([(s.family, s.name) for s in series])))  # fmt: skip
    columns = accuracy_columns(*scale_of(rows[0]["metric"]))
    parts += ["</div>", _table(columns, rows, caption=f"{task}: {metric}, every codec"), "</section>"]
    return "".join(parts)


def _comparison(comparison: Mapping[str, Any]) -> str:
    title = comparison["title"]
    return (f'<h3>{escape(title)}</h3><p class="settings">{escape(comparison_notes(comparison))}</p>'
            + _table(comparison_columns(comparison), comparison["rows"], caption=title))  # fmt: skip


def _runs(records: Sequence[Record]) -> str:
    items = []
    for record in records:
        codec, grad = codecs_of(record)
        metrics = {name: kinds for name, kinds in record["metrics"].items() if isinstance(kinds, Mapping)}
        values = ", ".join(f"{_words(name)} {kind} {_shown(value)}" for name, kinds in metrics.items()
                           for kind, value in kinds.items())  # fmt: skip
        kept = {key: value for key, value in record.items() if key not in ("history", "compression", "metrics")}
        configuration = escape(json.dumps(kept, indent=2, ensure_ascii=False, sort_keys=True))
        pair = codec if grad in (codec, "none") else f"{codec}, backward {grad}"
        items.append(
            f'<details class="run"><summary><b>{escape(record["task"])}</b> <code>{escape(pair)}</code> '
            f'<span>seed {escape(str(record.get("seed")))}</span></summary><p>{escape(values)}</p>'
            f"<pre>{configuration}</pre></details>"
        )
    return (f'<section id="runs"><h2>Runs and their configuration</h2><label class="find">Show runs whose text has '
            f'<input type="search" placeholder="block:bits=4" data-find=".run"></label><p class="count" '
            f'aria-live="polite"></p>{"".join(items)}</section>')  # fmt: skip


# Pieces


def _table(columns: Sequence[Column], rows: Sequence[Any], caption: str) -> str:
    head, body = [], []
    # A column of numbers is aligned to the right; its cells tell what to sort by.
    numbers = [all(isinstance(column.value(row), int | float | None) for row in rows) for column in columns]
    for column, right in zip(columns, numbers, strict=True):
        head.append(f'<th scope="col"{_number(right)}><button type="button">{escape(column.name)}</button></th>')
    for row in rows:
        cells = []
        for i, (column, right) in enumerate(zip(columns, numbers, strict=True)):
            value, words = column.value(row), column.text(row)
            known = value is not None and not (isinstance(value, float) and not math.isfinite(value))
            data = f' data-v="{escape(str(value))}"' if known else ""
            shown = f"<code>{_breakable(words)}</code>" if ":" in words else escape(words)
            tag = 'th scope="row"' if i == 0 else "td"
            cells.append(f"<{tag}{_number(right)}{data}>{shown}</{tag.split()[0]}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
            f"<caption>{escape(caption)}</caption><thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(body)}"
            "</tbody></table></div>")  # fmt: skip


def _number(right: bool) -> str:
    return ' class="number"' if right else ""


def _breakable(spec: str) -> str:
    """Lines may end after a comma."""
    return escape(spec).replace(",", ",<wbr>")


def _figure(caption: str, charts: str, key: str, note: str = "") -> str:
    note = f'<p class="settings">{escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{charts}{key}{note}</figure>"


def _point(row: Row) -> Point:
    scale, digits = scale_of(row["metric"])
    lines = [("codec", row["codec"]), ("backward", "same" if row["grad_codec"] == row["codec"] else row["grad_codec"]),
             (_metric_name(row), show_mean(row, "compressed", scale, digits)), ("ratio", f"{row['ratio']:.2f}×")]
    if row["drop"] is not None:
        lines.append(("drop", show(scale * row["drop"], digits)))
    if _finite(row["rel_error"]):
        lines.append(("rel. error", show(row["rel_error"])))
    spread = scale * row["compressed_std"] if row["compressed_std"] else None
    diverged = row["compressed_diverged"]
    name = label(row["codec"]) + (f" ({diverged} of {row['seeds']} diverged)" if diverged else "")
    return Point(row["ratio"], scale * row["compressed"], family(row["codec"]), name, lines, spread, bool(diverged))


def _loss_series(rows: Sequence[Row], records: Sequence[Record]) -> list[Series]:
    """None, then the codec of each family that compresses most, as in plots.loss_curves."""
    result = []
    for codec, group in chosen_curves(records, rows):
        steps, losses, note = mean_curve(group)
        if any(map(math.isfinite, losses)):
            result.append(Series(label(codec) + note, family(codec), list(zip(steps, losses, strict=True)),
                                 codec == "none"))  # fmt: skip
    return result


def _shown(value: Any) -> str:
    return show(number(value)) if is_number(value) else str(value)


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _metric_name(row: Row) -> str:
    return _words(row["metric"]) + (", %" if row["metric"] in PERCENT else "")


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _colours() -> str:
    rules = {name: f".s-{name}{{--c:{style.color};--ink:{style.ink}}}" for name, style in STYLES.items()}
    dark = {name: f".s-{name}{{--c:{style.dark};--ink:{style.dark}}}" for name, style in STYLES.items()}
    return f"{''.join(rules.values())}@media (prefers-color-scheme:dark){{{''.join(dark.values())}}}"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
