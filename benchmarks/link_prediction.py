"""What `hf-actcompress advise` predicts for every row of slow_link.json, without a link.

    OMP_NUM_THREADS=1 python benchmarks/link_prediction.py [--models minilm mobilenetv2]

Forward, backward and optimizer of each stage and all codecs are timed here, alone and beside a process that computes
the same (`advise --beside 1`), as the ranks of slow_link.sh share a machine; the simulator makes a step of them.
Writes benchmarks/results/link_prediction.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from slow_link import BF16, CHUNKS, CODECS, CUTS, MODELS, ROWS, TORCH, batch_of, load, load_model

from hf_actcompress.pipeline import split
from hf_actcompress.pipeline.advise import measure_codec, measure_stages, predict
from hf_actcompress.pipeline.beside import Work, company
from hf_actcompress.pipeline.cluster import Cluster
from hf_actcompress.pipeline.simulate import Link
from hf_actcompress.recipes.results import environment

PATH = Path(__file__).parent / "results" / "link_prediction.json"


def work(model: str, stages: int) -> Work:
    batch, rows = batch_of(model), ROWS[model] // CHUNKS
    inputs = batch.get("input_ids", batch.get("pixel_values"))[:rows]
    side = {"attention_mask": batch["attention_mask"][:rows]} if "attention_mask" in batch else {}
    return split(load_model(model), cuts=CUTS[model, stages]), (inputs,), side


def cluster_of(model: str, stages: int, beside: int) -> Cluster:
    """Measured here; its links are still to be set."""
    build = partial(work, model, stages)
    with company(beside, build):
        found, shapes, dtypes = measure_stages(*build(), repeats=8)
    specs = {
        label: (BF16, BF16) if label == BF16 else (codec, codec if grad is None else grad)
        for label, (codec, grad) in CODECS.items()
    }
    return Cluster([f"rank {k}" for k in range(stages)], [1.0] * stages, found, shapes, dtypes, {}, CHUNKS,
                   ROWS[model] // CHUNKS, "early-1f1b", 2, specs)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--measured", type=Path, help="slow_link.json (default: the one in results)")
    parser.add_argument("--output", type=Path, default=PATH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": {}}
    measured = (json.loads(args.measured.read_text()) if args.measured else load())["rows"]
    record |= {"command": "python benchmarks/link_prediction.py", "environment": environment()}
    clusters, codecs = {}, {}

    def once(*key):
        if key not in codecs:
            codecs[key] = measure_codec(*key)
        return codecs[key]

    for name, row in measured.items():
        model, stages = row["model"], row["stages"]
        if model not in args.models:
            continue
        links = {(k, k + 1): Link(row["rate"] * 1e6 / 8) for k in range(stages - 1)}
        record["rows"][name] = {}
        for beside in (0, 1):
            key = (model, stages, beside)
            if key not in clusters:
                clusters[key] = cluster_of(*key)
            cluster, found = clusters[key], {}
            for label, specs in cluster.codecs.items():
                schedule = "1f1b" if label == TORCH else "early-1f1b"
                one = replace(cluster, codecs={label: specs}, links=links, schedule=schedule)
                found[label] = predict(one, measure=once)[0].seconds
            measured_here = {"seconds": found, "stages": [asdict(stage) for stage in cluster.stages]}
            record["rows"][name]["beside" if beside else "alone"] = measured_here
            print(name, beside, {label: f"{value:.2f} s, measured {row['codecs'][label]['seconds']:.2f}"
                                 for label, value in found.items() if label in row["codecs"]}, flush=True)  # fmt: skip
    args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
