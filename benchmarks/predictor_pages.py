"""The generated parts of docs/predictor.md and their figure, from benchmarks/results/predictor.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import read, table

from hf_actcompress.report.style import make_figure, save_figure

COLOURS = {"cola": ("#0072B2", "o"), "sst2": ("#D55E00", "s"), "cifar10": ("#009E73", "^"), "mnist": ("#CC79A7", "D")}


def strongest(result: dict[str, Any]) -> dict[str, Any]:
    """The first quantity that has a threshold whichever task is left out."""
    rows = result["quantities"]
    return next((row for row in rows if all(hit["threshold"] is not None for hit in row["left_out"])), rows[0])


def section(result: dict[str, Any], most: int = 30) -> str:
    """The ranking as a table, then the hits of the best quantity by task."""
    tasks = list(result["tasks"])
    head = ["quantity", "runs", "rho (95 % interval)", *tasks, "threshold", "caught", "false alarms"]
    lines = []
    for row in result["quantities"][:most]:
        low, high = row["interval"]
        by_task = (row["by_task"].get(task) for task in tasks)
        cut = "-" if row["threshold"] is None else f"{'>' if row['rising'] else '<'} {row['threshold']:.3g}"
        cells = [row["quantity"], str(row["known"]), f"{row['rho']:+.2f} ({low:+.2f} to {high:+.2f})",
                 *("-" if value is None else f"{value:+.2f}" for value in by_task), cut,
                 f"{row['caught']} of {row['harmed']}", f"{row['false_alarms']} of {row['harmless']}"]  # fmt: skip
        lines.append([cell.replace("|", "\\|") for cell in cells])
    best = strongest(result)
    hits = "; ".join(f"{row['task']}: threshold {row['threshold']:.3g}, caught {row['caught']} of {row['harmed']}, "
                     f"false alarms {row['false_alarms']} of {row['runs'] - row['harmed']}"
                     for row in best["left_out"] if row["threshold"] is not None)  # fmt: skip
    counts = ", ".join(f"{task} {count}" for task, count in result["tasks"].items())
    return table(head, lines, "lrl") + (
        f"\n\n{result['runs']} runs ({counts}), of which {result['harmed']} were harmed. Caught and false alarms: "
        f"each task by the threshold of the others. \"{best['quantity']}\", by task left "
        f"out: {hits or 'none'}."
    )


def draw(record: dict[str, Any], path: Path) -> Path:
    """Left the correlations with their intervals, right what is lost against the best quantity; one row per set."""
    sets = [(name, record[name]) for name in ("short", "long") if name in record]
    titles = {"short": "short runs, records of the first tenth", "long": "whole trainings"}
    figure, axes = make_figure(len(sets), 2, 3.9)
    for i, (name, result) in enumerate(sets):
        left, right = axes[2 * i : 2 * i + 2]
        rows = result["quantities"][:14][::-1]
        for y, row in enumerate(rows):
            low, high = sorted(abs(v) if row["interval"][0] * row["interval"][1] > 0 else v for v in row["interval"])
            left.plot([low, high], [y, y], color="#0072B2", linewidth=1.6, zorder=2)
            left.plot(abs(row["rho"]), y, "o", color="#0072B2", markeredgecolor="white", markersize=6.5, zorder=3)
        left.set_yticks(range(len(rows)), [row["quantity"] for row in rows], fontsize=8)
        left.set_xlim(min(0.0, left.get_xlim()[0]), 1)
        left.set_xlabel("|rank correlation| with what is lost, 95 % interval")
        left.set_title(titles[name], loc="left", fontweight="bold", fontsize=10)
        best = strongest(result)
        for task in result["tasks"]:
            colour, marker = COLOURS.get(task, ("#888888", "h"))
            own = [run for run in result["points"] if run["task"] == task and run[best["quantity"]] is not None]
            x, y = [run[best["quantity"]] for run in own], [100 * run["lost"] for run in own]
            right.plot(x, y, marker, color=colour, markeredgecolor="white", markeredgewidth=0.5, markersize=6,
                       label=task, zorder=3)  # fmt: skip
        if best["threshold"] is not None:
            right.axvline(best["threshold"], color="#333333", linestyle=(0, (5, 2)), linewidth=1.2)
            right.annotate(f"threshold {best['threshold']:.2g}", (best["threshold"], 0.98), rotation=90, fontsize=8,
                           xycoords=("data", "axes fraction"), xytext=(-3, 0), textcoords="offset points", ha="right",
                           va="top")  # fmt: skip
        values = sorted(run[best["quantity"]] for run in result["points"] if run[best["quantity"]] is not None)
        if values[0] > 0 and values[-1] > 10 * values[len(values) // 2]:  # a few large ones would squeeze the rest
            right.set_xscale("log")
        right.axhline(100 * record["lost"], color="#999999", linewidth=0.9)
        right.set_xlabel(best["quantity"])
        right.set_ylabel("share of the margin lost, %")
        right.legend(frameon=False, fontsize=8, loc="best", handletextpad=0.2)
    return save_figure(figure, path)


def parts() -> Iterator[tuple[str, str, str]]:
    for name, result in read("predictor", {}).items():
        if name in ("short", "long"):
            yield "docs/predictor.md", f"predictor {name}", section(result)
