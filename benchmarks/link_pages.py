"""Tables and plots of pipelines: results/{slow_link,link_prediction}.json and results/pipeline_accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from harness import FIGURES, mean_std, read, read_all

from hf_actcompress.plan.advise import choose
from hf_actcompress.plan.simulate import Cut, Link, Stage, Timeline, Traffic, simulate
from hf_actcompress.plan.timeline import chart
from hf_actcompress.report.style import make_figure, save_figure

TORCH = "torch"
# From the most faithful on, which is the order in which advise prefers them.
ORDER = (TORCH, "none", "bf16", "block 8", "sort 8", "block 4/8", "delta 4/8", "topk 10 %, 8 bits")
LABELS = {TORCH: "none, torch's stage", "none": "none"}
COLORS = {TORCH: "#bdbdbd", "none": "#555555", "bf16": "#e6550d", "block 8": "#9ecae1", "sort 8": "#31a354",
          "block 4/8": "#3182bd", "delta 4/8": "#08306b", "topk 10 %, 8 bits": "#cc79a7"}  # fmt: skip
NAMES = {"minilm": "MiniLM, SST-2, 32x128", "mobilenetv2": "MobileNetV2, CIFAR-10, 16x224 px, cut after the stem"}
# The goal for block 4/8: (model, rate) -> times the samples per second without compression.
GOALS = {("mobilenetv2", 100): 4.0, ("minilm", 10): 3.0, ("minilm", 100): 1.2}


def rows(record: dict[str, Any], stages: int = 2) -> dict[str, dict[str, Any]]:
    found = {name: row for name, row in record["rows"].items() if row["stages"] == stages}
    return dict(sorted(found.items(), key=lambda item: (item[1]["model"], item[1]["rate"])))


def codecs(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(label, row["codecs"][label]) for label in ORDER if label in row["codecs"]]


def compute(one: dict[str, Any]) -> float:
    """Seconds of forward, backward and optimizer on the busiest rank."""
    return max(sum(times) for times in zip(one["forward"], one["backward"], one["optimizer"], strict=True))


def on_link(row: dict[str, Any], one: dict[str, Any]) -> float:
    """Seconds that the interface's bytes take in the busier direction of the busiest link."""
    return max(*one["wire_forward"], *one["wire_backward"]) * 8 / (row["rate"] * 1e6)


def limit(row: dict[str, Any], one: dict[str, Any]) -> float:
    return max(compute(one), on_link(row, one))


HEADERS = 66  # bytes of Ethernet, IPv4 and TCP with time stamps, in each packet that the interface counts


def overhead(one: dict[str, Any], headers: bool = True) -> float | None:
    """Bytes of the interface over those of the payloads."""

    def both(name: str) -> float:
        return sum(one[f"{name}_forward"]) + sum(one[f"{name}_backward"])

    if not both("bytes"):
        return None
    if not headers and "packets_forward" not in one:
        return None
    return (both("wire") - (0 if headers else HEADERS * both("packets"))) / both("bytes")


def table(record: dict[str, Any]) -> str:
    head = ("", "samples/s", "least and most", "of torch's stage", "of none", "MB there, back", "over payloads",
            "compute, s", "link, s", "of the limit", "loss")  # fmt: skip
    parts = []
    for row in rows(record).values():
        torch, none = (row["codecs"][label]["seconds"] for label in (TORCH, "none"))
        lines = []
        for label, one in codecs(row):
            mb = (sum(one["wire_forward"]) / 1e6, sum(one["wire_backward"]) / 1e6)
            over, speeds = overhead(one), sorted(row["rows"] / value for value in one["all"])
            lines.append((
                LABELS.get(label, label), f"{row['rows'] / one['seconds']:.2f}", f"{speeds[0]:.2f}-{speeds[-1]:.2f}",
                f"{torch / one['seconds']:.2f}", f"{none / one['seconds']:.2f}", f"{mb[0]:.2f}, {mb[1]:.2f}",
                "" if over is None else f"{over:.3f}", f"{compute(one):.2f}", f"{on_link(row, one):.2f}",
                f"{limit(row, one) / one['seconds']:.2f}", f"{one['loss'][-1]:.3f}",
            ))  # fmt: skip
        steps = len(row["codecs"]["none"]["all"])
        parts.append(
            f"**{NAMES[row['model']]}, {row['rate']} Mbit/s**, {row['chunks']} micro-batches, medians of {steps} "
            f"steps; loss of step {steps + 1}\n\n" + harness.table(head, lines, "l")
        )
    about = ", ".join(f"{k} {v}" for k, v in sorted(record["environment"].items()) if v is not None)
    return "\n\n".join(parts) + f"\n\n`{record['command']}`. Environment: {about}."


def targets(record: dict[str, Any]) -> str:
    """What was measured, and the goal."""
    lines = []

    all_rows = rows(record)
    for row in all_rows.values():
        goal = GOALS.get((row["model"], row["rate"]))
        mine = row["codecs"]["block 4/8"]["seconds"]
        for label in (TORCH, "none") if goal else ():
            ratio = row["codecs"][label]["seconds"] / mine
            what = f"block 4/8 against {LABELS[label]}, {row['model']} at {row['rate']} Mbit/s"
            lines.append((what, f"{ratio:.2f}", f"{goal:g}"))
    for row in all_rows.values():
        one = row["codecs"]["block 4/8"]
        share = limit(row, one) / one["seconds"]
        lines.append((f"block 4/8 of the limit, {row['model']} at {row['rate']} Mbit/s", f"{share:.2f}", "0.85"))
    for row in all_rows.values():
        if row["rate"] == 1000:
            ratio = row["codecs"]["none"]["seconds"] / row["codecs"]["block 4/8"]["seconds"]
            lines.append((f"block 4/8 against none, {row['model']} at 1000 Mbit/s", f"{ratio:.2f}", "0.97"))
    for headers, words in ((True, ""), (False, ", without headers of Ethernet, IP and TCP")):
        overs = [overhead(one, headers) or 1.0 for row in all_rows.values() for _, one in codecs(row)]
        lines.append((f"bytes on the interface over payloads{words}, largest", f"{max(overs):.3f}", "1.05 at most"))
    return harness.table(("", "measured", "goal"), lines, "lrr")


def from_the_run(row: dict[str, Any], label: str) -> Timeline:
    """The simulator's step, from the times that the run itself has measured for its parts."""
    one, chunks, stages = row["codecs"][label], row["chunks"], row["stages"]
    own = [Stage(one["forward"][k] / chunks, one["backward"][k] / chunks, one["optimizer"][k]) for k in range(stages)]
    # A rank between two others codes in both directions; what it took is halved.
    share = [1 / chunks / (1 if k in (0, stages - 1) else 2) for k in range(stages)]
    kind = "wire" if label == TORCH else "bytes"

    def traffic(way: str, sender: int, receiver: int) -> Traffic:
        return Traffic(one[f"{kind}_{way}"][sender] / chunks, one["encode"][sender] * share[sender],
                       one["decode"][receiver] * share[receiver])  # fmt: skip

    cuts = [Cut(traffic("forward", k, k + 1), traffic("backward", k + 1, k)) for k in range(stages - 1)]
    links = {(k, k + 1): Link(row["rate"] * 1e6 / 8) for k in range(stages - 1)}
    return simulate(own, links, cuts, chunks, "1f1b" if label == TORCH else "early-1f1b")


def prediction(record: dict[str, Any], predicted: dict[str, Any]) -> str:
    lines: list[list[str]] = []
    errors: dict[str, dict[str, float]] = {kind: {} for kind in ("run", "beside", "alone")}
    choices = []
    for name, row in {**rows(record), **rows(record, 3)}.items():
        before = {kind: found["seconds"] for kind, found in predicted["rows"].get(name, {}).items()}
        place = f"{row['model']}, {row['stages']} stages, {row['rate']} Mbit/s"
        for label, one in codecs(row):
            cells = [place if label == TORCH else "", LABELS.get(label, label), f"{one['seconds']:.2f}"]
            for kind in errors:
                value = from_the_run(row, label).seconds if kind == "run" else before.get(kind, {}).get(label)
                if value is None:
                    cells.append("")
                    continue
                error = 100 * (value / one["seconds"] - 1)
                errors[kind][f"{label}, {place}"] = error
                cells.append(f"{value:.2f} ({error:+.0f} %)")
            lines.append(cells)
        real = {label: one["seconds"] for label, one in codecs(row) if label != TORCH}
        if set(real) <= set(before.get("beside", ())):
            taken, best = choose({label: before["beside"][label] for label in real}), choose(real)
            choices.append((place, taken, best, f"{real[taken] / min(real.values()):.3f}"))
    words = []
    kinds = {"run": "From the run's own parts", "beside": "`advise --background 1`", "alone": "`advise`"}
    for kind, what in kinds.items():
        if errors[kind]:
            sizes = sorted(abs(error) for error in errors[kind].values())
            worst = max(errors[kind], key=lambda key: abs(errors[kind][key]))
            within = sum(size <= 20 for size in sizes)
            words.append(f"{what}: within 20 % in {within} of {len(sizes)} cases, median error "
                         f"{statistics.median(sizes):.0f} %, largest {errors[kind][worst]:+.0f} % "
                         f"({worst}).")  # fmt: skip
    head = ("", "codec", "measured, s", "from the run's own parts", "`advise --background 1`", "`advise`")
    found = [harness.table(head, lines, "ll"), "\n".join(f"- {word}" for word in words)]
    if choices:
        said = ("", "`advise --background 1` takes", "the measured table says",
                "what it takes, over the fastest measured")  # fmt: skip
        found.append(harness.table(said, choices, "lll"))
    return "\n\n".join(found)


def plot(record: dict[str, Any], path: Path) -> Path:
    """Samples per second over the rate of the link, a panel per model, with the limit of block 4/8."""
    models = list(dict.fromkeys(row["model"] for row in rows(record).values()))
    figure, axes = make_figure(1, len(models), 3.2)
    for ax, model in zip(axes, models, strict=False):
        own = [row for row in rows(record).values() if row["model"] == model]
        rates = [row["rate"] for row in own]
        for label in ORDER:
            if all(label in row["codecs"] for row in own):
                speeds = [row["rows"] / row["codecs"][label]["seconds"] for row in own]
                ax.plot(rates, speeds, marker="o", color=COLORS[label], label=LABELS.get(label, label), markersize=4,
                        linewidth=1.3, linestyle=(0, (4, 2)) if label in LABELS else "-")  # fmt: skip
        ax.set_xscale("log")
        ax.set_xticks(rates, [str(rate) for rate in rates])
        ax.minorticks_off()
        ax.set_ylim(0)
        ax.set_title(NAMES[model].split(",")[0], loc="left", fontweight="bold", fontsize=9)
        ax.set_xlabel("Mbit/s")
        ax.set_ylabel("samples per second")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return save_figure(figure, path)


def accuracy(records: list[dict[str, Any]]) -> str:
    """A row for each pair of codecs: accuracy over the seeds, its distance from none, and what went over the links."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["codec"], record["grad_codec"]), []).append(record)
    accuracies = {key: [100 * r["metrics"]["accuracy"] for r in group] for key, group in groups.items()}
    none = accuracies.get(("none", "identity"), [])
    mean, spread = (statistics.mean(none), statistics.stdev(none)) if len(none) > 1 else (None, None)
    lines = []
    for (codec, grad), group in sorted(groups.items(), key=lambda item: item[0][0] != "none"):
        own = accuracies[codec, grad]
        sent = [
            statistics.mean(sum(rank[d] for rank in r["ranks"]) for r in group) / 1e6 for d in ("forward", "backward")
        ]
        verdict = "" if codec == "none" or mean is None else _verdict(statistics.mean(own) - mean, spread)
        lines.append((
            codec, "" if codec == "none" else grad, len(own), mean_std(own, 2), verdict,
            f"{statistics.mean(r['metrics']['loss'] for r in group):.3f}", f"{sent[0]:.0f}", f"{sent[1]:.0f}",
        ))  # fmt: skip
    one, cuts = records[0], ", ".join(map(str, records[0]["cuts"]))
    head = ("activations", "gradients", "seeds", "accuracy, %", "against none", "loss", "MB sent: activations",
            "gradients")  # fmt: skip
    return harness.table(head, lines, "llrrl") + (
        f"\n\nSST-2, 5,000 rows, {one['epochs']:g} epochs, {one['max_length']} tokens, batches of {one['batch_size']} "
        f"in {one['micro_batches']} micro-batches, learning rate {one['learning_rate']:g}, {one['dtype']}; two "
        f"processes, {one['topology']}, cut after layers {cuts}; mean ± standard deviation "
        f"over the seeds; evaluation over the same links; bytes of training on all links. Target: within one standard "
        f"deviation of none. `{one['command']}`."
    )


def _verdict(difference: float, spread: float) -> str:
    return f"{difference:+.2f}, {'within' if difference >= -spread else '**missed**, beyond'} {spread:.2f}"


def parts() -> Iterator[tuple[str, str, str]]:
    page, measured, predicted = "docs/advise.md", read("slow_link"), read("link_prediction")
    if measured is not None and rows(measured):
        yield page, "slow link", table(measured)
        yield page, "slow link targets", targets(measured)
        if predicted is not None:
            yield page, "link prediction", prediction(measured, predicted)
        plot(measured, FIGURES / "slow_link.png")
        row = measured["rows"].get("mobilenetv2@100")
        if row is not None:
            steps = [(LABELS.get(label, label), from_the_run(row, label)) for label in (TORCH, "none", "block 4/8")]
            chart(steps, ["rank 0", "rank 1"], FIGURES / "timeline.png")
    if records := read_all("pipeline_accuracy"):
        yield "docs/pipeline.md", "pipeline accuracy", accuracy(records)
