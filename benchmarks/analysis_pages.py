"""The generated parts of docs/analysis.md, for pages.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import auto_ratio
from harness import RESULTS, read, read_all, table

from hf_actcompress.report.style import family, label

TITLES = {"minilm": "MiniLM (pretrained, new head) on CoLA",
          "mobilenetv2_100": "MobileNetV2 (random weights) on CIFAR-10",
          "efficientnet-lite0": "EfficientNet-Lite0 (pretrained, new head) on CIFAR-10"}  # fmt: skip


def parts() -> Iterator[tuple[str, str, str]]:
    page = "docs/analysis.md"
    if studies := read_all("sensitivity"):
        yield page, "sensitivity", "\n\n".join(map(sensitivity, studies))
    for name, make in (("analysis_cost", cost), ("warning_hits", hits), ("auto_error", errors)):
        if (record := read(name)) is not None:
            yield page, name.replace("_", " "), make(record)
    if any((RESULTS / "auto_ratio").glob("*/*.json")):
        yield page, "auto ratio", auto()


def sensitivity(record: dict[str, Any]) -> str:
    name = record["model"].replace("-", "_")
    rows = record["map"]
    plain = [codec for codec in record["codecs"] if "bits=" in codec and "|" not in codec]
    bits = sorted({int(codec.partition("bits=")[2].split(",")[0]) for codec in plain})
    families = list(dict.fromkeys(map(family, plain)))
    head = [f"{record['model']}, {record['batch_size']} rows"]
    head += [f"{way}, {b} bits" for way in ("forward", "backward") for b in bits]
    lines = []
    for each in families:
        cells = []
        for direction in ("forward", "backward"):
            for b in bits:
                own = {codec for codec in plain if family(codec) == each and f"bits={b}," in f"{codec},"}
                errors = [r["layer_error"] for r in rows if r["direction"] == direction and r["codec"] in own]
                cells.append(f"{_percent(math.exp(sum(map(math.log, errors)) / len(errors)))} %" if errors else "")
        lines.append((each, *cells))
    title = TITLES.get(record["model"], record["model"])
    figures = {"sensitivity_map": "error of the gradient for each cut and codec",
               "histograms": "values before and after", "error_against_bits": "error against bits",
               "error_growth": "error along the depth"}
    shown = "\n\n".join(f"![{title}: {what}](figures/{kind}_{name}.png)" for kind, what in figures.items())
    worst = [max((r for r in rows if r["direction"] == direction), key=lambda r: r["layer_error"] or 0)
             for direction in ("forward", "backward")]  # fmt: skip
    return (
        f"### {title}\n\n{shown}\n\nError of the gradient, geometric mean over the layers (one cut at a time; "
        f"{record['batches']} batch of {record['batch_size']}; `{record['command']}`):\n\n"
        + table(head, lines, "l") + "\n\n"
        f"Worst cell: forward {label(worst[0]['codec'])} after layer {worst[0]['layer']}, "
        f"{worst[0]['layer_error']:.2g}; backward {label(worst[1]['codec'])} after layer {worst[1]['layer']}, "
        f"{worst[1]['layer_error']:.2g}."
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.2g}"


def cost(rows: list[dict[str, Any]]) -> str:
    head = ("model, batch", "step, s", "a sample, in steps", "share at every 100th step", "share of a run",
            "a choice of `auto:ratio=8`, in steps", "share of a run")  # fmt: skip
    lines = []
    for row in rows:
        sample = row["steps_of_a_sample"]
        lines.append((
            f"{row['model']}, {row['batch_size']}", f"{row['step_seconds']:.2f}",
            f"{sample['median']:.2f} ({sample['least']:.2f} to {sample['most']:.2f})", f"{100 * row['share']:.1f} %",
            f"{100 * row['run_share']:.1f} % of {row['run_steps']} steps", f"{row['auto_steps']:.0f}",
            f"{100 * row['auto_share']:.0f} % of {row['run_steps']} steps",
        ))  # fmt: skip
    return table(head, lines, "l") + (
        f"\n\n`python benchmarks/analysis_cost.py`, {rows[0]['threads']} CPU thread(s), fp32, two cuts, medians of "
        f"{rows[0]['repeats']}; the runs are those of benchmarks/accuracy.py."
    )


def hits(record: dict[str, Any]) -> str:
    rows = [[row[key] for key in ("task", "runs", "harmed", "warned", "caught")] for row in record["tasks"]]
    return table(("task", "runs", "harmed", "warned of", "of which harmed"), rows, "l") + (
        f"\n\n`python benchmarks/warning_hits.py`: the limit of {record['limit']:g} over the runs of docs/results.md. "
        "A run is harmed if it lost more than a tenth of what training without compression gains over a constant "
        "answer. The limit was chosen on the same runs."
    )


def errors(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        spreads = (row[key] for key in ("layer_error", "grad_error", "grad_cosine"))
        lines.append((row["task"], f"`{row['codec']}`", f"{row['ratio']:.2f}",
                      *(f"{spread['mean']:.3f} ± {spread['std']:.3f}" for spread in spreads)))  # fmt: skip
    head = ("task", "codec in both directions", "ratio", "error, mean of layers", "error, whole gradient", "cosine")
    chosen = "; ".join(
        f"{row['task']}: " + ", ".join(f"{name} {label(c['forward'])} forward and {label(c['backward'])} backward"
                                       for name, c in row["chosen"].items())
        for row in rows if "chosen" in row
    )  # fmt: skip
    return table(head, lines, "ll") + (
        "\n\n`python benchmarks/auto_error.py`: both cuts compressed at once, before training, on four batches other "
        f"than the one that was chosen by. Chosen: {chosen}."
    )


def auto() -> str:
    rows = [(task, f"`{row['codec']}`", f"{row['ratio']:.2f}", row["seeds"],
             *(auto_ratio.shown(row, side) for side in ("compressed", "plain")))
            for task in auto_ratio.TASKS for row in auto_ratio.rows(task)]  # fmt: skip
    head = ("task", "codec in both directions", "ratio", "seeds", "evaluated compressed", "evaluated plain")
    return table(head, rows, "ll") + (
        "\n\n`python benchmarks/auto_ratio.py`: CoLA by Matthews correlation, CIFAR-10 by accuracy; settings of "
        "benchmarks/accuracy.py (two cuts), ± one standard deviation over seeds."
    )
