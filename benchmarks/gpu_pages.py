"""Tables of what was measured on a GPU, for docs/gpu.md: from gpu_memory, training_cuda and codecs_cuda.json."""

from __future__ import annotations

from typing import Any


def held(record: dict[str, Any]) -> str:
    lines = ["| model, batch, precision | method | held, MB | of none | peak of a step, MB | step, in plain steps |",
             "| --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for key, methods in record.items():
        if not isinstance(methods, dict) or "none" not in methods:
            continue
        plain = methods["none"]["held_mb"]
        for name, row in methods.items():
            share = "-" if name == "none" else f"1/{plain / row['held_mb']:.1f}" if row["held_mb"] else "0"
            time = f"{row['multiple']:.2f}" if "multiple" in row else "not timed"
            lines.append(f"| {key} | {name} | {row['held_mb']:,.0f} | {share} | {row['peak_mb']:,.0f} | {time} |")
    return "\n".join(lines) + _source(record)


def training(record: dict[str, Any]) -> str:
    lines = ["| model, batch | codec in both directions | samples/s | of none |", "| --- | --- | ---: | ---: |"]
    for model, rows in record["models"].items():
        for r in rows:
            low, high = r["of_none_range"]
            share = f"{r['of_none']:.2f} ({low:.2f} to {high:.2f})" if r["codec"] != "none" else "1"
            lines.append(f"| {model} | `{r['codec']}` | {r['samples_per_second']:,.0f} | {share} |")
    return "\n".join(lines) + _source(record)


def codecs(record: dict[str, Any]) -> str:
    lines = ["| size, dtype, codec | encode, ms | decode, ms | clone, ms | encode, GB/s |",
             "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for key, row in record["sizes"].items():
        speed = row["bytes"] / row["encode"]["ms"] / 1e6
        lines.append(f"| {key} | {row['encode']['ms']:.2f} | {row['decode']['ms']:.2f} | {row['clone']['ms']:.3f} | "
                     f"{speed:.0f} |")  # fmt: skip
    return "\n".join(lines) + _source(record)


def _source(record: dict[str, Any]) -> str:
    about = record["environment"]
    note = f" {record['note'][0].upper()}{record['note'][1:]}." if "note" in record else ""
    return f"\n\n`{record['command']}`, {about['accelerator']}, torch {about['torch']}.{note}"


def fill_all(pages: Any) -> None:
    page = pages.ROOT / "docs" / "gpu.md"
    for name, make in (("gpu_memory", held), ("training_cuda", training), ("codecs_cuda", codecs)):
        record = pages.load(name)
        if record is not None:
            pages.fill(page, name.replace("_", " "), make(record))
