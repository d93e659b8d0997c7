"""What a backward pass spends on decoding saved tensors, with memory that is used again and without.

    python benchmarks/unpacking.py

saved="block:bits=4", with and without the pool of ops/memory.py; without it every decoded tensor is allocated, as
in plain training.  How malloc's heap lies decides what that costs, so each measurement has a process of its own, and
the two kinds take turns.  Writes results/unpacking.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import statistics
import sys
import time
from typing import Any

import harness
import memory
import memory_methods
import torch

from hf_actcompress.ops import memory as pools
from hf_actcompress.saved import tensors as site

KINDS = ("pool", "malloc")
MODELS = ("minilm 32x128", "mobilenetv2_100 64x96px", "resnet18 64x96px")


def measure(model: str, kind: str, repeats: int) -> list[dict[str, float]]:
    """One row a step, after two that are not counted."""
    run = memory.Run(model, autocast=False)
    batch, plain = run.batch(run.rows), site.unpack
    if kind == "malloc":
        pools.POOLED = 1 << 62
    spent = {"unpack_ms": 0.0, "faults": 0}

    def timed(packed: Any) -> torch.Tensor:
        faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        found = plain(packed)
        spent["unpack_ms"] += 1e3 * (time.perf_counter() - began)
        spent["faults"] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return found

    site.unpack, rows = timed, []
    with memory_methods.saved("block:bits=4")(run.model):
        for _ in range(repeats + 2):
            spent.update(unpack_ms=0.0, faults=0)
            began = time.perf_counter()
            run.step(batch)
            rows.append({**spent, "step_ms": 1e3 * (time.perf_counter() - began)})
    return rows[2:]


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    quarters = statistics.quantiles([row["unpack_ms"] for row in rows], n=4)
    return {**found, "unpack_quartiles_ms": [quarters[0], quarters[2]], "n": len(rows)}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=list(memory_methods.MODELS), metavar="MODEL")
    parser.add_argument("--processes", type=int, default=3, help="of each kind and model")
    parser.add_argument("--repeats", type=int, default=5, help="steps counted in each")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.models[0], args.one, args.repeats)))
        return
    data: dict[str, Any] = {}
    for model in args.models:
        rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(args.processes):
            for kind in KINDS:
                options = ("--one", kind, "--models", model, "--repeats", args.repeats)
                rows[kind] += harness.fresh_process(__file__, *options)
        data[model] = {kind: summary(own) for kind, own in rows.items()}
        for kind, row in data[model].items():
            print(f"{model:26} {kind:8} unpack {row['unpack_ms']:6.0f} ms  {row['faults']:7.0f} faults  "
                  f"step {row['step_ms']:6.0f} ms", flush=True)  # fmt: skip
    harness.write("unpacking", {**data, **harness.about(shlex.join(["unpacking.py", *sys.argv[1:]]))})


if __name__ == "__main__":
    main()
