"""The table of benchmarks/results/pipeline_accuracy, for pages.py."""

from __future__ import annotations

import json
import statistics
from typing import Any


def table(records: list[dict[str, Any]]) -> str:
    """A row for each pair of codecs: accuracy over the seeds, its distance from none, and what went over the links."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["codec"], record["grad_codec"]), []).append(record)
    accuracies = {key: [100 * r["metrics"]["accuracy"] for r in group] for key, group in groups.items()}
    none = accuracies.get(("none", "identity"), [])
    mean, spread = (statistics.mean(none), statistics.stdev(none)) if len(none) > 1 else (None, None)
    lines = [
        "| activations | gradients | seeds | accuracy, % | against none | loss | MB sent: activations | gradients |",
        "| --- | --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for (codec, grad), group in sorted(groups.items(), key=lambda item: item[0][0] != "none"):
        own = accuracies[codec, grad]
        sent = [
            statistics.mean(sum(rank[d] for rank in r["ranks"]) for r in group) / 1e6 for d in ("forward", "backward")
        ]
        lines.append(
            f"| {codec} | {'' if codec == 'none' else grad} | {len(own)} | {_shown(own)} | "
            f"{'' if codec == 'none' or mean is None else _verdict(statistics.mean(own) - mean, spread)} | "
            f"{statistics.mean(r['metrics']['loss'] for r in group):.3f} | {sent[0]:.0f} | {sent[1]:.0f} |"
        )
    one, cuts = records[0], ", ".join(map(str, records[0]["cuts"]))
    return "\n".join(lines) + (
        f"\n\nSST-2, 5,000 rows, {one['epochs']:g} epochs, {one['max_length']} tokens, batches of {one['batch_size']} "
        f"in {one['micro_batches']} micro-batches, learning rate {one['learning_rate']:g}, {one['dtype']}; two "
        f"processes, {one['topology']}, cut after layers {cuts}; mean ± standard deviation "
        f"over the seeds; evaluation over the same links; bytes of training on all links. Target: within one standard "
        f"deviation of none. `{one['command']}`."
    )


def _shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _verdict(difference: float, spread: float) -> str:
    return f"{difference:+.2f}, {'within' if difference >= -spread else '**missed**, beyond'} {spread:.2f}"


def fill(pages: Any) -> None:
    """The generated part of docs/pipeline.md."""
    paths = sorted((pages.RESULTS / "pipeline_accuracy").glob("*.json"))
    if paths:
        records = [json.loads(path.read_text()) for path in paths]
        pages.fill(pages.ROOT / "docs" / "pipeline.md", "pipeline accuracy", table(records))
