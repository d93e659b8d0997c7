"""The gradient's error under `auto:ratio=8` and under one codec everywhere at that ratio, on batches not chosen by.

    python benchmarks/auto_error.py

Models and cuts of benchmarks/accuracy.py (pretrained, new head, before training), all cuts compressed in both
directions at once.  Auto chooses on one batch; the error is measured on four others, against the plain pass of the
same batch and dropout.  Writes benchmarks/results/auto_error.json.
"""

from __future__ import annotations

import math
import statistics

import harness
from tqdm import tqdm

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.workloads.batches import training_batches

CASES = {"cola": ("minilm", 32, {"first": 1, "last": 2}),
         "cifar10": ("efficientnet-lite0", 32, {"first": 1, "last": 1})}  # fmt: skip
CODECS = ("auto:ratio=8", "uniform:bits=4", "sort:bits=4", "kmeans:bits=4", "block:bits=4", "rotated:bits=4")
SEEN = 4


def main() -> None:
    args = harness.arguments(__doc__, data=True).parse_args()
    rows = []
    with tqdm(total=len(CASES) * len(CODECS)) as bar:
        for task, (name, size, cuts) in CASES.items():
            model, batches, _ = training_batches(name, task, root=args.data, batches=SEEN + 1, batch_size=size)
            for codec in CODECS:
                config = ActCompressConfig(codec, placement="cuts", analysis=True, analysis_every=1, **cuts)
                example = {key: value for key, value in batches[0].items() if key != "labels"}
                with compress_model(model, config, example_inputs=example) as handle:
                    for step, batch in enumerate(batches):
                        handle.probe.arm(step)
                        handle.probe.armed &= step > 0  # auto chooses on the first batch
                        model(**batch)
                    rows.append({"task": task, "model": name, "codec": codec, **measured(handle.probe.rows)})
                    if handle.auto is not None:
                        rows[-1]["chosen"] = handle.auto.chosen
                bar.update()
    harness.write("auto_error", rows)
    for row in rows:
        spreads = (row[key] for key in ("layer_error", "grad_error", "grad_cosine"))
        numbers = "  ".join(f"{spread['mean']:.4f} ± {spread['std']:.4f}" for spread in spreads)
        print(f"{row['task']:8s} {row['codec']:16s} ratio {row['ratio']:.2f}  errors, cosine {numbers}")


def measured(rows: list[dict]) -> dict:
    steps = sorted({row["step"] for row in rows})
    assert len(steps) == SEEN
    found: dict[str, list[float]] = {"layer_error": [], "grad_error": [], "grad_cosine": []}
    for step in steps:
        own = [row for row in rows if row["step"] == step]
        layers = [row["rel_error"] for row in own if row["site"] == "parameters" and row["layer"] is not None]
        found["layer_error"].append(math.sqrt(sum(e * e for e in layers) / len(layers)))
        found["grad_error"].append(own[0]["grad_error"])
        found["grad_cosine"].append(own[0]["grad_cosine"])
    cuts = [row for row in rows if row["site"] == "boundary"]
    raw = sum(row["numel"] for row in cuts)
    left = sum(row["numel"] / row["ratio"] for row in cuts)
    spread = {key: {"mean": statistics.mean(v), "std": statistics.stdev(v)} for key, v in found.items()}
    return {"ratio": raw / left, **spread}


if __name__ == "__main__":
    main()
