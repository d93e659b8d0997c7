"""Report cards of models as tables: for the terminal, as Markdown, and as files.

A card is a row of `hf_actcompress.weights.card.measure`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    ("parameters, M", lambda r: f"{r['parameters'] / 1e6:.2f}"),
    ("non-zero, M", lambda r: f"{r['nonzeros'] / 1e6:.2f}"),
    ("counted, Mbit", lambda r: f"{r['bits'] / 1e6:.1f}"),
    ("file, MB", lambda r: "-" if r["file_bytes"] is None else f"{r['file_bytes'] / 1e6:.2f}"),
    ("MFLOP", lambda r: "-" if r["flops"] is None else f"{r['flops'] / 1e6:.0f}"),
    ("top-1 error, %", lambda r: f"{100 * r['top1_error']:.2f}" if "top1_error" in r else "-"),
    ("top-5 error, %", lambda r: f"{100 * r['top5_error']:.2f}" if "top5_error" in r else "-"),
    ("peak memory, MB", lambda r: "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.1f}"),
)  # fmt: skip


def table(cards: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(names of the models, lines): one line per measure, one cell per model."""
    sizes = [key.removeprefix("median_ms_") for key in cards[0] if key.startswith("median_ms_")]
    measures = list(COLUMNS)
    for name in cards[0].get("metrics", {}):
        measures.append((name, lambda r, n=name: f"{r['metrics'][n]:.4g}"))
    for b in sizes:
        measures += [
            (f"ms a sample, {b} at once (p95)", lambda r, b=b: f"{r[f'median_ms_{b}']:.2f} ({r[f'p95_ms_{b}']:.2f})"),
            (f"samples a second, {b} at once", lambda r, b=b: f"{r[f'per_second_{b}']:.0f}"),
            (f"CPU ms a sample, {b} at once", lambda r, b=b: f"{r[f'cpu_ms_{b}']:.2f}"),
        ]  # fmt: skip
        if f"cuda_ms_{b}" in cards[0]:
            measures.append((f"CUDA ms a sample, {b} at once", lambda r, b=b: f"{r[f'cuda_ms_{b}']:.3f}"))
    measures.append(("mJ a sample, " + cards[0]["energy"], lambda r: f"{1e3 * r['joules']:.1f}"))
    measures.append(("smaller than the first by", lambda r: _times(r["compression"])))
    measures += [(f"faster than the first, {b} at once", lambda r, b=b: _times(r["speed_up"][b])) for b in sizes]
    return [r["name"] for r in cards], [[name, *(show(r) for r in cards)] for name, show in measures]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def markdown(cards: Sequence[Mapping[str, Any]]) -> str:
    names, lines = table(cards)
    text = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    notes = [f"- {card['name']}: {note}" for card in cards for note in card["notes"]]
    return "\n".join([*text, *(["", *notes] if notes else [])])


def save_cards(cards: Sequence[Mapping[str, Any]], folder: str | os.PathLike[str],
               about: Mapping[str, Any] | None = None) -> list[Path]:  # fmt: skip
    """Writes card.json, card.md and card.png (where matplotlib is there)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "card.json", folder / "card.md"]
    paths[0].write_text(json.dumps({**(about or {}), "models": list(cards)}, indent=2) + "\n")
    paths[1].write_text(markdown(cards) + "\n")
    with contextlib.suppress(ImportError):
        from .plots import report_card

        paths.append(report_card(cards, folder / "card.png"))
    return paths
