"""What `hf-actcompress advise` predicts for every row of slow_link.json, without a link.

    OMP_NUM_THREADS=1 python benchmarks/link_prediction.py [--models minilm mobilenetv2]

Forward, backward and optimizer of each stage and all codecs are timed here, alone and beside a process that computes
the same (`advise --background 1`), as the ranks of slow_link.sh share a machine; the simulator makes a step of them.
Writes benchmarks/results/link_prediction.json after each row; rows that it has are not made again.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import harness
import torch
from slow_link import BF16, CHUNKS, CODECS, CUTS, MODELS, RATES, ROWS, TORCH, batch_of, load_model, row_name

from hf_actcompress.pipeline import split
from hf_actcompress.plan.advise import predict
from hf_actcompress.plan.cluster import Cluster
from hf_actcompress.plan.contention import background_load
from hf_actcompress.plan.measure import Work, measure_codec, measure_stages
from hf_actcompress.plan.simulate import Link

PATH = harness.RESULTS / "link_prediction.json"


def work(model: str, stages: int) -> Work:
    batch, rows = batch_of(model), ROWS[model] // CHUNKS
    inputs = batch.get("input_ids", batch.get("pixel_values"))[:rows]
    side = {"attention_mask": batch["attention_mask"][:rows]} if "attention_mask" in batch else {}
    return Work(split(load_model(model), cuts=CUTS[model, stages]), (inputs,), side)


def cluster_of(model: str, stages: int, beside: int) -> Cluster:
    """Measured here; its links are still to be set."""
    build = partial(work, model, stages)
    with background_load(beside, build):
        found, shapes, dtypes = measure_stages(build(), repeats=8)
    specs = {
        label: (BF16, BF16) if label == BF16 else (codec, codec if grad is None else grad)
        for label, (codec, grad) in CODECS.items()
    }
    return Cluster([f"rank {k}" for k in range(stages)], [1.0] * stages, found, shapes, dtypes, {}, CHUNKS,
                   ROWS[model] // CHUNKS, "early-1f1b", 2, specs)  # fmt: skip


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--again", action="store_true", help="measure what the file has already")
    parser.add_argument("--output", type=Path, default=PATH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = harness.read(args.output, {"rows": {}}) | harness.about("link_prediction.py")
    clusters, codecs = {}, {}

    def once(*key):
        if key not in codecs:
            codecs[key] = measure_codec(*key)
        return codecs[key]

    wanted = [(m, s, r) for m, s in (("minilm", 2), ("mobilenetv2", 2), ("minilm", 3)) for r in RATES]
    for model, stages, rate in wanted:
        if model not in args.models or (row_name(model, stages, rate) in record["rows"] and not args.again):
            continue
        links = {(k, k + 1): Link(rate * 1e6 / 8) for k in range(stages - 1)}
        mine = {}
        for beside in (0, 1):
            key = (model, stages, beside)
            if key not in clusters:
                clusters[key] = cluster_of(*key)
            cluster, found = clusters[key], {}
            for label, specs in cluster.codecs.items():
                schedule = "1f1b" if label == TORCH else "early-1f1b"
                one = replace(cluster, codecs={label: specs}, links=links, schedule=schedule)
                found[label] = predict(one, measure=once)[0].seconds
            stages_here = [asdict(stage) for stage in cluster.stages]
            mine["beside" if beside else "alone"] = {"seconds": found, "stages": stages_here}
            print(row_name(model, stages, rate), f"beside {beside}:",
                  ", ".join(f"{label} {value:.2f} s" for label, value in found.items()), flush=True)  # fmt: skip
        record["rows"][row_name(model, stages, rate)] = mine
        harness.write(args.output, record)


if __name__ == "__main__":
    main()
