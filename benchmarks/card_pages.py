"""The generated parts of docs/weights.md about pruning, quantization and distillation."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from hf_actcompress.report.plots import report_card
from hf_actcompress.weights.card import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INT8_POINTS, INT8_FILE = 1.0, 0.3  # what is asked of int8: error in points more than dense, share of its file


def card(record: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in record["models"]}
    about = (f"{record['data']}, {record['samples']} images; {record['threads']} thread; medians of "
             f"{record['repeats']} forwards in turns. `{record['command']}`.")  # fmt: skip
    return "\n\n".join([markdown(record["models"]), about, targets(rows)])


def targets(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| target | found | |", "| --- | --- | --- |"]
    if "int8" in rows and "dense" in rows:
        points = 100 * (rows["int8"]["top1_error"] - rows["dense"]["top1_error"])
        share = rows["int8"]["file_bytes"] / rows["dense"]["file_bytes"]
        lines.append(f"| int8 within {INT8_POINTS:g} point of dense | {points:+.2f} points | "
                     f"{_met(points <= INT8_POINTS)} |")  # fmt: skip
        lines.append(f"| int8 smaller than {INT8_FILE:g} of its file | {share:.3f} | {_met(share < INT8_FILE)} |")
    if "structured" in rows:
        gains = rows["structured"]["speed_up"]
        found = ", ".join(f"{gain:.2f}x at {batch}" for batch, gain in gains.items())
        lines.append(f"| structured really faster | {found} | {_met(all(g > 1.05 for g in gains.values()))} |")
    return "\n".join(lines)


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def distillation(records: list[dict[str, Any]]) -> str:
    lines = ["| SST-2, 5,000 rows | parameters, M | accuracy, % | seeds |", "| --- | ---: | --- | ---: |"]
    taught = [r for r in records if not r["alone"]]
    alone = [r for r in records if r["alone"]]
    if taught:
        teacher, size = taught[0]["metrics"]["teacher"]["accuracy"], taught[0]["parameters"]["teacher"] / 1e6
        lines.append(f"| teacher, 6 layers | {size:.1f} | {100 * teacher:.1f} | 1 |")
    for name, group in (("student of 3 layers with teacher", taught), ("student alone", alone)):
        values = [100 * r["metrics"]["student"]["accuracy"] for r in sorted(group, key=lambda r: r["seed"])]
        if values:
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            each = ", ".join(f"{v:.1f}" for v in values)
            size = group[0]["parameters"]["student"] / 1e6
            lines.append(f"| {name} | {size:.1f} | {statistics.fmean(values):.1f}{spread} ({each}) | {len(values)} |")
    r = records[0]
    shared = (f"{r['epochs']:g} epochs, learning rate {r['learning_rate']:g}, batches of {r['batch_size']}; with "
              f"teacher: temperature {taught[0]['temperature']:g}, alpha {taught[0]['alpha']:g}, hidden states "
              f"{taught[0]['hidden']:g}. `{r['command']}`.") if taught else ""  # fmt: skip
    if taught and alone and len(taught) == len(alone):
        by_seed = {r["seed"]: r["metrics"]["student"]["accuracy"] for r in alone}
        gains = [100 * (r["metrics"]["student"]["accuracy"] - by_seed[r["seed"]]) for r in taught]
        mean, each = statistics.fmean(gains), ", ".join(f"{g:+.1f}" for g in gains)
        shared += f" Gain over the same seed alone: {each} points, mean {mean:+.1f}; asked: above 0, {_met(mean > 0)}."
    return "\n".join(lines) + f"\n\n{shared}"


def fill_all(fill: Any, page: Path) -> None:
    """Called by pages.py with its `fill`."""
    path = RESULTS / "prune.json"
    if path.is_file():
        record = json.loads(path.read_text())
        fill(page, "report card", card(record))
        report_card(record["models"], ROOT / "docs" / "figures" / "report_card.png")
    files = sorted((RESULTS / "distill").glob("*.json"))
    if files:
        fill(page, "distillation", distillation([json.loads(file.read_text()) for file in files]))
