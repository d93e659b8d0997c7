"""Whether codecs err as they did in an earlier version: finished accuracy runs stay valid where they do.

    python benchmarks/error_statistics.py --version 0.2

Every codec codes the same 200 tensors (hidden states with outlier features and tokens of all sizes, feature maps,
gradients with heavy tails, uniform and Gaussian values; fp32 and bf16).  Written under the version's name to
benchmarks/results/error_statistics.json: mean, deviation and worst of the relative squared error |y - x|^2 / |x|^2,
and the payloads' bytes.  What is there of other versions stays and is compared.  To measure an earlier version, run
this file with that version's package on PYTHONPATH; it needs nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from hf_actcompress import parse_codec

RESULTS = Path(__file__).parent / "results" / "error_statistics.json"
SPECS = [
    "uniform:bits=16", "uniform:bits=10", "uniform:bits=8", "uniform:bits=4", "uniform:bits=4,round=stochastic",
    "block:bits=8", "block:bits=8,round=stochastic", "block:bits=4", "block:bits=4,round=stochastic",
    "block:bits=4,equalize=none", "block:bits=2", "block:bits=2,round=stochastic",
    "rotated:bits=4", "rotated:bits=3", "rotated:bits=2", "rotated:bits=2,prototypes=3", "trellis:bits=2,prototypes=3",
    "sort:bits=16", "sort:bits=12", "sort:bits=8", "sort:bits=4", "kmeans:bits=4", "kmeans:bits=2",
    "topk:ratio=0.5", "topk:ratio=0.2", "topk:ratio=0.1", "float8", "lowrank:rank=8",
]  # fmt: skip
# How version 0.1 spelled them.
OLD = {"rotated": "rotate=hadamard,levels=gauss,allocate=energy,patch=dct",
       "trellis": "rotate=hadamard,levels=trellis,allocate=energy,patch=dct"}  # fmt: skip
COUNT = 200


def example(i: int) -> Tensor:
    g = torch.Generator().manual_seed(i)
    if i % 5 == 0:  # hidden states: few features are large
        x = torch.randn(32, 64, 192, generator=g) * (1 + 20 * (torch.rand(192, generator=g) > 0.95))
        x = (x + torch.randn(192, generator=g)) * torch.rand(32, 64, 1, generator=g)
    elif i % 5 == 1:  # feature maps, smooth in space
        x = torch.nn.functional.interpolate(torch.randn(8, 24, 4, 4, generator=g), size=16, mode="bilinear")
        x = x + 0.1 * torch.randn(8, 24, 16, 16, generator=g)
    elif i % 5 == 2:  # gradients
        x = torch.randn(512, 80, generator=g) ** 3 * 1e-4
    elif i % 5 == 3:
        x = torch.rand(300, 64, generator=g)
    else:
        x = torch.randn(700, 50, generator=g)
    return x if i % 2 else x.bfloat16()


def measure(spec: str, version: str) -> dict[str, float]:
    errors, nbytes = [], 0
    name, _, options = spec.partition(":")
    codec = parse_codec(f"block:{options},{OLD[name]}" if version == "0.1" and name in OLD else spec)
    for i in range(COUNT):
        x = example(i)
        payload = codec.encode(x, codec.init_state("a", seed=i))
        y = codec.decode(payload)
        errors.append(float((y.double() - x.double()).square().sum() / x.double().square().sum()))
        nbytes += payload.nbytes
    found = torch.tensor(errors, dtype=torch.float64)
    return {"mean": float(found.mean()), "deviation": float(found.std()), "worst": float(found.max()), "bytes": nbytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--version", default="0.2", help="what is measured; 0.1 spells some codecs another way")
    options = parser.parse_args()
    every = json.loads(options.results.read_text()) if options.results.exists() else {}
    own = every[options.version] = {}
    others = [name for name in every if name != options.version]
    print(f"{'codec':34}{'mean':>11}{'deviation':>11}{'worst':>11}" + "".join(f"{'over ' + o:>24}" for o in others))
    for spec in SPECS:
        found = own[spec] = measure(spec, options.version)
        ratios = ""
        for name in others:
            if before := every[name].get(spec):
                ratios += "  " + " ".join(f"{found[k] / before[k]:.3f}" for k in found)
        print(f"{spec:34}{found['mean']:11.4g}{found['deviation']:11.4g}{found['worst']:11.4g}{ratios}", flush=True)
        options.results.write_text(json.dumps(every, indent=1) + "\n")


if __name__ == "__main__":
    main()
