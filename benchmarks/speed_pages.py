"""Tables and a plot of what was timed: results/{codecs,training,boundary_profile,operators}.json, and of GPUs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness import FIGURES, against, read, table

from hf_actcompress.report.style import STYLES, make_figure, save_figure, style_of

# What encode and decode may cost at 64 MiB in fp32, in clones.
ALLOWED = {
    **{f"{name}:bits={bits}": (1.2, 1.2) for name in ("uniform", "block") for bits in (8, 4, 2)},
    "block:bits=2,rotate=hadamard": (2.0, 2.0), "sort:bits=8": (2.2, 1.6), "kmeans:bits=4": (2.2, 1.6),
    "topk:ratio=0.1": (4.0, 2.0), "lowrank:rank=8": (3.0, 2.0), "lowrank:rank=8 [m, 32]": (3.0, 2.0),
}  # fmt: skip
GROWTH = 1.3  # time per byte at 1 GiB over that at 16 MiB
FASTER = {"sort:bits=8": 30, "kmeans:bits=4": 50}  # than the plain versions
SHARE = 0.97  # of the throughput of training without compression; low-rank 0.95
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
DRAWN = (
    "uniform:bits=8", "block:bits=4", "block:bits=2,rotate=hadamard", "sort:bits=8", "kmeans:bits=4",
    "topk:ratio=0.1", "lowrank:rank=8", "float8",
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
        f"In a new process, {name}, encode and decode: "
        + "; ".join(f"{label} {seconds:.2f} s" for label, seconds in calls.items()) + "."
        for name, calls in record.get("compilation", {}).items()
    ]  # fmt: skip
    return "\n\n".join(part for part in found_parts if part)


def _clones(time: dict[str, float]) -> str:
    return f"{time['clones']:.2f} ({time['clones_p10']:.2f}-{time['clones_p90']:.2f})"


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


def gpu_memory(record: dict[str, Any]) -> str:
    rows = []
    for key, methods in record.items():
        if not isinstance(methods, dict) or "none" not in methods:
            continue
        plain = methods["none"]["held_mb"]
        for name, row in methods.items():
            share = "-" if name == "none" else f"1/{plain / row['held_mb']:.1f}" if row["held_mb"] else "0"
            time = f"{row['multiple']:.2f}" if "multiple" in row else "not timed"
            rows.append((key, name, f"{row['held_mb']:,.0f}", share, f"{row['peak_mb']:,.0f}", time))
    head = ("model, batch, precision", "method", "held, MB", "of none", "peak of a step, MB", "step, in plain steps")
    return table(head, rows, "ll") + _source(record, " of version 0.1")


def gpu_training(record: dict[str, Any]) -> str:
    rows = []
    for model, found in record["models"].items():
        for r in found:
            low, high = r["of_none_range"]
            share = f"{r['of_none']:.2f} ({low:.2f} to {high:.2f})" if r["codec"] != "none" else "1"
            rows.append((model, f"`{r['codec']}`", f"{r['samples_per_second']:,.0f}", share))
    head = ("model, batch", "codec in both directions", "samples/s", "of none")
    return table(head, rows, "ll") + _source(record, " of version 0.1")


def gpu_codecs(record: dict[str, Any]) -> str:
    rows = [(key, f"{row['encode']['ms']:.2f}", f"{row['decode']['ms']:.2f}", f"{row['clone']['ms']:.3f}",
             f"{row['bytes'] / row['encode']['ms'] / 1e6:.0f}") for key, row in record["sizes"].items()]  # fmt: skip
    head = ("size, dtype, codec", "encode, ms", "decode, ms", "clone, ms", "encode, GB/s")
    return table(head, rows, "l") + _source(record, " of version 0.1")


def gpu(record: dict[str, Any]) -> str:
    """What benchmarks/gpu.py measured."""
    texts = []
    if found := record.get("training"):
        rows = [(key, f"{r['tokens_per_second']:,.0f}", f"{r['of_none']:.3f} ({r['of_none_range'][0]:.3f}-"
                 f"{r['of_none_range'][1]:.3f})", r["launches"]) for key, r in found.items()]  # fmt: skip
        texts.append(table(("model, batch, codec", "tokens/s", "of none (range)", "launches of a step"), rows, "l"))
    if found := record.get("memory"):
        rows = []
        for key, r in found.items():
            unit = next(name for name in r if name.endswith("_per_second"))
            speed = f"{r[unit]:,.0f} {unit.removesuffix('_per_second')}"
            rows.append((key, f"{r['held'] / 1e6:,.0f}", f"{r['peak'] / 1e6:,.0f}", speed))
        texts.append(table(("model, batch, method", "held, MB", "peak of a step, MB", "per second"), rows, "l"))
    if found := record.get("codecs"):
        ways = ("clone", "encode", "decode", "roundtrip")
        rows = [(key, *(f"{r[way]['gb_per_s']:,.0f}" for way in ways), f"{r['encode']['of_clone']:.2f}",
                 f"{r['decode']['of_clone']:.2f}") for key, r in found.items()]  # fmt: skip
        head = ("size, dtype, codec", *(f"{way}, GB/s" for way in ways), "encode / clone", "decode / clone")
        texts.append(table(head, rows, "l"))
    cut = f" Cut: {', '.join(record['cut'])}." if record["cut"] else ""
    return "\n\n".join(texts) + _source(record) + cut


def launches(record: dict[str, Any]) -> str:
    """Launches of codecs and of steps, ours and torch's."""
    both = "{0[0]} + {0[1]}".format
    rows = [(f"`{spec}`", *(both(found[way]) for way in ("encode", "decode", "roundtrip")))
            for spec, found in record["launches"].items()]  # fmt: skip
    texts = [table(("codec, fp32 [32, 128, 384]", "encode", "decode", "roundtrip"), rows, "l")]
    if plain := record["steps"].get("none"):
        rows = [(name, both(found), sum(found) - sum(plain)) for name, found in record["steps"].items()]
        texts.append(table(("step of a BERT of 2 layers, batch 32x128", "launches", "more than without"), rows, "l"))
    text = "Kernels of the package + operations of torch. `" + record["command"] + "`, without a GPU."
    return "\n\n".join([*texts, text])


def compiled(record: dict[str, Any]) -> str:
    """Registers, spills and shared memory of each kernel, over its variants (dtypes, bits, sizes)."""
    groups: dict[str, list[dict[str, dict[str, int]]]] = {}
    for key, row in record["kernels"].items():
        groups.setdefault(f"`{key.split()[0]}`: {', '.join(row['operators'])}", []).append(row["targets"])
    targets = list(next(iter(record["kernels"].values()))["targets"])
    rows = []
    for name, variants in groups.items():
        used = [_span(v[target]["registers"] for v in variants) for target in targets]
        uses = [use for v in variants for use in v.values()]
        rows.append((name, len(variants), *used, max(use["spilled"] for use in uses), max(u["shared"] for u in uses)))
    head = ("kernel: operators", "variants", *(f"registers, {target}" for target in targets), "spilled, bytes",
            "shared memory, bytes")  # fmt: skip
    return table(head, rows, "l") + f"\n\n`{record['command']}`, Triton {record['triton']}, without a GPU."


def _span(values: Iterable[int]) -> str:
    least, *_, most = sorted([*(found := list(values)), found[0]])
    return f"{least}" if least == most else f"{least}-{most}"


def _source(record: dict[str, Any], version: str = "") -> str:
    about = record["environment"]
    note = f" {record['note'][0].upper()}{record['note'][1:]}." if "note" in record else ""
    return f"\n\n`{record['command']}`{version}, {about['accelerator']}, torch {about['torch']}.{note}"


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
                    linestyle="--" if "rotate" in codec else "-", markeredgecolor="white", markeredgewidth=0.5,
                    label=codec.replace(",rotate=hadamard", ", rotated"))  # fmt: skip
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
    for page, name, make in (
        ("results", "codecs", codecs), ("results", "training", training),
        ("results", "boundary_profile", boundary), ("results", "operators", operators),
        ("gpu", "gpu_memory", gpu_memory),
        ("gpu", "training_cuda", gpu_training), ("gpu", "codecs_cuda", gpu_codecs), ("gpu", "gpu", gpu),
    ):  # fmt: skip
        if (record := read(name)) is not None:
            yield f"docs/{page}.md", name.replace("_", " "), make(record)
    if (record := read("kernels_compiled")) is not None:
        yield "docs/gpu.md", "launches", launches(record)
        yield "docs/gpu.md", "compiled kernels", compiled(record)
    if (record := read("codecs")) is not None:
        plot(record, FIGURES / "codec_speed.png")
