"""Tables and figures of results/lenet_lc, results/bert_codebook and results/lenet_search, for pages.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hf_actcompress.workloads.fronts import Point, pareto, plot, table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "mnist"))

from search import point  # noqa: E402

# What was asked for: name -> (error in %, times smaller); published figures of the reference report.
TARGETS = {"target-26": (0.51, 26.4), "target-37": (0.53, 37.7), "target-47": (0.67, 47.0), "front-100": (0.70, 100.0)}
PUBLISHED: list[Point] = [(26.4, 0.51, ""), (37.7, 0.53, ""), (47.0, 0.67, ""), (17.0, 0.78, "")]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _scheme(record: dict[str, Any]) -> str:
    return "; ".join(f"`{pattern}` {spec}" for pattern, spec in record["scheme"].items())


def _row(record: dict[str, Any]) -> str:
    over = 100 * (8 * record["file_bytes"] / record["bits"] - 1)
    return (f"| {_scheme(record)} | {record['direct_error']:.2f} | {record['error']:.2f} | {record['ratio']:.1f} | "
            f"{record['file_bytes']:,} ({over:+.1f} %) | {record['epochs']:g} |")  # fmt: skip


HEAD = ["| compression | direct, % | learned, % | smaller by | file, bytes | epochs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
FRONT_RUNS = ("front-", "k4-", "k8-")


def targets(runs: dict[str, dict[str, Any]]) -> str:
    lines = ["| asked | reached | how |", "| --- | --- | --- |"]
    for name, (error, ratio) in TARGETS.items():
        run = runs.get(name)
        if run is None:
            lines.append(f"| {error:.2f} % at {ratio:g}x | not run yet | |")
            continue
        # Any run at least as small counts.
        better = [r for r in runs.values() if r["ratio"] >= ratio]
        best = min([run, *better], key=lambda r: (r["ratio"] < ratio, r["error"]))
        met = best["error"] <= error + 1e-9 and best["ratio"] >= ratio
        lines.append(f"| {error:.2f} % at {ratio:g}x | {best['error']:.2f} % at {best['ratio']:.1f}x"
                     f"{'' if met else ' **missed**'} | {_scheme(best)} |")  # fmt: skip
    return "\n".join(lines)


def lenet(runs: dict[str, dict[str, Any]]) -> str:
    references = sorted({r["reference_error"] for r in runs.values()})
    parts = [
        f"Dense reference: {' or '.join(f'{e:.2f}' for e in references)} % test error (the JSON says which run "
        "started from which), 431,080 parameters, 1,724,320 bytes. Each run: so many epochs from there as its row "
        "says, ten C steps an epoch, the floats alone in the last fifth, one seed; the file was saved, loaded and "
        "evaluated. "
        "Direct: compression without training. 0.01 % is one picture of 10,000; at 0.6 % one standard deviation is "
        "0.08.",
        targets(runs),
    ]
    groups = {"Pruning, and a codebook for what stays": FRONT_RUNS, "Targets": "target-", "Codebooks": "codebook-",
              "Pruning": "prune-", "Low rank": "lowrank-", "Pairs of convolutions and linear layers": "mix-",
              "Sums, binary, ternary": ("sum-", "binary", "ternary")}  # fmt: skip
    for title, start in groups.items():
        rows = sorted((r for name, r in runs.items() if name.startswith(start)), key=lambda r: r["ratio"])
        if rows:
            parts += [f"**{title}**", "\n".join([*HEAD, *map(_row, rows)])]
    return "\n\n".join(parts)


def lenet_plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    kinds = {"codebook 2..64": "codebook-", "pruning": "prune-", "low rank": "lowrank-",
             "pruning + 16 values": "front-", "pruning + 4 or 8 values": ("k4-", "k8-"),
             "pairs": ("mix-", "target-")}  # fmt: skip
    groups = {}
    for label, start in kinds.items():
        points = [(r["ratio"], r["error"], name) for name, r in runs.items() if name.startswith(start)]
        if points:
            groups[label] = points
    plot(groups, path, dense=min(r["reference_error"] for r in runs.values()), published=PUBLISHED,
         joined=groups.keys() - {"pairs"})  # they are no curve


def bert(runs: dict[str, dict[str, Any]]) -> str:
    lines = ["| run | dense, % | accuracy, % | lost, points | after each epoch | direct, % | "
             "compressed layers smaller by | whole model |",
             "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |"]  # fmt: skip
    for name, r in runs.items():
        epochs = ", ".join(f"{100 * a:.1f}" for a in r["by_epoch"])
        rest = (f"{100 * r['direct_accuracy']:.2f} | {r['layers_ratio']:.2f} | {r['ratio']:.2f}"
                if "direct_accuracy" in r else "| |")  # fmt: skip
        dense, own = 100 * r["dense_accuracy"], 100 * r["accuracy"]
        lines.append(f"| {name} | {dense:.2f} | {own:.2f} | {dense - own:.2f} | {epochs} | {rest} |")
    return "\n".join(lines)


def search(folder: Path, path: Path) -> str:
    """The front of all samplers' trials; the picture goes to `path`."""
    trials = [record for records in load(folder).values() for record in records]
    groups: dict[str, list[Point]] = {}
    for record in trials:
        groups.setdefault(record["sampler"], []).append(point(record))
    plot(groups, path, dense=trials[0]["reference_error"], joined=False)
    counts = ", ".join(f"{len(points)} trials by {sampler}" for sampler, points in groups.items())
    return (f"{table(pareto([p for points in groups.values() for p in points]))}\n\nThe front of {counts}, "
            f"{trials[0]['epochs']:g} epochs each.")  # fmt: skip


FRONT = "![Test error against compression of LeNet5](figures/lenet_front.png)"
TRIALS = "![Trials of the search](figures/lenet_search.png)"


def fill_all(fill: Any, root: Path) -> None:
    """Fill the parts of docs/results.md whose JSON is there."""
    page, results, figures = root / "docs" / "results.md", root / "benchmarks" / "results", root / "docs" / "figures"
    runs = load(results / "lenet_lc")
    if runs:
        fill(page, "lenet", f"{FRONT}\n\n{lenet(runs)}")
        lenet_plot(runs, figures / "lenet_front.png")
    runs = load(results / "bert_codebook")
    if runs:
        fill(page, "bert codebook", bert(runs))
    if (results / "lenet_search").is_dir():
        trials = search(results / "lenet_search", figures / "lenet_search.png")
        fill(page, "lenet search", f"{TRIALS}\n\n{trials}")
