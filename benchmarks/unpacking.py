"""What a backward pass spends on decoding saved tensors, with memory that is used again and without.

    python benchmarks/unpacking.py

saved="block:bits=4"; steps with and without the pool of codecs/memory.py in turn, in one process per model, after two
of each; without it every decoded tensor is allocated, as in plain training.  Writes results/unpacking.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import memory
import torch

from hf_actcompress.codecs import memory as pools
from hf_actcompress.codecs.compiled import VARIABLE
from hf_actcompress.recipes.results import environment
from hf_actcompress.sites import saved as site

PATH = Path(__file__).parent / "results" / "unpacking.json"
MODELS = ("minilm 32x128", "mobilenetv2_100 64x96px", "resnet18 64x96px")


def measure(model: str, repeats: int) -> dict[str, Any]:
    run = memory.Run(model, autocast=False)
    batch, plain, least = run.batch(run.rows), site.unpack, pools.POOLED
    spent = {"seconds": 0.0, "faults": 0}

    def timed(packed: Any) -> torch.Tensor:
        faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        found = plain(packed)
        spent["seconds"] += time.perf_counter() - began
        spent["faults"] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return found

    site.unpack = timed
    rows: dict[str, list[dict[str, float]]] = {"pool": [], "malloc": []}
    with memory.saved("block:bits=4")(run.model):
        for repeat in range(-2, repeats):
            for name in rows:
                pools.POOLED = least if name == "pool" else 1 << 62
                spent.update(seconds=0.0, faults=0)
                began = time.perf_counter()
                run.step(batch)
                step = time.perf_counter() - began
                if repeat >= 0:
                    rows[name].append({"unpack_ms": 1e3 * spent["seconds"], "faults": spent["faults"],
                                       "step_ms": 1e3 * step})  # fmt: skip
    found: dict[str, Any] = {"n": repeats}
    for name, own in rows.items():
        found[name] = {key: statistics.median(row[key] for row in own) for key in own[0]}
        quarters = statistics.quantiles([row["unpack_ms"] for row in own], n=4)
        found[name]["unpack_quartiles_ms"] = [quarters[0], quarters[2]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=list(memory.MODELS), metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault(VARIABLE, "1")
    if args.one:
        print(json.dumps(measure(args.models[0], args.repeats)))
        return
    data = {}
    for model in args.models:
        command = [sys.executable, __file__, "--one", "--models", model, "--repeats", str(args.repeats)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        data[model] = json.loads(out.splitlines()[-1])
        for name in ("pool", "malloc"):
            row = data[model][name]
            print(f"{model:26} {name:8} unpack {row['unpack_ms']:6.0f} ms  {row['faults']:7.0f} faults  "
                  f"step {row['step_ms']:6.0f} ms", flush=True)  # fmt: skip
    data |= {"environment": environment(), "command": "python benchmarks/unpacking.py"}
    PATH.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
