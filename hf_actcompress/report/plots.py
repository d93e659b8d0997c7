"""Result records become figures.  Like `report.py` it knows no torch; matplotlib is imported inside.

Figures are 1600 pixels wide, which a README shows at about half that: no text below 8 points.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .tables import PERCENT, Record, Row, accuracy_table, codecs_of

WIDTH, DPI = 8.0, 200
# Okabe and Ito's colours, which stay apart for colour-blind readers; the markers say the same once more.
STYLES = {
    "uniform": ("#0072B2", "o"), "block": ("#D55E00", "s"), "sort": ("#009E73", "^"), "kmeans": ("#CC79A7", "D"),
    "topk": ("#E69F00", "v"), "lowrank": ("#56B4E9", "P"), "float8": ("#7F6000", "X"), "identity": ("#888888", "*"),
    "none": ("#333333", "_"),
}  # fmt: skip
OTHER = ("#888888", "h")


def accuracy_vs_ratio(records_by_task: Mapping[str, Sequence[Record]], path: str | os.PathLike[str]) -> Path:
    """One panel per task: its metric under compression against the forward ratio; returns the PNG's path.

    The line is the mean of `none`, the band one sample standard deviation around it where there are several seeds;
    so are the error bars.  Raises ValueError without records.
    """
    tables = {task: accuracy_table(records) for task, records in records_by_task.items() if records}
    if not tables:
        raise ValueError("There is nothing to draw: no task has records.")
    most = max(len(rows) for rows in tables.values())
    columns = min(2, len(tables)) if most <= 10 else 1
    lines = -(-len(tables) // columns)
    figure, axes = _figure(lines, columns, 3.3 if columns == 1 else 3.6)
    for ax, (task, rows) in zip(axes, tables.items(), strict=False):
        _panel(ax, task, rows)
    families = {family(row["codec"]) for rows in tables.values() for row in rows} - {"none"}
    _legend(figure, [name for name in (*STYLES, "other") if name in families])
    return _save(figure, path)


def _panel(ax: Any, task: str, rows: list[Row]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    metric = rows[0]["metric"]
    scale = 100 if metric in PERCENT else 1
    none = next((row for row in rows if row["codec"] == "none" and row["plain"] is not None), None)
    if none is not None:
        color, mean = STYLES["none"][0], scale * none["plain"]
        ax.axhline(mean, color=color, linewidth=1.2, linestyle=(0, (5, 2)), zorder=1)
        if none["plain_std"]:
            spread = scale * none["plain_std"]
            ax.axhspan(mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0, zorder=0)
    points = [row for row in rows if row["ratio"] and row["compressed"] is not None and row["codec"] != "none"]
    for row in points:
        color, marker = _style(row["codec"])
        std = scale * row["compressed_std"] if row["compressed_std"] else None
        ax.errorbar(row["ratio"], scale * row["compressed"], yerr=std, color=color, marker=marker, markersize=6.5,
                    markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.2, capsize=2.5, zorder=3)  # fmt: skip
    ratios = [row["ratio"] for row in points] or [1.0]
    ax.set_xscale("log")
    low, high = min(ratios), max(ratios)
    left, right = min(low / 1.3, 1.5), max(high * 1.5, 4)
    ax.set_xlim(left, right)
    ax.set_xticks([t for t in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512) if left <= t <= right])
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.margins(y=0.16)
    bottom, top = ax.get_ylim()
    # Below this span the axis would make noise look like an effect.
    short = max(0.0, 0.05 * scale - (top - bottom)) / 2
    ax.set_ylim(bottom - short, top + short)
    ax.set_title(task, loc="left", fontweight="bold")
    ax.set_xlabel("forward compression ratio")
    ax.set_ylabel(metric.replace("_", " ") + (", %" if scale == 100 else ""))
    if none is not None:
        ax.annotate("no compression", (0.995, scale * none["plain"]), xycoords=("axes fraction", "data"),
                    xytext=(0, 2), textcoords="offset points", ha="right", va="bottom", color=STYLES["none"][0],
                    fontsize=8)  # fmt: skip
    _label(ax, [(row["ratio"], scale * row["compressed"], _short(row["codec"]), _style(row["codec"])[0])
                for row in points])  # fmt: skip


def _label(ax: Any, points: list[tuple[float, float, str, str]]) -> None:
    """Write each text beside its point where it covers least: neither texts nor points nor the frame.

    Greedy over places around the point, nearest first; a text that had to move away gets a thin leader.
    """
    figure = ax.figure
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    unit = figure.dpi / 72
    centers = [ax.transData.transform(point[:2]) for point in points]
    taken = [_box(x, y, 9 * unit, 9 * unit) for x, y in centers]
    taken += [text.get_window_extent(renderer).extents for text in ax.texts]
    taken += [line.get_window_extent(renderer).padded(1.5 * unit).extents for line in ax.lines[:1]]  # "none"
    for bars in ax.collections:
        taken += [path.transformed(ax.transData).get_extents().padded(unit).extents for path in bars.get_paths()]
    places = [(dx * r, dy * r * 0.8) for r in (1, 1.8, 2.8, 4, 5.5)
              for dx, dy in ((1, 0), (0, 1), (0, -1), (-1, 0), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8))]
    # Crowded points choose first, because they have the fewest places.
    crowd = [sum(abs(x - a) + abs(y - b) < 60 * unit for a, b in centers) for x, y in centers]
    for i in sorted(range(len(points)), key=lambda i: -crowd[i]):
        (x, y), (*_, words, color) = centers[i], points[i]
        probe = ax.text(0, 0, words, fontsize=8)
        extent = probe.get_window_extent(renderer)
        probe.remove()
        width, height = extent.width + 2 * unit, extent.height + unit
        best = None
        for rank, (dx, dy) in enumerate(places):
            # The nearest edge of the text, not its middle, lies at the offset.
            cx = x + dx * 9 * unit + _sign(dx) * width / 2
            cy = y + dy * 9 * unit + _sign(dy) * height / 2
            box = _box(cx, cy, width, height)
            cost = sum(_overlap(box, other) for other in taken) + 3 * (width * height - _overlap(box, frame.extents))
            cost += rank * width * height * 0.01
            if best is None or cost < best[0]:
                best = (cost, cx, cy, box, max(abs(dx), abs(dy)))
        _, cx, cy, box, distance = best
        taken.append(box)
        tx, ty = ax.transData.inverted().transform((cx, cy))
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(words, points[i][:2], xytext=(tx, ty), textcoords="data", ha="center", va="center", fontsize=8,
                    color=_darker(color), arrowprops=leader if distance > 1.5 else None, zorder=4)  # fmt: skip


def loss_curves(records: Iterable[Record], path: str | os.PathLike[str], most: int = 7) -> Path:
    """One panel per task: training loss over steps, averaged over seeds; returns the PNG's path.

    At most `most` codecs a panel: `none`, then the one of each family that compresses most.
    Raises ValueError if no record has a history with losses.
    """
    tasks: dict[str, dict[tuple[str, str], list[Record]]] = {}
    for record in records:
        if any("loss" in entry for entry in record.get("history") or ()):
            tasks.setdefault(record["task"], {}).setdefault(codecs_of(record), []).append(record)
    if not tasks:
        raise ValueError("There is nothing to draw: no record has a history with losses.")
    columns = min(2, len(tasks))
    figure, axes = _figure(-(-len(tasks) // columns), columns, 3.2)
    for ax, (task, groups) in zip(axes, tasks.items(), strict=False):
        own = list(itertools.chain(*groups.values()))
        for codec, group in chosen_curves(own, accuracy_table(own), most):
            steps, losses = mean_curve(group)
            color, marker = _style(codec)
            none = codec == "none"
            ax.plot(steps, losses, color=color, linewidth=2.2 if none else 1.3, zorder=2 if none else 3,
                    label="no compression" if none else full_name(codec), linestyle=(0, (5, 2)) if none else "-",
                    marker=None if none else marker, markersize=4.5, markeredgecolor="white", markeredgewidth=0.4,
                    markevery=max(1, len(steps) // 8))  # fmt: skip
        ax.set_title(task, loc="left", fontweight="bold")
        ax.set_xlabel("step")
        ax.set_ylabel("training loss")
        ax.margins(x=0.02)
        ax.legend(frameon=False, fontsize=8, handlelength=3)
    return _save(figure, path)


def accuracy_vs_throughput(panels: Mapping[str, Sequence[Row]], path: str | os.PathLike[str]) -> Path:
    """One panel per table: the metric against samples per second over those without compression, whose line is at 1.

    panels: {title: rows of comparison.load_comparison that have `speed`}.  Raises ValueError without any.
    """
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        raise ValueError("There is nothing to draw: no table has a measured throughput.")
    figure, axes = _figure(len(panels), 1, 3.1)
    families = set()
    for ax, (title, rows) in zip(axes, panels.items(), strict=False):
        metric = rows[0]["ours"]["metric"]
        scale, points = 100 if metric in PERCENT else 1, []
        ax.axvline(1.0, color=STYLES["none"][0], linewidth=1.2, linestyle=(0, (5, 2)), zorder=1)
        for row in rows:
            (color, marker), speed, value = _style(row["codec"]), row["speed"], scale * row["ours"]["value"]
            low, high = speed["of_none_range"]
            spread = [[speed["of_none"] - low], [high - speed["of_none"]]]
            std = scale * row["ours"]["std"] if row["ours"]["std"] else None
            ax.errorbar(speed["of_none"], value, xerr=spread, yerr=std, color=color, marker=marker, markersize=6.5,
                        markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.2, capsize=2.5, zorder=3)
            points.append((speed["of_none"], value, row["label"], color))
            families.add(family(row["codec"]))
        ax.margins(x=0.1, y=0.2)
        ax.set_title(title, loc="left", fontweight="bold")
        ax.set_xlabel("samples per second over those without compression")
        ax.set_ylabel(metric.replace("_", " ") + (", %" if scale == 100 else ""))
        _label(ax, points)
    _legend(figure, [name for name in (*STYLES, "other") if name in families])
    return _save(figure, path)


def chosen_curves(
    records: Iterable[Record], rows: Sequence[Row], most: int = 7
) -> list[tuple[str, list[Record]]]:
    """(codec, its runs) of the curves that are drawn; `rows` is the table of the records, which rises by ratio."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if any("loss" in entry for entry in record.get("history") or ()):
            groups.setdefault(codecs_of(record), []).append(record)
    pairs = [(row["codec"], row["grad_codec"]) for row in rows]
    best = {family(pair[0]): pair for pair in pairs if pair[0] != "none" and pair in groups}
    keys = [("none", "none")] * (("none", "none") in groups) + list(best.values())[: most - 1]
    return [(key[0], groups[key]) for key in keys]


def mean_curve(group: list[Record]) -> tuple[list[int], list[float]]:
    """Losses at the steps that all seeds have logged."""
    curves = [{e["step"]: float(e["loss"]) for e in record["history"] if "loss" in e} for record in group]
    steps = sorted(set.intersection(*map(set, curves)))
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]


# Names and styles


def family(codec: str) -> str:
    """The codec that decides a spec: the first of a chain, the inner one of error feedback."""
    name = re.split(r"[:|]", codec.removeprefix("ef+"))[0]
    return name if name in STYLES else "other"


def _style(codec: str) -> tuple[str, str]:
    return STYLES.get(family(codec), OTHER)


def _options(codec: str) -> list[str]:
    """What a reader wants of the options: bits, share or rank, and the words for a rotation and patches."""
    head = codec.removeprefix("ef+").partition("|")[0].partition(":")[2]
    options = dict(item.split("=", 1) for item in head.split(",") if "=" in item)
    words = [f"{options['bits']} bit"] if "bits" in options else []
    words += [f"{100 * float(options['ratio']):g} %"] if "ratio" in options else []
    words += [f"rank {options['rank']}"] if "rank" in options else []
    words += [options["format"]] if "format" in options else []
    # Trellis and patches are rotated as well; a shorter label finds room.
    trellis = options.get("levels") == "trellis"
    marks = {"trellis": trellis, "patched": "patch" in options, "rotated": "rotate" in options}
    words += [mark for mark, there in marks.items() if there][:1]
    return words


def _short(codec: str) -> str:
    """The label of a point, whose family the marker shows."""
    words = " ".join(_options(codec)) or codec.partition(":")[0]
    if codec.startswith("ef+"):
        words = f"ef {words}"
    return f"{words} | {codec.partition('|')[2].partition(':')[0]}" if "|" in codec else words


def full_name(codec: str) -> str:
    return codec if family(codec) == "other" else f"{family(codec)} {_short(codec)}"


def _legend(figure: Any, families: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in families:
        color, marker = STYLES.get(name, OTHER)
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="", markersize=6.5, label=name))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9,
                      handletextpad=0.2, columnspacing=1.4)  # fmt: skip


def _darker(color: str) -> str:
    """Text needs more contrast with white than a marker does."""
    return "#" + "".join(f"{int(int(color[i : i + 2], 16) * 0.72):02x}" for i in (1, 3, 5))


# Geometry, in pixels


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _figure(lines: int, columns: int, height: float) -> tuple[Any, list[Any]]:
    # Not pyplot: it would keep global state and choose a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.color": "#e6e6e6", "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.edgecolor": "#666666"}
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height * lines + 0.3), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    return figure, axes


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    for ax in figure.axes:
        if not ax.has_data():
            ax.remove()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


# The report card


def report_card(cards: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Bars for size, error, and time per sample, a bar per model; returns the PNG's path."""
    sizes = [key.removeprefix("median_ms_") for key in cards[0] if key.startswith("median_ms_")]
    panels = [("file, MB" if all(c["file_bytes"] for c in cards) else "counted, MB",
               lambda c: (c["file_bytes"] if all(d["file_bytes"] for d in cards) else c["bits"] / 8) / 1e6)]
    if all("top1_error" in c for c in cards):
        panels.append(("top-1 error, %", lambda c: 100 * c["top1_error"]))
    panels += [(f"ms a sample, {b} at once", lambda c, b=b: c[f"median_ms_{b}"]) for b in sizes]
    figure, axes = _figure(-(-len(panels) // 2), 2, 0.9 + 0.34 * len(cards))
    colors = [color for color, _ in STYLES.values()]
    for ax, (title, value) in zip(axes, panels, strict=False):
        values = [value(card) for card in cards]
        ax.barh(range(len(cards)), values, color=[c for c, _ in zip(itertools.cycle(colors), cards, strict=False)],
                height=0.7)
        for i, number in enumerate(values):
            ax.annotate(f"{number:.3g}", (number, i), xytext=(3, 0), textcoords="offset points", va="center",
                        fontsize=8)
        ax.set_yticks(range(len(cards)), [card["name"] for card in cards])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.18 * max(values) or 1)
        ax.set_title(title, loc="left", fontweight="bold", fontsize=9)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    return _save(figure, path)
