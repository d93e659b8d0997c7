"""What `hf-actcompress analyze` finds, as figures.  matplotlib is imported inside.

Figures are to be understood without the text: titles say what is shown, colour bars and axes what is good and bad.
Errors that are NaN or infinite (None in a record) are left out, and marked in the map.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import STYLES, escape_math, family, label, make_figure, save_figure, style_of

DIRECTIONS = {"forward": "Activations, on the way forward", "backward": "Gradients, on the way back"}


def sensitivity_map(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Layers across, codecs down, one panel a direction; the colour is the error of the parameters' gradient."""
    from matplotlib.colors import LogNorm

    rows = record["map"]
    codecs = [c for c in record["codecs"] if c != "identity"]
    codecs.sort(key=lambda codec: (-_bits(rows, codec), _rank(codec)))
    layers = list(dict.fromkeys((row["layer"], row["name"]) for row in rows))
    figure, axes = make_figure(1, 2, 0.24 * len(codecs) + 1.6 + (0.5 if len(layers) > 9 else 0))
    norm = LogNorm(1e-3, 1.0)
    image = None
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        found = {(r["codec"], r["layer"]): r["layer_error"] for r in rows if r["direction"] == direction}
        grid = [[_at_least(found.get((codec, layer)), 1e-3) for layer, _ in layers] for codec in codecs]
        image = ax.imshow(grid, aspect="auto", cmap="RdYlGn_r", norm=norm)
        ax.grid(False)
        ax.set_title(DIRECTIONS[direction], loc="left", fontsize=9, fontweight="bold")
        ax.set_xticks(range(len(layers)), [str(index) for index, _ in layers])
        ax.set_xlabel("cut after layer")
        ax.set_yticks(range(len(codecs)), [label(c) for c in codecs] if direction == "forward" else [""] * len(codecs))
        ax.tick_params(length=0)
        size = 7.5 if len(layers) <= 9 else 5
        for y, codec in enumerate(codecs):
            for x, (layer, _) in enumerate(layers):
                if (codec, layer) in found:
                    value = found[codec, layer]
                    dark = _usable(value) and (value > 0.35 or value < 0.003)
                    ax.text(x, y, _percent(value), ha="center", va="center", fontsize=size,
                            color="white" if dark else "black")  # fmt: skip
        for y, (one, other) in enumerate(zip(codecs, codecs[1:], strict=False)):
            if _bits(rows, one) != _bits(rows, other):
                ax.axhline(y + 0.5, color="white", linewidth=2.5)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015)
    words = ["0.1 %: as good\nas exact", "1 %", "10 %", "100 %: noise\nas large as\nthe gradient"]
    bar.set_ticks([1e-3, 1e-2, 1e-1, 1.0], labels=words)
    bar.ax.tick_params(labelsize=7.5)
    bar.set_label("error of the parameters' gradient", fontsize=8)
    _title(figure, record, f"how much one compressed cut changes the gradient ({record['data_name']}, in %)")
    return save_figure(figure, path)


def error_against_bits(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """One panel a direction: the gradient's error over the bits that are left of each value, a line a family, as the
    geometric mean over layers."""
    figure, axes = make_figure(1, 2, 3.3)
    for ax, direction in zip(axes, DIRECTIONS, strict=True):
        groups: dict[str, dict[float, list[float]]] = {}
        for row in record["map"]:
            if row["direction"] == direction and _usable(row["layer_error"]) and row["codec"] != "identity":
                bits = 32 / row["ratio"]
                points = groups.setdefault(family(row["codec"]), {})
                key = next((b for b in points if abs(b - bits) < 0.35), bits)
                points.setdefault(key, []).append(row["layer_error"])
        for name, points in sorted(groups.items(), key=lambda item: _rank(item[0])):
            bits = sorted(points)
            means = [math.exp(sum(map(math.log, points[b])) / len(points[b])) for b in bits]
            ax.plot(bits, means, label=name, markersize=5, linewidth=1.6, color=STYLES[name].color,
                    marker=STYLES[name].marker)  # fmt: skip
        ax.set_yscale("log")
        ax.axhline(1.0, color="#333333", linewidth=1, linestyle=(0, (5, 2)))
        ax.annotate("noise as large as the gradient", (0.99, 1.0), xycoords=("axes fraction", "data"), xytext=(0, 2),
                    textcoords="offset points", ha="right", va="bottom", fontsize=7.5, color="#333333")  # fmt: skip
        ax.set_title(DIRECTIONS[direction], loc="left", fontsize=9, fontweight="bold")
        ax.set_xlabel("bits left of each 32-bit value, scales included")
        ax.set_ylabel("error of the parameters' gradient" if direction == "forward" else "")
        if direction == "backward" and groups:
            ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _title(figure, record, "error of the gradient against bits, mean of all cuts (one at a time)")
    return save_figure(figure, path)


def error_growth(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """The forward error at each layer: left with the first cut compressed alone, right with every cut."""
    figure, axes = make_figure(1, 2, 3.3)
    codecs = _shown(record)
    for ax, (where, title) in zip(axes, (("first", "Only the first cut is compressed"),
                                         ("every", "Every cut is compressed")), strict=True):  # fmt: skip
        for codec in codecs:
            rows = [r for r in record["growth"] if (r["where"], r["codec"]) == (where, codec)]
            rows = [r for r in rows if _usable(r["rel_error"])]
            low = "bits=2" in codec
            ax.plot([r["layer"] for r in rows], [r["rel_error"] for r in rows], label=label(codec), markersize=4,
                    color=style_of(codec).color, marker=style_of(codec).marker,
                    linestyle="-" if low else (0, (4, 2)), linewidth=1.5)  # fmt: skip
        ax.set_yscale("log")
        ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
        ax.set_xlabel("layer")
        ax.set_ylabel("relative error of what the next layer gets" if where == "first" else "")
    axes[1].legend(frameon=False, fontsize=7.5, handlelength=3.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _title(figure, record, "how the error grows along the depth")
    return save_figure(figure, path)


def histograms(record: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Values before (filled) and after (line) at the first, middle and last cut, one column a codec."""
    entries = [h for h in record["histograms"] if h["before"] and h["codec"] != "identity"]
    codecs = sorted({h["codec"] for h in entries}, key=_rank)[:4]
    order = {row["name"]: row["layer"] for row in record["map"]}
    lines = sorted({(h["direction"], h["name"]) for h in entries}, key=lambda at: (at[0] == "backward", order[at[1]]))
    by_place = {(h["direction"], h["name"], h["codec"]): h for h in entries}
    figure, axes = make_figure(len(lines), len(codecs), 1.3)
    for i, (direction, name) in enumerate(lines):
        for j, codec in enumerate(codecs):
            ax = axes[i * len(codecs) + j]
            found = by_place.get((direction, name, codec))
            if found is None:
                continue
            width = (found["high"] - found["low"]) / len(found["before"])
            edges = [found["low"] + width * k for k in range(len(found["before"]) + 1)]
            ax.stairs(found["before"], edges, fill=True, color="#b8c4d0", label="before")
            ax.stairs(found["after"], edges, color=style_of(codec).color, linewidth=1.1, label="after")
            ax.set_yscale("log")
            ax.tick_params(labelsize=6)
            ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
            ax.xaxis.get_offset_text().set_fontsize(6)
            if i == 0:
                ax.set_title(label(codec), fontsize=9, fontweight="bold")
            if j == 0:
                what = "activations" if direction == "forward" else "gradients"
                ax.set_ylabel(f"{what}\nafter layer {order[name]}", fontsize=7.5)
            if (i, j) == (0, 0):
                ax.legend(frameon=False, fontsize=6.5)
    _title(figure, record, "values before and after (counts, logarithmic)")
    return save_figure(figure, path)


def all_figures(record: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    drawn = {"sensitivity": sensitivity_map, "error_bits": error_against_bits, "error_growth": error_growth,
             "histograms": histograms}  # fmt: skip
    return [draw(record, Path(folder) / f"{name}.png") for name, draw in drawn.items()]


def _title(figure: Any, record: Mapping[str, Any], text: str) -> None:
    figure.suptitle(escape_math(f"{record['model']}: {text}"), fontsize=10.5, fontweight="bold", x=0.01, ha="left")


def _shown(record: Mapping[str, Any]) -> list[str]:
    """At most ten codecs: those of 2 and 4 bits, by family."""
    every = [codec for codec in record["codecs"] if codec != "identity"]
    coarse = [codec for codec in every if re.search(r"bits=(2|4)\b", codec) and "|" not in codec]
    return sorted(coarse or every, key=_rank)[:10]


def _rank(codec: str) -> int:
    return list(STYLES).index(codec if codec in STYLES else family(codec))


def _bits(rows: Sequence[Mapping[str, Any]], codec: str) -> int:
    """Bits left of a value, as the nearest of 1, 2, 4, 8 or 16, for grouping."""
    ratio = next(row["ratio"] for row in rows if row["codec"] == codec)
    return min((1, 2, 4, 8, 16), key=lambda bits: abs(math.log2(32 / ratio) - math.log2(bits)))


def _usable(value: float | None) -> bool:
    """Whether a logarithmic axis can show it."""
    return value is not None and math.isfinite(value) and value > 0


def _at_least(value: float | None, low: float) -> float:
    return math.nan if value is None or not math.isfinite(value) else max(value, low)


def _percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "NaN"
    percent = 100 * value
    return f"{percent:.0f}" if percent >= 10 else f"{percent:.1f}" if percent >= 1 else f"{percent:.2f}".lstrip("0")
