"""Tables and a plot of what was timed on CPUs (results/{codecs,training,boundary_profile,operators}.json), and the
errors of codecs beside those of an earlier version."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import FIGURES, against, read, table

from hf_actcompress.report.style import STYLES, make_figure, save_figure, style_of

# What encode and decode may cost at 64 MiB in fp32, in clones.
ALLOWED = {
    **{f"{name}:bits={bits}": (1.2, 1.2) for name in ("uniform", "block") for bits in (8, 4, 2)},
    "uniform:bits=8": (0.9, 1.0), "block:bits=4": (1.0, 1.0), "rotated:bits=2": (2.0, 2.0),
    "sort:bits=8": (2.2, 1.6), "kmeans:bits=4": (2.2, 1.6), "topk:ratio=0.1": (4.0, 2.0),
    "lowrank:rank=8": (3.0, 2.0), "lowrank:rank=8 [m, 32]": (3.0, 2.0),
}  # fmt: skip
COMPILE = 60  # seconds, once for a machine
GROWTH = 1.3  # time per byte at 1 GiB over that at 16 MiB
FASTER = {"sort:bits=8": 30, "kmeans:bits=4": 50}  # than the plain versions
SHARE = 0.97  # of the throughput of training without compression; low-rank 0.95
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
DRAWN = (
    "uniform:bits=8", "block:bits=4", "rotated:bits=2", "sort:bits=8", "kmeans:bits=4", "topk:ratio=0.1",
    "lowrank:rank=8", "float8",
)  # fmt: skip


def by_codec(record: dict[str, Any]) -> dict[str, dict[tuple[str, str], dict]]:
    """codec -> (size, dtype) -> measurement"""
    found: dict[str, dict[tuple[str, str], dict]] = {}
    for key, row in record["sizes"].items():
        size, dtype, codec = key.split(" ", 2)
        found.setdefault(codec, {})[size, dtype] = row
    return found


def codecs(record: dict[str, Any]) -> str:
    """Times at 64 MiB, growth, baselines, first calls."""
    found, lines = by_codec(record), []
    for codec, rows in found.items():
        cells = []
        for dtype in ("float32", "bfloat16"):
            row = rows.get(("64M", dtype))
            for way, most in zip(("encode", "decode"), ALLOWED.get(codec, (None, None)), strict=True):
                cells.append(_clones(row[way]) if row else "")
                if dtype == "float32":
                    cells.append(against(f"{most:.1f}", row[way]["clones"] <= most) if row and most else "")
        lines.append((codec, *cells))
    head = ("codec", "fp32 encode", "allowed", "fp32 decode", "allowed", "bf16 encode", "bf16 decode")
    found_parts = [table(head, lines, "l"), _growth(found), _baselines(record.get("baselines", {}))]
    found_parts += [
        f"In new processes, {name}: " + "; ".join(_first(*item) for item in calls.items()) + "."
        for name, calls in record.get("compilation", {}).items()
    ]
    return "\n\n".join(part for part in found_parts if part)


def _clones(time: dict[str, float]) -> str:
    return f"{time['clones']:.2f} ({time['clones_p10']:.2f}-{time['clones_p90']:.2f})"


def _first(label: str, seconds: float) -> str:
    compiles = "to be compiled, first" in label
    return f"{label} {seconds:.2f} s" + (f" (allowed: {against(COMPILE, seconds <= COMPILE)})" if compiles else "")


def _growth(found: dict[str, dict]) -> str:
    """Time per byte at 1 GiB over that at 16 MiB, fp32."""
    cells, clones = [], []
    for codec, rows in found.items():
        small, large = rows.get(("16M", "float32")), rows.get(("1G", "float32"))
        if small and large:
            *ways, clone = (
                large[way]["ms"] / large["bytes"] / (small[way]["ms"] / small["bytes"])
                for way in ("encode", "decode", "clone")
            )
            clones.append(clone)
            cells.append((codec, *(against(f"{ratio:.2f}", ratio <= GROWTH) for ratio in ways)))
    if not cells:
        return ""
    return (
        "Time per byte at 1 GiB over time per byte at 16 MiB, fp32 (allowed: 1.3). What writes a tensor grows by "
        f"more, and so does `x.clone()`, by {statistics.median(clones):.1f}: 16 MiB come back from the heap with "
        "their pages in place and stay in a cache, while a mapping of 1 GiB is touched for the first time, which is "
        "most of a clone's time.\n\n"
    ) + table(("codec", "encode", "decode"), cells, "l")


def _baselines(rows: dict[str, dict]) -> str:
    if not rows:
        return ""
    lines = []
    for name, row in rows.items():
        (low, high), asked, error = row["faster_range"], FASTER.get(row["codec"]), row["rel_error"]
        lines.append((name, row["codec"], f"{row['faster']:.1f} ({low:.1f}-{high:.1f})",
                      "" if asked is None else against(asked, row["faster"] >= asked), f"{error['theirs']:.5f}",
                      f"{error['ours']:.5f}"))  # fmt: skip
    head = ("what users have", "codec here", "faster (range)", "asked", "error, theirs", "error, ours")
    return "Encode and decode together, theirs over ours, 64 MiB of fp32, in turn:\n\n" + table(head, lines, "ll")


def error_statistics(record: dict[str, dict]) -> str:
    """Of every codec: its errors in this version, and how they differ from those in 0.1."""
    old, new = record["0.1"], record["0.2"]
    rows = [(spec, f"{now['mean']:.3g}", *(_change(now[name], old[spec][name]) for name in now))
            for spec, now in new.items()]  # fmt: skip
    head = ("codec", "mean error", "change since 0.1", "of its deviation", "of the worst", "of the bytes")
    return table(head, rows, "l") + (
        "\n\nRelative squared error of 200 tensors (hidden states, feature maps, gradients, uniform and Gaussian "
        "values; half of them fp32, half bf16), and bytes of the payloads. `python benchmarks/error_statistics.py`."
    )


def _change(now: float, before: float) -> str:
    percent = 100 * (now / before - 1)
    return "0" if now == before else "< 0.0001 %" if abs(percent) < 1e-4 else f"{percent:+.4f} %"


def training(record: dict[str, Any]) -> str:
    """Throughput over that without compression, a column per model."""
    models = list(record["models"])
    cells: dict[str, dict[str, str]] = {}
    for model, found in record["models"].items():
        for row in found:
            codec, (low, high) = row["codec"], row["of_none_range"]
            least = 0.95 if codec.startswith("lowrank") else SHARE
            share = against(f"{row['of_none']:.3f} ({low:.3f}-{high:.3f})", row["of_none"] >= least)
            plain = f"{row['samples_per_second']:.1f} samples/s"
            cells.setdefault(codec, {})[model] = plain if codec == "none" else share
    n = ", ".join(str(record["models"][model][0]["n"]) for model in models)
    rows = [(codec, *(own.get(model, "") for model in models)) for codec, own in cells.items()]
    return table(("codec", *models), rows, "l") + (
        f"\n\nSamples per second over those without compression in the same round, medians of {n} rounds (range). "
        "Asked: 0.97, low-rank 0.95. `" + record["command"] + "`."
    )


def boundary(record: dict[str, Any]) -> str:
    """The parts of a boundary's time."""
    rows = [(spec, f"{row['roundtrip']:.1f}", f"{row['whole']:.1f}") for spec, row in record["codecs"].items()]
    parts = "; ".join(f"{name} {value:.1f}" for name, value in record["ms"].items())
    return table(("codec", "roundtrip, ms", "whole boundary, ms"), rows, "l") + (
        f"\n\nOf each whole, in ms: {parts}. `{record['command']}`."
    )


def operators(record: dict[str, Any]) -> str:
    """Page faults, and operators in C++ beside other ways."""
    pages = "; ".join(f"{name} {value:.1f}" for name, value in record["pages_ms"].items())
    ways = list(next(iter(record["kernels_ms"].values())))
    rows = [(name, *(f"{times[way]:.1f}" for way in ways)) for name, times in record["kernels_ms"].items()]
    text = table(("25 MB of fp32", *(f"{way}, ms" for way in ways)), rows, "l")
    return f"64 MiB, in ms: {pages}.\n\n{text}\n\n`{record['command']}`."


def plot(record: dict[str, Any], path: Path) -> Path | None:
    """Time over that of a clone against size, encode and decode, fp32; None without at least two sizes."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    found = by_codec(record)
    sizes = {size for rows in found.values() for size, dtype in rows if dtype == "float32"}
    if len(sizes) < 2:
        return None
    figure, axes = make_figure(1, 2, 3.6)
    for ax, way in zip(axes, ("encode", "decode"), strict=True):
        for codec in DRAWN:
            rows = sorted(
                (int(size[:-1]) * UNITS[size[-1]], row[way])
                for (size, dtype), row in found.get(codec, {}).items() if dtype == "float32"
            )  # fmt: skip
            if not rows:
                continue
            color, marker = style_of(codec)[:2]
            x = [size for size, _ in rows]
            ax.plot(x, [t["clones"] for _, t in rows], color=color, marker=marker, markersize=5, linewidth=1.4,
                    markeredgecolor="white", markeredgewidth=0.5, label=codec)  # fmt: skip
            ax.fill_between(x, [t["clones_p10"] for _, t in rows], [t["clones_p90"] for _, t in rows], color=color,
                            alpha=0.12, linewidth=0)  # fmt: skip
        ax.axhline(1, color=STYLES["none"][0], linewidth=1, linestyle=(0, (5, 2)))
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.set_yticks([t for t in (0.3, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= t <= high])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xticks([2**i for i in (14, 18, 22, 26, 30)])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
        ax.set_title(way, loc="left", fontweight="bold")
        ax.set_xlabel("size of the tensor, fp32")
        ax.set_ylabel("time over x.clone()")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return save_figure(figure, path)


def _size(value: float) -> str:
    unit = next(u for u in ("G", "M", "K") if value >= UNITS[u])
    return f"{value / UNITS[unit]:g} {unit}iB"


def parts() -> Iterator[tuple[str, str, str]]:
    for name, make in (
        ("codecs", codecs), ("training", training), ("boundary_profile", boundary), ("operators", operators),
        ("error_statistics", error_statistics),
    ):  # fmt: skip
        if (record := read(name)) is not None:
            yield "docs/results.md", name.replace("_", " "), make(record)
    if (record := read("codecs")) is not None:
        plot(record, FIGURES / "codec_speed.png")
