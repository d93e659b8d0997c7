"""Tables of what concerns GPUs: what ran on one, and what is known without one (results/kernels_compiled.json)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from harness import read, table


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


def parts() -> Iterator[tuple[str, str, str]]:
    for name, make in (
        ("gpu_memory", gpu_memory), ("training_cuda", gpu_training), ("codecs_cuda", gpu_codecs), ("gpu", gpu),
    ):  # fmt: skip
        if (record := read(name)) is not None:
            yield "docs/gpu.md", name.replace("_", " "), make(record)
    if (record := read("kernels_compiled")) is not None:
        yield "docs/gpu.md", "launches", launches(record)
        yield "docs/gpu.md", "compiled kernels", compiled(record)
