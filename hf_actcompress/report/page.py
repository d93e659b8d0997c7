"""The page: sections by task, tables of ours beside theirs, and the configuration of every run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from . import plots
from .charts import Point, Series, curves, legend, scatter
from .comparison import drop_text, ours_text, records_of, speed_text
from .tables import PERCENT, Record, Row, accuracy_table, codecs_of, mean_std, settings_of, show

# As in plots.STYLES; what is too dark for a dark page is lighter there.
DARK = {"uniform": "#4FA8E0", "block": "#F08A4B", "sort": "#33C29A", "kmeans": "#DE9CC0", "topk": "#F0B93A",
        "lowrank": "#7CC6F2", "float8": "#C9A94F", "identity": "#A5A5A5", "none": "#D0D0D0", "other": "#A5A5A5"}
# As text on white they are darker, for contrast.
INK = {"uniform": "#00527F", "block": "#994400", "sort": "#006F50", "kmeans": "#8F4470", "topk": "#7A5400",
       "lowrank": "#1F6F9C", "float8": "#5B4500", "identity": "#555555", "none": "#333333", "other": "#555555"}


def build_page(records: Sequence[Record], comparisons: Sequence[Mapping[str, Any]] = (),
               title: str = "Activation compression: results") -> str:
    """One HTML file as text; it loads nothing.  `comparisons` are of comparison.load_comparison.

    Raises ValueError without records and where the runs of a task do not compare (report.accuracy_table).
    """
    if not records and not comparisons:
        raise ValueError("There is nothing to show: no records were given.")
    rows = accuracy_table(records)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    everything = records_of([{"records": records}, *comparisons])
    sections = [_task(task, [row for row in rows if row["task"] == task],
                      [record for record in records if record["task"] == task]) for task in tasks]  # fmt: skip
    links = [(f"task-{task}", task) for task in tasks]
    if comparisons:
        sections.append('<section id="theirs"><h2>Ours beside theirs</h2>' + "".join(map(_comparison, comparisons))
                        + "</section>")  # fmt: skip
        links.append(("theirs", "Ours beside theirs"))
    sections.append(_runs(everything))
    links.append(("runs", "Runs"))
    navigation = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links)
    parts = {"title": escape(title), "css": _asset("page.css").replace("/* colours */", _colours()),
             "js": _asset("page.js"), "nav": navigation, "lead": _lead(rows, everything),
             "body": "\n".join(sections), "footer": _environment(everything)}  # fmt: skip
    page = _asset("page.html")
    for name, text in parts.items():
        page = page.replace(f"<!-- {name} -->", text)
    return page


# Sections


def _lead(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """A card per task: how far activations can be compressed within one deviation of none."""
    cards = []
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        none = next((row for row in own if row["codec"] == "none"), None)
        within = [row for row in own if row["codec"] != "none" and row["drop"] is not None and row["ratio"]
                  and row["drop"] <= (none["plain_std"] or 0.0)] if none else []  # fmt: skip
        best = max(within, key=lambda row: row["ratio"], default=None)
        loss = "at most one standard deviation" if none and none["plain_std"] else "nothing"
        name = own[0]["metric"].replace("_", " ")
        if best:
            codec = f"<code>{escape(plots.full_name(best['codec']))}</code>"
            text = (f"<b>{best['ratio']:.1f}×</b><span>smaller activations with {codec}, and {loss} of {escape(name)} "
                    "lost</span>")  # fmt: skip
        else:
            text = "<b>–</b><span>No codec here keeps what training without compression reaches.</span>"
        cards.append(f'<a class="card" href="#task-{task}"><h3>{escape(task)}</h3><p>{text}</p></a>')
    codecs = len({codecs_of(record) for record in records if record["codec"] != "none"})
    about = f"{len(records)} training runs, {codecs} codecs or pairs of codecs."
    return f'<p class="about">{about}</p><div class="cards">{"".join(cards)}</div>'


def _task(task: str, rows: Sequence[Row], records: Sequence[Record]) -> str:
    metric = _metric_name(rows[0])
    config = next((record["config"] for record in records if record.get("config")), None)
    settings = settings_of(records[0])
    if config:
        settings.append(f"first {config['first']}, last {config['last']}, placement {config['placement']}")
    parts = [f'<section id="task-{task}"><h2>{escape(task)}</h2><p class="settings">{escape(", ".join(settings))}</p>',
             '<div class="charts">']  # fmt: skip
    points = [_point(row) for row in rows if row["codec"] != "none" and row["ratio"] and _finite(row["compressed"])]
    none = next((row for row in rows if row["codec"] == "none" and _finite(row["plain"])), None)
    scale = 100 if rows[0]["metric"] in PERCENT else 1
    if points:
        base = (scale * none["plain"], scale * none["plain_std"] if none["plain_std"] else None) if none else None
        families = dict.fromkeys(point.family for point in points)
        parts.append(_figure(
            f"{metric} against compression", scatter(
                points, title=f"{task}: {metric} against the forward compression ratio",
                x_name="forward compression ratio (log scale)", y_name=metric, base=base, least=0.05 * scale,
            ), legend([(name, name) for name in families])))  # fmt: skip
    series = _loss_series(rows, records)
    if series:
        parts.append(_figure("Training loss", curves(series, title=f"{task}: training loss", x_name="step",
                                                     y_name="training loss"),
                             legend([(s.family, s.name) for s in series])))  # fmt: skip
    parts += ["</div>", _table(_columns(rows[0]), rows, caption=f"{task}: {metric}, every codec"), "</section>"]
    return "".join(parts)


def _comparison(comparison: Mapping[str, Any]) -> str:
    rows = comparison["rows"]
    columns: list[Column] = [("row", lambda r: r["label"], lambda r: r["label"])]
    if len({row["task"] for row in rows}) > 1:
        columns.append(("task", lambda r: r["task"], lambda r: r["task"]))
    for name in dict.fromkeys(name for row in rows for name in row["theirs"]):
        columns.append((f"theirs: {name}", lambda r, n=name: r["theirs"].get(n, "-"),
                        lambda r, n=name: _leading(r["theirs"].get(n, ""))))  # fmt: skip
    columns += [
        ("ours", ours_text, lambda r: (r["ours"] or {}).get("value")),
        ("drop", lambda r: drop_text(r["ours"]), lambda r: (r["ours"] or {}).get("drop")),
        ("ratio", lambda r: show((r["ours"] or {}).get("ratio"), 2), lambda r: (r["ours"] or {}).get("ratio")),
    ]
    if any(row["speed"] for row in rows):
        columns.append(("ours: speed over none", speed_text, lambda r: (r["speed"] or {}).get("of_none")))
    notes = [f"Theirs: {comparison['theirs']}.", f"Ours: {'; '.join(comparison['settings']) or 'no runs yet'}.",
             comparison.get("differs") or "", comparison["speed"]]  # fmt: skip
    done = sum(row["ours"] is not None for row in rows)
    if done < len(rows):
        notes.append(f"{done} of {len(rows)} rows are run.")
    return (f'<h3>{escape(comparison["title"])}</h3><p class="settings">{escape(" ".join(notes))}</p>'
            + _table(columns, rows, caption=comparison["title"]))  # fmt: skip


def _runs(records: Sequence[Record]) -> str:
    items = []
    for record in records:
        codec, grad = codecs_of(record)
        metrics = {name: value for name, value in record["metrics"].items() if isinstance(value, Mapping)}
        values = ", ".join(f"{name.replace('_', ' ')} {kind} {show(_float(value))}" for name, kinds in metrics.items()
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


def _environment(records: Iterable[Record]) -> str:
    known = {", ".join(f"{key} {value}" for key, value in sorted(record["environment"].items()) if value is not None)
             for record in records if record.get("environment")}  # fmt: skip
    return "".join(f"<p>{escape(text)}</p>" for text in sorted(known))


# Pieces

Column = tuple[str, Callable[[Any], str], Callable[[Any], Any]]  # heading, text, and what is sorted by


def _columns(row: Row) -> list[Column]:
    scale, digits = (100, 1) if row["metric"] in PERCENT else (1, 3)

    def mean(variant: str) -> Callable[[Row], str]:
        return lambda r: mean_std(variant, scale, digits)(r)

    def drop(r: Row) -> str:
        return "-" if r["drop"] is None else f"{scale * r['drop']:.{digits}f}"

    backward = lambda r: "same" if r["grad_codec"] == r["codec"] != "none" else r["grad_codec"]  # noqa: E731
    return [("forward", lambda r: r["codec"], lambda r: r["codec"]), ("backward", backward, backward),
            ("seeds", lambda r: str(r["seeds"]), lambda r: r["seeds"]),
            ("compressed", mean("compressed"), lambda r: r["compressed"]),
            ("plain", mean("plain"), lambda r: r["plain"]), ("drop", drop, lambda r: r["drop"]),
            ("in std", lambda r: show(r["drop_stds"], 1), lambda r: r["drop_stds"]),
            ("ratio", lambda r: show(r["ratio"], 2), lambda r: r["ratio"]),
            ("backward ratio", lambda r: show(r["grad_ratio"], 2), lambda r: r["grad_ratio"]),
            ("rel. error", lambda r: show(r["rel_error"]), lambda r: r["rel_error"])]  # fmt: skip


def _table(columns: Sequence[Column], rows: Sequence[Any], caption: str) -> str:
    head, body = [], []
    # A column of numbers is aligned to the right; its cells tell what to sort by.
    number = [all(isinstance(key(row), int | float | None) for row in rows) for _, _, key in columns]
    for (name, _, _), right in zip(columns, number, strict=True):
        head.append(f'<th scope="col"{_number(right)}><button type="button">{escape(name)}</button></th>')
    for row in rows:
        cells = []
        for i, ((_, text, key), right) in enumerate(zip(columns, number, strict=True)):
            value = key(row)
            data = "" if value is None or value != value else f' data-v="{escape(str(value), quote=True)}"'
            words = text(row)
            shown = f"<code>{_breakable(words)}</code>" if ":" in words else escape(words)
            tag = 'th scope="row"' if i == 0 else "td"
            cells.append(f"<{tag}{_number(right)}{data}>{shown}</{tag.split()[0]}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}"><table>'
            f"<caption>{escape(caption)}</caption><thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(body)}"
            "</tbody></table></div>")  # fmt: skip


def _number(right: bool) -> str:
    return ' class="number"' if right else ""


def _breakable(spec: str) -> str:
    """Lines may end after a comma."""
    return escape(spec).replace(",", ",<wbr>")


def _figure(caption: str, charts: str, key: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{charts}{key}</figure>"


def _point(row: Row) -> Point:
    scale, digits = (100, 1) if row["metric"] in PERCENT else (1, 3)
    lines = [("codec", row["codec"]), ("backward", "same" if row["grad_codec"] == row["codec"] else row["grad_codec"]),
             (_metric_name(row), mean_std("compressed", scale, digits)(row)), ("ratio", f"{row['ratio']:.2f}×")]
    if row["drop"] is not None:
        lines.append(("drop", f"{scale * row['drop']:.{digits}f}"))
    if row["rel_error"] is not None:
        lines.append(("rel. error", f"{row['rel_error']:.3f}"))
    spread = scale * row["compressed_std"] if row["compressed_std"] else None
    return Point(row["ratio"], scale * row["compressed"], plots.family(row["codec"]), plots.full_name(row["codec"]),
                 lines, spread)  # fmt: skip


def _loss_series(rows: Sequence[Row], records: Sequence[Record]) -> list[Series]:
    """None, then the codec of each family that compresses most, as in plots.loss_curves."""
    result = []
    for name, group in plots.chosen_curves(records, rows):
        steps, losses = plots.mean_curve(group)
        if steps:
            codec = group[0]["codec"]
            text = "no compression" if codec == "none" else plots.full_name(name)
            result.append(Series(text, plots.family(codec), list(zip(steps, losses, strict=True)), codec == "none"))
    return result


def _metric_name(row: Row) -> str:
    return row["metric"].replace("_", " ") + (", %" if row["metric"] in PERCENT else "")


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _float(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _leading(text: str) -> float | None:
    """The number that a figure of theirs begins with."""
    word = text.split(" ")[0]
    try:
        return float(word)
    except ValueError:
        return None


def _colours() -> str:
    def rules(colours: Mapping[str, str], ink: Mapping[str, str]) -> str:
        return "".join(f".s-{name}{{--c:{colours[name]};--ink:{ink[name]}}}" for name in DARK)

    light = {name: style[0] for name, style in plots.STYLES.items()} | {"other": plots.OTHER[0]}
    return f"{rules(light, INK)}@media (prefers-color-scheme:dark){{{rules(DARK, DARK)}}}"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
