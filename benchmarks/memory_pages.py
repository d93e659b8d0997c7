"""Tables and a plot of benchmarks/results/memory.json and what trains with saved=, for pages.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from harness import FIGURES, RESULTS, mean_std, read

from hf_actcompress.report.style import make_figure, save_figure

# method: colour, marker
STYLES = {
    "none": ("#555555", "o"), "saved 8": ("#9ecae1", "o"), "saved 4": ("#3182bd", "o"), "saved 2": ("#08306b", "o"),
    "checkpointing": ("#e6550d", "o"), "save_on_cpu": ("#bdbdbd", "o"), "checkpointing + saved 4": ("#31a354", "o"),
    "compiled": ("#555555", "D"), "compiled, saved 8": ("#9ecae1", "D"), "compiled, saved 4": ("#3182bd", "D"),
    "compiled, saved 2": ("#08306b", "D"), "compiled, budget 0.5": ("#fdae6b", "D"),
    "compiled, budget 0.2": ("#e6550d", "D"), "compiled, budget 0.2, saved 8": ("#a1d99b", "D"),
    "compiled, budget 0.2, saved 4": ("#31a354", "D"),
}  # fmt: skip


def models(record: dict[str, Any]) -> list[str]:
    """Those of which both parts were measured."""
    timed = [key.removeprefix("time ") for key in record if key.startswith("time ")]
    timed = [model for model in timed if not model.endswith((" bf16", "]"))]
    return [model for model in timed if all(f"held {model} {method}" in record for method in ("none", "saved 4"))]


def methods(record: dict[str, Any], model: str) -> list[str]:
    found = [key.removeprefix(f"held {model} ") for key in record if key.startswith(f"held {model} ")]
    return sorted((method for method in found if method in STYLES), key=list(STYLES).index)


def table(record: dict[str, Any]) -> str:
    head = ("model", "", "held, MB", "times less", "gradient error", "step", "over compiled",
            "over none, default malloc", "peak: tensors, MB", "peak: resident, MB", "largest batch")  # fmt: skip
    rows = []
    for model in models(record):
        none = record[f"held {model} none"]["held_mb"]
        for method in methods(record, model):
            held, time = record[f"held {model} {method}"], record[f"time {model}"].get(method)
            batch, error = (record.get(f"{part} {model} {method}") for part in ("batch", "error"))
            others = ["" if time is None or key not in time else f"{time[key]:.2f}"
                      for key in ("of compiled", "of default")]  # fmt: skip
            rows.append((model, method, f"{held['held_mb']:.0f}", f"{none / held['held_mb']:.1f}",
                         "" if error is None or error["error"] < 1e-4 else f"{error['error']:.3f}",
                         "" if time is None else _step(time), *others,
                         f"{held['live_peak_mb']:.0f}", f"{held['peak_mb']:.0f}",
                         "" if batch is None else batch["rows"]))  # fmt: skip
    return harness.table(head, rows, "ll")


def _step(time: dict[str, Any]) -> str:
    low, high = time["multiple, quartiles"]
    return f"{time['multiple']:.2f} ({low:.2f}-{high:.2f})"


def autocast(record: dict[str, Any]) -> str:
    names = [key for key in record if key.startswith("time ") and key.endswith(" bf16")]
    if not names:
        return ""
    every = list(dict.fromkeys(method for name in names for method in record[name] if not method.endswith("]")))
    rows = [(name.removeprefix("time ").removesuffix(" bf16"),
             *(_step(record[name][m]) if m in record[name] else "" for m in every)) for name in names]  # fmt: skip
    return harness.table(("bf16 autocast, step in plain steps", *every), rows, "l")


def allocators(record: dict[str, Any]) -> str:
    """Steps and peaks of resident memory by what malloc does.  Of "large pieces returned" no steps were timed."""
    # name: endings of the keys of what was timed, and of what is held
    kinds = {"glibc's default": (" [default]", " [default]"), "glibc, freed memory kept": ("", " [kept]"),
             "glibc, large pieces returned": (None, ""),
             "tcmalloc": (" [libtcmalloc_minimal.so.4]", " [libtcmalloc_minimal.so.4]")}  # fmt: skip
    shown = ("none", "saved 4", "checkpointing")
    head, rows = ["", "malloc"], []
    for what in ("step, ms", "peak resident, MB"):
        head += [f"{what}: {shown[0]}", *shown[1:]]
    for model in models(record):
        if f"held {model} [kept] none" not in record:
            continue
        for kind, (timed, held) in kinds.items():
            cells = []
            for method in shown:
                time = record.get(f"time {model}{timed}", {}).get(method)
                multiple = "" if time is None or method == "none" else f" = {time['multiple']:.2f}"
                cells.append("" if time is None else f"{time['ms']:.0f}{multiple}")
            peaks = [record.get(f"held {model}{held} {method}") for method in shown]
            cells += ["" if peak is None else f"{peak['peak_mb']:.0f}" for peak in peaks]
            rows.append((model, kind, *cells))
    return harness.table(head, rows, "ll") if rows else ""


def section(record: dict[str, Any]) -> str:
    n = {record[f"time {model}"]["none"]["n"]: None for model in models(record)}
    about = ", ".join(f"{k} {v}" for k, v in sorted(record["environment"].items()) if v is not None)
    return "\n\n".join(part for part in (
        table(record),
        "held: median of three. step: time over that of the plain step of the same round and malloc, which keeps what "
        f"is freed, median of {' or '.join(map(str, n))} (quartiles); then over the compiled step, and over the plain "
        "one with glibc's default. gradient error: |g' - g| / |g| against plain eager mode. "
        "largest batch: rows whose step peaks at no more than the plain step of the batch in the first column. "
        f"{_searches(record)}`{record['command']}`. Environment: {about}.",
        limits(record),
        autocast(record),
        allocators(record),
    ) if part)  # fmt: skip


def _searches(record: dict[str, Any]) -> str:
    """Which batches were searched for in one process."""
    own = [model for model in models(record) for method in methods(record, model)
           if "processes" not in record.get(f"batch {model} {method}", {"processes": None})]  # fmt: skip
    if not own:
        return "Every size that was tried had its own process. "
    return (
        "Every size that was tried had its own process, but for some methods of "
        f"{', '.join(dict.fromkeys(own))}, where those of one "
        "search shared theirs: sizes before leave traces, and what is found tends to be too small. "
    )


def limits(record: dict[str, Any]) -> str:
    """Where the peak with 4 bits is, and what of it compression cannot reach."""
    shares = []
    for model in models(record):
        row = record[f"held {model} saved 4"]
        if "always_mb" in row:
            shares.append(f"{model} {row['always_mb']:.0f} of {row['live_peak_mb']:.0f} ({row['peak']})")
    return (
        "What limits the peak with 4 bits, as tensors: parameters, AdamW's moments and the batch, which are there all "
        f"the time, in MB {', '.join(shares)}. The rest is what is held by then, gradients of parameters, and what "
        "the largest layer has at hand in full: its input, its output, and in the backward pass the gradients of both."
    ) if shares else ""


def summary(record: dict[str, Any]) -> str:
    """The README's table: what is held, and the step, for a few methods."""
    shown = ("saved 4", "saved 2", "checkpointing")
    rows = []
    for model in models(record):
        none, cells = record[f"held {model} none"]["held_mb"], []
        for method in shown:
            held, time = record.get(f"held {model} {method}"), record[f"time {model}"].get(method)
            whole = held is not None and time is not None
            cells.append(f"1/{none / held['held_mb']:.1f}, step {time['multiple']:.2f}" if whole else "")
        rows.append((model, f"{none:.0f} MB", *cells))
    return harness.table(("model, fp32", "held without", *shown), rows, "l")


def gradient_error(record: dict[str, Any]) -> str:
    """Relative error of the gradient: all parameters, and the least and largest of the layers."""
    lines = []
    for model, found in record["models"].items():
        for spec, row in found.items():
            layers = sorted(v for k, v in row.items() if k not in ("all", "share held", "stem and head"))
            lines.append((model, spec, f"{row['share held']:.3f}", f"{row['all']:.3f}",
                          f"{layers[0]:.3f} to {layers[-1]:.3f}, median {statistics.median(layers):.3f}"))  # fmt: skip
    head = ("", "saved", "share held", "all parameters", "layers, least to largest")
    return harness.table(head, lines, "llrrl") + (
        f"\n\n|g' - g| / |g|, one batch; every layer stands in "
        f"benchmarks/results/saved_gradient_error.json. `{record['command']}`."
    )


def held(record: dict[str, Any]) -> str:
    """Bytes held and error of the gradient, a row per model."""
    lines = []
    for model, found in record["models"].items():
        cells = []
        for row in found.values():
            cells += [f"1/{row['raw_mb'] / row['held_mb']:.1f}", f"{row['error']:.3f}"]
        lines.append((model, f"{next(iter(found.values()))['raw_mb']:.1f}", *cells))
    bits = [spec.rpartition("=")[2] for spec in next(iter(record["models"].values()))]
    head = ("", "autograd, MB", *(f"{b} bits: {what}" for b in bits for what in ("held", "error")))
    return harness.table(head, lines, "l") + (
        f"\n\nHeld: as the site counts it. Error: |g' - g| / |g| over all parameters. "
        f"`{record['command']}`."
    )


TRAINED = {"sst2": "SST-2, MiniLM: accuracy", "cifar10": "CIFAR-10, EfficientNet-Lite0: accuracy",
           "llama": "Llama shape: held-out loss", "gpt2": "GPT-2 shape: held-out loss"}  # fmt: skip
LINES = {"none": ("#333333", "-"), "block:bits=8": ("#56B4E9", "-"), "block:bits=4": ("#D55E00", "-"),
         "block:bits=3": ("#E69F00", "--"), "block:bits=2": ("#CC79A7", "-"),
         "block:bits=4,round=stochastic": ("#D55E00", ":"), "block:bits=2,round=stochastic": ("#CC79A7", ":"),
         "auto:budget=0.07": ("#009E73", "--")}  # fmt: skip


def trained(records: list[dict[str, Any]]) -> str:
    """What training came to: mean and deviation over seeds, and the difference from none in deviations of none."""
    lines = []
    for task, label in TRAINED.items():
        runs: dict[str, dict[int, float]] = {}
        for record in (r for r in records if r["task"] == task):
            runs.setdefault(record["saved"], {})[record["seed"]] = _metric(record)
        none = runs.get("none", {})
        if len(none) < 2:
            continue
        for spec in sorted(runs, key=list(LINES).index):
            own = runs[spec]
            both = sorted(set(own) & set(none))
            away = statistics.fmean(own[k] - none[k] for k in both) if both else 0.0
            shown = ("", "") if spec == "none" else (f"{away:+.3f}", f"{away / statistics.stdev(none.values()):+.1f}")
            lines.append((label, spec, len(own), mean_std(list(own.values()), 3), *shown))
    head = ("task", "saved", "seeds", "mean ± deviation", "from none, same seeds", "in deviations of none")
    return harness.table(head, lines, "ll") + "\n\n`python benchmarks/saved_training.py`, no dropout."


def _metric(record: dict[str, Any]) -> float:
    found = record["metrics"]
    if "loss" in found and "accuracy" not in found:
        return found["loss"]
    return 100 * next(v for k in ("compressed", "plain") if (v := found["accuracy"].get(k)) is not None)


def curves(records: list[dict[str, Any]], path: Path) -> Path:
    """Loss over the steps of training from scratch: mean over seeds, smoothed over 20 steps."""
    figure, axes = make_figure(1, 2, 3.0)
    for ax, task in zip(axes, ("llama", "gpt2"), strict=True):
        for spec, (color, line) in LINES.items():
            losses = [r["losses"] for r in records if r["task"] == task and r["saved"] == spec]
            if not losses:
                continue
            mean = [statistics.fmean(values) for values in zip(*losses, strict=True)]
            smooth = [statistics.fmean(mean[max(0, k - 19) : k + 1]) for k in range(len(mean))]
            label = f"{spec} ({len(losses)})"
            ax.plot(range(1, len(smooth) + 1), smooth, line, color=color, linewidth=1.3, label=label)
        ax.set_title(TRAINED[task].partition(":")[0], loc="left", fontweight="bold", fontsize=9)
        ax.set_xlabel("step")
        ax.set_ylabel("training loss")
        ax.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def plot(record: dict[str, Any], path: Path) -> Path:
    """Step time against what is held, a panel per model."""
    names = models(record)
    figure, axes = make_figure(-(-len(names) // 3), min(3, len(names)), 3.0)
    for ax, model in zip(axes, names, strict=False):
        none = record[f"held {model} none"]["held_mb"]
        for method, time in record[f"time {model}"].items():
            held = record.get(f"held {model} {method}")
            if held is None or method not in STYLES:  # of other mallocs
                continue
            color, marker = STYLES[method]
            ax.plot(none / held["held_mb"], time["multiple"], marker, color=color, markersize=7,
                    markeredgecolor="white", label=method)  # fmt: skip
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        every = 1 if high < 64 * low else 2
        ax.set_xticks(ticks := [2**i for i in range(0, 10, every) if low <= 2**i <= high], [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_title(model.replace("_lite0", "-lite0").replace(" ", "\n"), loc="left", fontweight="bold", fontsize=9)
        ax.set_xlabel("times less held")
        ax.set_ylabel("step over plain step")
    for ax in axes[len(names) :]:
        ax.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return save_figure(figure, path)


def parts() -> Iterator[tuple[str, str, str]]:
    page, record = "docs/memory.md", read("memory")
    if record is not None and models(record):
        plot(record, FIGURES / "memory.png")
        yield page, "memory", section(record)
        yield "README.md", "memory summary", summary(record)
    if (record := read("saved_held")) is not None:
        yield page, "saved held", held(record)
    if (record := read("saved_gradient_error")) is not None:
        yield page, "gradient error", gradient_error(record)
    if records := [record for task in TRAINED for record in harness.read_all(RESULTS / "saved_training" / task)]:
        curves(records, FIGURES / "saved_training.png")
        yield page, "saved training", trained(records)
