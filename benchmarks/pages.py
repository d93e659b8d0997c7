"""Fill the generated parts of the pages in docs/ and of README.md from benchmarks/results.

    python benchmarks/pages.py

Each part stands between <!-- generated: NAME --> and <!-- end: NAME -->.  A part whose JSON is not there yet stays as
it is.  The modules *_pages.py have `parts()`, which gives (page, name, text) of each part, and draw their figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import analysis_pages
import architecture_pages
import gpu_pages
import link_pages
import memory_pages
import predictor_pages
import speed_pages
import weights_pages
from harness import FIGURES, RESULTS, ROOT, arguments, read, table

from hf_actcompress.cli.report import TABLES as TABLE_MARKERS
from hf_actcompress.cli.report import draw
from hf_actcompress.report.comparison import comparison_section, find_indices, load_comparison
from hf_actcompress.report.records import load_records
from hf_actcompress.report.tables import accuracy_table, write_results_page

# The records keep the names that version 0.1 had for these codecs.
ROTATED = "block:bits={},rotate=hadamard,levels=gauss,allocate=energy"
TRELLIS = "block:bits=2,rotate=hadamard,levels=trellis,allocate=energy,patch=dct,prototypes=3"
# Label, codec of the text tasks, codec of the images where it is another (text has no patches).
README_CODECS = (
    *((c, c, c) for c in ("none", "uniform:bits=8", "uniform:bits=4", "sort:bits=8", "sort:bits=4", "kmeans:bits=4",
                          "topk:ratio=0.2", "block:bits=4")),
    *((f"rotated:bits={b}", ROTATED.format(b), ROTATED.format(b) + ",patch=dct") for b in (4, 3, 2)),
    ("trellis:bits=2", TRELLIS, TRELLIS),
)  # fmt: skip
TASKS = {"cola": "CoLA, MCC", "sst2": "SST-2, %", "cifar10": "CIFAR-10, %"}


def fill(page: Path, name: str, text: str) -> None:
    """Replace the part `name` of `page`."""
    begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    content = page.read_text()
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{page.name} needs {begin} and {end} once each.")
    head, rest = content.split(begin)
    page.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end)[1]}")


def codec_error(record: dict) -> str:
    """One row per codec, one column per tensor: error (median over features)."""
    tensors = list(record["shapes"])
    cells: dict[str, dict[str, str]] = {}
    for row in record["rows"]:
        cells.setdefault(row["codec"], {})[row["tensor"]] = f"{row['error']:.4f} ({row['median_feature_error']:.4f})"
    shapes = "; ".join(f"{name} {shape}" for name, shape in record["shapes"].items())
    rows = [(codec, *(values[t] for t in tensors)) for codec, values in cells.items()]
    return table(("codec", *tensors), rows, "l") + (
        f"\n\nSquared error over the variance within features, and in brackets its median over features. {shapes}. "
        f"`{record['command']}`."
    )


def schedule(record: dict) -> str:
    rows = []
    for name, run in record["runs"].items():
        ratios = "; ".join(f"{e}: {', '.join(map(str, v))}" for e, v in run["forward_ratios_by_epoch"].items())
        rows.append((name, ", ".join(f"{value:.3f}" for value in run["accuracy_by_epoch"]), ratios or "-"))
    return table(("codec", "accuracy after each epoch", "forward ratio by epoch"), rows, "lll") + (
        "\n\nA log line that spans the switch shows a ratio between the two."
    )


def metering(record: dict) -> str:
    rows = [(f"32 x {row['tokens']} tokens, n = {row['steps']}", f"{row['median_step_s']:.3f}",
             f"{1e3 * row['metering_s_per_step']:.3f}", f"{100 * row['share']:.3f} %")
            for row in record["rows"]]  # fmt: skip
    return table(("batch", "median step, s", "metering per step, ms", "share of the step"), rows, "l")


def gradient_noise(record: dict) -> str:
    rows = [(name, f"{row['change']:.2f}", f"{row['cosine']:.2f}") for name, row in record["rows"].items()]
    return table(("what differs", "change of the gradient", "cosine"), rows, "l")


def logit_noise(record: dict) -> str:
    keys = ("noise", "shift", "cosine", "cosine_of_mean")
    rows = [(row["codec"], row["cuts"], *(f"{row[key]:.2f}" for key in keys)) for row in record["rows"]]
    return table(("codec", "cuts", "noise", "shift", "cosine", "cosine of the mean"), rows, "ll")


def summary() -> str:
    """The README's table: the forward ratio of each codec and the metric of each task."""
    results, rows = accuracy_table(load_records(RESULTS / "accuracy")), []
    for codec, text_codec, image_codec in README_CODECS:
        wanted = {task: image_codec if task == "cifar10" else text_codec for task in TASKS}
        found = {row["task"]: row for row in results if row["codec"] == wanted.get(row["task"])}
        if not found:
            continue
        variant = "plain" if codec == "none" else "compressed"
        cells = [_metric(found[task], task, variant) if task in found else "" for task in TASKS]
        text = next((found[task] for task in TASKS if task in found), {})
        label = f"`{codec}`" + ("" if text.get("grad_codec") in (codec, "none") else " ¹")
        rows.append((label, f"{text['ratio']:.1f}", *cells))
    return table(("forward codec", "ratio (MiniLM)", *TASKS.values()), rows, "l") + (
        "\n\n¹ gradients at 8 bits with stochastic rounding; the others compress both directions alike. ± over seeds "
        "where there are several. Fine-tuned on 2 CPU cores, fp32, two cuts: MiniLM after block 0 and before the last "
        "block, EfficientNet-Lite0 (CIFAR-10, 5,000 images at 96 px) after the stem and before the head."
    )


def _metric(row: dict, task: str, variant: str) -> str:
    scale, digits = (1, 3) if task == "cola" else (100, 1)
    mean, std = row[variant], row[f"{variant}_std"]
    if mean is None:
        return ""
    return f"{scale * mean:.{digits}f}" + ("" if std is None else f" ± {scale * std:.{digits}f}")


def parts() -> Iterator[tuple[str, str, str]]:
    makers: dict[str, Any] = {
        "codec_error": codec_error, "logit_noise": logit_noise, "gradient_noise": gradient_noise,
        "schedule": schedule, "metering": metering,
    }  # fmt: skip
    for name, make in makers.items():
        if (record := read(name)) is not None:
            yield "docs/results.md", name.replace("_", " "), make(record)
    yield "README.md", "summary", summary()


def main() -> None:
    arguments(__doc__).parse_args()
    page = ROOT / "docs" / "results.md"
    records = load_records(RESULTS / "accuracy")
    tables = [load_comparison(path) for path in find_indices(RESULTS / "tables")]
    write_results_page(page, records, draw(records, tables, FIGURES))
    write_results_page(page, text="\n\n".join(map(comparison_section, tables)), markers=TABLE_MARKERS)
    modules = (speed_pages, gpu_pages, memory_pages, architecture_pages, link_pages, weights_pages, analysis_pages,
               predictor_pages)  # fmt: skip
    for generated in (parts, *(module.parts for module in modules)):
        for file, name, text in generated():
            fill(ROOT / file, name, text)


if __name__ == "__main__":
    main()
