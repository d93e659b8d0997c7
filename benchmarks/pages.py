"""Fill the generated parts of the pages in docs/ and of README.md from benchmarks/results.

    python benchmarks/pages.py

Each part stands between <!-- generated: NAME --> and <!-- end: NAME -->.  A part whose JSON is not there yet stays as
it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import analysis_pages
import card_pages
import gpu_pages
import link_pages
import memory_pages
import pipeline_pages
import predictor_pages
import speed
import weights_pages

from hf_actcompress.cli.report import TABLES as TABLE_MARKERS
from hf_actcompress.cli.report import draw
from hf_actcompress.report.comparison import comparison_section, find_indices, load_comparison
from hf_actcompress.report.tables import accuracy_table, load_records, write_results_page

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROTATED = "block:bits={},rotate=hadamard,levels=gauss,allocate=energy"
TRELLIS = "block:bits=2,rotate=hadamard,levels=trellis,allocate=energy,patch=dct,prototypes=3"
# Label, codec of the text tasks, codec of the images where it is another (patches are nothing to text).
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


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def codec_error(record: dict) -> str:
    """One row per codec, one column per tensor: error (median over features)."""
    tensors = list(record["shapes"])
    cells: dict[str, dict[str, str]] = {}
    for row in record["rows"]:
        cells.setdefault(row["codec"], {})[row["tensor"]] = f"{row['error']:.4f} ({row['median_feature_error']:.4f})"
    lines = ["| codec | " + " | ".join(tensors) + " |", "| --- |" + " ---: |" * len(tensors)]
    lines += [f"| {codec} | " + " | ".join(values[t] for t in tensors) + " |" for codec, values in cells.items()]
    shapes = "; ".join(f"{name} {shape}" for name, shape in record["shapes"].items())
    return "\n".join(lines) + (
        f"\n\nSquared error over the variance within features, and in brackets its median over features. {shapes}. "
        f"`{record['command']}`."
    )


def schedule(record: dict) -> str:
    lines = ["| codec | accuracy after each epoch | forward ratio by epoch |", "| --- | --- | --- |"]
    for name, run in record["runs"].items():
        accuracy = ", ".join(f"{value:.3f}" for value in run["accuracy_by_epoch"])
        ratios = "; ".join(f"{e}: {', '.join(map(str, v))}" for e, v in run["forward_ratios_by_epoch"].items())
        lines.append(f"| {name} | {accuracy} | {ratios or '-'} |")
    return "\n".join(lines) + "\n\nA log line that spans the switch shows a ratio between the two."


def metering(record: dict) -> str:
    lines = ["| batch | median step, s | metering per step, ms | share of the step |", "| --- | ---: | ---: | ---: |"]
    for row in record["rows"]:
        lines.append(
            f"| 32 x {row['tokens']} tokens, n = {row['steps']} | {row['median_step_s']:.3f} | "
            f"{1e3 * row['metering_s_per_step']:.3f} | {100 * row['share']:.3f} % |"
        )
    return "\n".join(lines)


def gradient_noise(record: dict) -> str:
    lines = ["| what differs | change of the gradient | cosine |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {row['change']:.2f} | {row['cosine']:.2f} |" for name, row in record["rows"].items()]
    return "\n".join(lines)


def logit_noise(record: dict) -> str:
    lines = ["| codec | cuts | noise | shift | cosine | cosine of the mean |", "| --- | --- |" + " ---: |" * 4]
    for row in record["rows"]:
        numbers = (f"{row[k]:.2f}" for k in ("noise", "shift", "cosine", "cosine_of_mean"))
        lines.append(f"| {row['codec']} | {row['cuts']} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def summary() -> str:
    """The README's table: the forward ratio of each codec and the metric of each task."""
    rows = accuracy_table(load_records(RESULTS / "accuracy"))
    lines = ["| forward codec | ratio (MiniLM) | " + " | ".join(TASKS.values()) + " |", "| --- |" + " ---: |" * 4]
    for codec, text_codec, image_codec in README_CODECS:
        wanted = {task: image_codec if task == "cifar10" else text_codec for task in TASKS}
        found = {row["task"]: row for row in rows if row["codec"] == wanted.get(row["task"])}
        if not found:
            continue
        cells = []
        for task in TASKS:
            row = found.get(task)
            cells.append("" if row is None else _metric(row, task, "plain" if codec == "none" else "compressed"))
        text = next((found[t] for t in ("cola", "sst2", "cifar10") if t in found), {})
        backward = text.get("grad_codec")
        label = f"`{codec}`" + ("" if backward in (codec, "none") else " ¹")
        lines.append(f"| {label} | {text['ratio']:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
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


def main() -> None:
    page, readme = ROOT / "docs" / "results.md", ROOT / "README.md"
    records = load_records(RESULTS / "accuracy")
    tables = [load_comparison(path) for path in find_indices(RESULTS / "tables")]
    write_results_page(page, records, draw(records, tables, ROOT / "docs" / "figures"))
    write_results_page(page, text="\n\n".join(map(comparison_section, tables)), markers=TABLE_MARKERS)
    parts = {"codec_error": codec_error, "logit_noise": logit_noise, "gradient_noise": gradient_noise,
             "schedule": schedule, "metering": metering, "codecs": speed.codecs,
             "training": speed.training, "boundary_profile": speed.boundary,
             "kernels": speed.kernels}  # fmt: skip
    for name, make in parts.items():
        record = load(name)
        if record is not None:
            fill(page, name.replace("_", " "), make(record))
    fill(readme, "summary", summary())
    for name, result in (load("predictor") or {}).items():
        if name in ("short", "long"):
            fill(ROOT / "docs" / "predictor.md", f"predictor {name}", predictor_pages.section(result))
    memory, record = ROOT / "docs" / "memory.md", load("memory")
    if record is not None and memory_pages.models(record):
        fill(memory, "memory", memory_pages.section(record))
        fill(readme, "memory summary", memory_pages.summary(record))
        memory_pages.plot(record, ROOT / "docs" / "figures" / "memory.png")
    record = load("saved_gradient_error")
    if record is not None:
        fill(memory, "gradient error", memory_pages.gradient_error(record))
    if (RESULTS / "saved").is_dir():
        runs = load_records(RESULTS / "saved"), load_records(RESULTS / "accuracy")
        fill(memory, "saved accuracy", memory_pages.accuracy(*runs))
    link_pages.fill(sys.modules[__name__])
    weights_pages.fill_all(fill, ROOT)
    card_pages.fill_all(fill, ROOT / "docs" / "weights.md")
    analysis_pages.fill_all(fill)
    gpu_pages.fill_all(sys.modules[__name__])
    record = load("codecs")
    if record is not None:
        speed.plot(record, ROOT / "docs" / "figures" / "codec_speed.png")
    pipeline_pages.fill(sys.modules[__name__])


if __name__ == "__main__":
    main()
