"""Tables of benchmarks/results/saved_architectures.json, for pages.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import harness

BITS = ("8", "4", "2")
MOST = {"8": 0.02, "4": 0.3}  # what the errors are to stay below


def measured(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = [pair for library in ("transformers", "timm") for pair in sorted(record.get(library, {}).items())]
    return [(name, row) for name, row in found if "failed" not in row]


def held(row: dict[str, Any], bits: str) -> float:
    return row[bits]["raw_bytes"] / row[bits]["held_bytes"]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.3f} (up to {max(values):.3f})"


def _sharp(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row["sharp"].items() if key != "2"}  # of few


def summary(record: dict[str, Any]) -> str:
    """A row for each library, with plain and with sharp attention."""
    lines = []
    for library in ("transformers", "timm"):
        plain = [row for row in record.get(library, {}).values() if "failed" not in row]
        for label, rows in ((library, plain), (f"{library}, sharp", [_sharp(row) for row in plain if "sharp" in row])):
            if rows:
                below = [f"{sum(row[b]['error'] <= most for row in rows)} / {len(rows)}" for b, most in MOST.items()]
                lines.append((
                    label, len(rows), f"{sum(row['identity'] for row in rows)} / {len(rows)}",
                    *(_spread([row[b]["error"] for row in rows if b in row]) for b in BITS), *below,
                    *(f"1/{statistics.median(held(row, b) for row in rows):.1f}" for b in ("8", "4")),
                ))  # fmt: skip
    head = ("", "models", "identity: the same bits", *(f"{b} bits: error" for b in BITS),
            *(f"{b} bits: at most {most:g}" for b, most in MOST.items()), "8 bits: held", "4 bits: held")  # fmt: skip
    return harness.table(head, lines, "l")


def worst(rows: list[tuple[str, dict[str, Any]]], most: int = 10) -> str:
    """Those with the largest error at 4 bits."""
    lines = []
    for name, row in sorted(rows, key=lambda pair: -pair[1]["4"]["error"])[:most]:
        exactly = ", ".join(f"{operation} {n / 1e6:.2f} MB" for operation, n in row["exactly"].items() if n >= 5e4)
        sharp = f"{row['sharp']['4']['error']:.3f}" if "sharp" in row else ""
        lines.append((name, *(f"{row[b]['error']:.3f}" for b in BITS), f"{row['4']['median']:.3f}", sharp,
                      f"1/{held(row, '4'):.1f}", exactly or "-"))  # fmt: skip
    head = ("model", *(f"{b} bits" for b in BITS), "4 bits: median parameter", "4 bits: sharp", "4 bits: held",
            "exactly")  # fmt: skip
    return harness.table(head, lines, "lrrrrrrl")


def section(record: dict[str, Any]) -> str:
    rows = measured(record)
    failed = sum("failed" in row for library in ("transformers", "timm") for row in record.get(library, {}).values())
    middle = statistics.median(row["4"]["error"] for _, row in rows)
    return "\n\n".join((
        summary(record),
        f"Median over all {len(rows)} models at 4 bits: {middle:.3f} (limit 0.05).",
        "The ten models with the largest error at 4 bits:",
        worst(rows),
        "Error: |g' - g| / |g| over the gradients of all parameters; median over models "
        "(worst). "
        "Sharp: queries times 8. Held: bytes that autograd would hold over bytes held; tensors below 16384 elements "
        f"stay exact. {failed} more could not be made small without weights, have no step of their own, or took more "
        "than a minute. Each model: benchmarks/results/saved_architectures.json. "
        f"`{record['command']}`.",
    ))  # fmt: skip


def parts() -> Iterator[tuple[str, str, str]]:
    if (record := harness.read("saved_architectures")) is not None:
        yield "docs/memory.md", "saved architectures", section(record)
