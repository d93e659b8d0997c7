"""Result records become figures for READMEs and docs.  matplotlib is imported inside."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import Record
from .style import NAMES, STYLES, Style, escape_math, family, label, make_figure, save_figure, short_label, style_of
from .tables import Row, accuracy_table, codecs_of, scale_of, summarize_values


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
    figure, axes = make_figure(lines, columns, 3.3 if columns == 1 else 3.6)
    for ax, (task, rows) in zip(axes, tables.items(), strict=False):
        draw_panel(ax, task, rows)
    families = {family(row["codec"]) for rows in tables.values() for row in rows} - {"none"}
    _legend(figure, [name for name in STYLES if name in families])
    return save_figure(figure, path)


def draw_panel(ax: Any, task: str, rows: list[Row]) -> None:
    """The metric of one task against the ratio; a hollow marker where some seeds diverged."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    metric = rows[0]["metric"]
    scale = scale_of(metric)[0]
    none = next((row for row in rows if row["codec"] == "none" and _finite(row["plain"])), None)
    if none is not None:
        color, mean = STYLES["none"].color, scale * none["plain"]
        ax.axhline(mean, color=color, linewidth=1.2, linestyle=(0, (5, 2)), zorder=1)
        if none["plain_std"]:
            spread = scale * none["plain_std"]
            ax.axhspan(mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0, zorder=0)
    measured = [row for row in rows if row["ratio"] and row["compressed"] is not None and row["codec"] != "none"]
    points = [row for row in measured if _finite(row["compressed"])]
    for row in points:
        color, marker, hollow = *style_of(row["codec"])[:2], row["compressed_diverged"] > 0
        std = scale * row["compressed_std"] if row["compressed_std"] else None
        ax.errorbar(row["ratio"], scale * row["compressed"], yerr=std, color=color, marker=marker, markersize=6.5,
                    markerfacecolor="white" if hollow else color, markeredgecolor=color if hollow else "white",
                    markeredgewidth=1.3 if hollow else 0.6, elinewidth=1.2, capsize=2.5, zorder=3)  # fmt: skip
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
    ax.set_title(escape_math(task), loc="left", fontweight="bold")
    gone = [label(row["codec"]) for row in measured if row not in points]
    note = f"not drawn, since every seed diverged: {'; '.join(gone)}" if gone else ""
    ax.set_xlabel(f"forward compression ratio\n{escape_math(note)}".strip())
    ax.set_ylabel(metric.replace("_", " ") + (", %" if scale == 100 else ""))
    if none is not None:
        ax.annotate("no compression", (0.995, scale * none["plain"]), xycoords=("axes fraction", "data"),
                    xytext=(0, 2), textcoords="offset points", ha="right", va="bottom", color=STYLES["none"].color,
                    fontsize=8)  # fmt: skip
    _label(ax, [(row["ratio"], scale * row["compressed"], _point_label(row), style_of(row["codec"]))
                for row in points])  # fmt: skip


def _point_label(row: Row) -> str:
    diverged = row["compressed_diverged"]
    return short_label(row["codec"]) + (f" ({diverged} of {row['seeds']} diverged)" if diverged else "")


def _label(ax: Any, points: list[tuple[float, float, str, Style]]) -> None:
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
        (x, y), (*_, words, style) = centers[i], points[i]
        words = escape_math(words)
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
        leader = {"arrowstyle": "-", "color": style.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        ax.annotate(words, points[i][:2], xytext=(tx, ty), textcoords="data", ha="center", va="center", fontsize=8,
                    color=style.ink, arrowprops=leader if distance > 1.5 else None, zorder=4)  # fmt: skip


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
    figure, axes = make_figure(-(-len(tasks) // columns), columns, 3.2)
    for ax, (task, groups) in zip(axes, tasks.items(), strict=False):
        own = list(itertools.chain(*groups.values()))
        for codec, group in chosen_curves(own, accuracy_table(own), most):
            steps, losses, note = mean_curve(group)
            color, marker = style_of(codec)[:2]
            none = codec == "none"
            ax.plot(steps, losses, color=color, linewidth=2.2 if none else 1.3, zorder=2 if none else 3,
                    label=escape_math(label(codec) + note), linestyle=(0, (5, 2)) if none else "-",
                    marker=None if none else marker, markersize=4.5, markeredgecolor="white", markeredgewidth=0.4,
                    markevery=max(1, len(steps) // 8))  # fmt: skip
        ax.set_title(escape_math(task), loc="left", fontweight="bold")
        ax.set_xlabel("step")
        ax.set_ylabel("training loss")
        ax.margins(x=0.02)
        ax.legend(frameon=False, fontsize=8, handlelength=3)
    return save_figure(figure, path)


def accuracy_vs_throughput(panels: Mapping[str, Sequence[Row]], path: str | os.PathLike[str]) -> Path:
    """One panel per table: the metric against samples per second over those without compression, whose line is at 1.

    panels: {title: rows of comparison.load_comparison that have `speed`}.  Raises ValueError without any.
    """
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        raise ValueError("There is nothing to draw: no table has a measured throughput.")
    figure, axes = make_figure(len(panels), 1, 3.1)
    families = set()
    for ax, (title, rows) in zip(axes, panels.items(), strict=False):
        metric = rows[0]["ours"]["metric"]
        scale, points = scale_of(metric)[0], []
        ax.axvline(1.0, color=STYLES["none"].color, linewidth=1.2, linestyle=(0, (5, 2)), zorder=1)
        for row in rows:
            if not _finite(row["ours"]["value"]):
                continue
            style, speed, value = style_of(row["codec"]), row["speed"], scale * row["ours"]["value"]
            low, high = speed["of_none_range"]
            spread = [[speed["of_none"] - low], [high - speed["of_none"]]]
            std = scale * row["ours"]["std"] if row["ours"]["std"] else None
            ax.errorbar(speed["of_none"], value, xerr=spread, yerr=std, color=style.color, marker=style.marker,
                        markersize=6.5, markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.2, capsize=2.5,
                        zorder=3)  # fmt: skip
            points.append((speed["of_none"], value, row["label"], style))
            families.add(family(row["codec"]))
        ax.margins(x=0.1, y=0.2)
        ax.set_title(escape_math(title), loc="left", fontweight="bold")
        ax.set_xlabel("samples per second over those without compression")
        ax.set_ylabel(metric.replace("_", " ") + (", %" if scale == 100 else ""))
        _label(ax, points)
    _legend(figure, [name for name in STYLES if name in families])
    return save_figure(figure, path)


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


def mean_curve(group: list[Record]) -> tuple[list[int], list[float], str]:
    """Losses at the steps that all seeds have logged, and a note for the legend on seeds whose loss diverged.

    A loss is the mean of those that are finite at that step, and NaN where none is.
    """
    curves = [{e["step"]: e["loss"] for e in record["history"] if e.get("loss") is not None} for record in group]
    steps = sorted(set.intersection(*map(set, curves)))
    values = [summarize_values(curve[step] for curve in curves) for step in steps]
    diverged = max((value.diverged for value in values), default=0)
    note = f" ({diverged} of {len(group)} diverged)" if diverged else ""
    return steps, [float(value.mean) for value in values], note


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _legend(figure: Any, families: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for name in families:
        color, marker = STYLES[name][:2]
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="", markersize=6.5,
                              label=NAMES.get(name, name)))  # fmt: skip
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9,
                      handletextpad=0.2, columnspacing=1.4)  # fmt: skip


# Geometry, in pixels


def _box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


# The report card


def report_card(cards: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Bars for size, error, and time per sample, a bar per model; returns the PNG's path."""
    sizes = [key.removeprefix("median_ms_") for key in cards[0] if key.startswith("median_ms_")]
    panels = [("file, MB" if all(c["file_bytes"] for c in cards) else "counted, MB",
               lambda c: (c["file_bytes"] if all(d["file_bytes"] for d in cards) else c["bits"] / 8) / 1e6)]
    if all("top1_error" in c for c in cards):
        panels.append(("top-1 error, %", lambda c: 100 * c["top1_error"]))
    panels += [(f"ms a sample, {b} at once", lambda c, b=b: c[f"median_ms_{b}"]) for b in sizes]
    figure, axes = make_figure(-(-len(panels) // 2), 2, 0.9 + 0.34 * len(cards))
    colors = [style.color for style in STYLES.values()]
    for ax, (title, value) in zip(axes, panels, strict=False):
        values = [value(card) for card in cards]
        ax.barh(range(len(cards)), values, color=[c for c, _ in zip(itertools.cycle(colors), cards, strict=False)],
                height=0.7)
        for i, number in enumerate(values):
            ax.annotate(f"{number:.3g}", (number, i), xytext=(3, 0), textcoords="offset points", va="center",
                        fontsize=8)
        ax.set_yticks(range(len(cards)), [escape_math(card["name"]) for card in cards])
        ax.invert_yaxis()
        ax.set_xlim(0, 1.18 * max(filter(math.isfinite, values), default=0) or 1)
        ax.set_title(title, loc="left", fontweight="bold", fontsize=9)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    return save_figure(figure, path)
