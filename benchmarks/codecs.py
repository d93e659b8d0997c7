"""Time of every codec against x.clone(), over sizes and dtypes, beside plain versions of what people use today.

    python benchmarks/codecs.py                     # sizes 16 KiB to 1 GiB, fp32 and bf16: most of an hour on 2 cores
    python benchmarks/codecs.py --sizes 64M --dtypes float32 --codecs block:bits=4
    python benchmarks/codecs.py --parts baselines compilation

Encode, decode, roundtrip and clone run in turn in one process (median of --repeats, with 10th and 90th percentile of
the multiples of the clone in the same repeat).  Writes benchmarks/results/codecs.json after every
measurement, with --device cuda codecs_cuda.json: what is there is kept, --force measures again.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Kept
from tqdm import tqdm

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops.library import VARIABLE
from hf_actcompress.plan.bench import measure, sample

SIZES = ("16K", "256K", "1M", "16M", "64M", "256M", "1G")
CODECS = (
    "uniform:bits=8", "uniform:bits=4", "uniform:bits=2", "block:bits=8", "block:bits=4", "block:bits=2",
    "block:bits=4,round=stochastic", "rotated:bits=2", "sort:bits=8", "kmeans:bits=4", "topk:ratio=0.1",
    "lowrank:rank=8", "float8",
)  # fmt: skip
FEATURES = 768
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def tensor(size: str, dtype: torch.dtype, device: str, features: int = FEATURES) -> torch.Tensor:
    """[rows, features] of at most that many bytes; Gaussian, each feature with a size of its own."""
    rows = max(1, int(size[:-1]) * UNITS[size[-1]] // dtype.itemsize // features)
    spread = torch.linspace(0.5, 4.0, features).to(dtype)
    block = sample((min(rows, 4096), features), torch.float32, "gaussian", "cpu")
    x = torch.empty(rows, features, dtype=dtype)
    for start in range(0, rows, len(block)):  # repeated: drawing a GiB would take longer than measuring
        part = x[start : start + len(block)]
        part.copy_(block[: len(part)] * spread)
    return x.to(device)


def clones(result: dict[str, Any]) -> str:
    return "  ".join(f"{name} {result[name]['clones']:6.2f}" for name in ("encode", "decode", "roundtrip"))


def sizes(args: argparse.Namespace, results: Kept) -> None:
    keys = [(s, d, c) for s in args.sizes for d in args.dtypes for c in args.codecs]
    for size, dtype, codec in tqdm(keys, desc="codecs"):
        def make(size: str = size, dtype: str = dtype, codec: str = codec) -> dict[str, Any]:
            x = tensor(size, getattr(torch, dtype), args.device)
            return {"bytes": x.numel() * x.element_size(), "n": args.repeats,
                    **measure(parse_codec(codec), x, args.repeats)}  # fmt: skip

        result = results(f"{size} {dtype} {codec}", make, "sizes")
        tqdm.write(f"{size:>5s} {dtype:9s} {codec:60s} {clones(result)}")
    for features in (32,):  # the shape of an image's early layers
        def make(features: int = features) -> dict[str, Any]:
            x = tensor("64M", torch.float32, args.device, features)
            return {"n": args.repeats, **measure(parse_codec("lowrank:rank=8"), x, args.repeats)}

        if "64M" in args.sizes and "lowrank:rank=8" in args.codecs:
            result = results(f"64M float32 lowrank:rank=8 [m, {features}]", make, "sizes")
            tqdm.write(f"  64M float32   lowrank:rank=8 [m, {features}]  {clones(result)}")


# What users have today.  Each takes a tensor and returns what it decodes to.


def full_sort(x: torch.Tensor, bits: int = 8, splits: int = 2) -> torch.Tensor:
    """Sort quantization as published: sort everything, cut into equal counts, quantize each, put back."""
    flat = x.reshape(-1)
    ranked, order = flat.sort()
    out = torch.empty_like(flat)
    for run, where in zip(ranked.chunk(2**splits), order.chunk(2**splits), strict=True):
        lo, hi = run[0], run[-1]
        step = (hi - lo) / (2 ** (bits - splits) - 1)
        out[where] = lo + ((run - lo) / step).round() * step
    return out.view(x.shape)


def lloyd(x: torch.Tensor, bits: int = 4, iterations: int = 50) -> torch.Tensor:
    """k-means over all values, 50 iterations from evenly spaced centroids."""
    flat = x.reshape(-1)
    table = torch.linspace(float(flat.min()), float(flat.max()), 2**bits)
    for _ in range(iterations):
        index = torch.bucketize(flat, (table[1:] + table[:-1]) / 2)
        total = torch.zeros_like(table).index_add_(0, index, flat)
        count = torch.bincount(index, minlength=2**bits)
        table = torch.where(count > 0, total / count.clamp_min(1), table).sort().values
    return table[torch.bucketize(flat, (table[1:] + table[:-1]) / 2)].view(x.shape)


def svd_lowrank(x: torch.Tensor) -> torch.Tensor:
    u, s, v = torch.svd_lowrank(x, q=8)
    return (u * s) @ v.T


def torch_topk(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1)
    where = flat.abs().topk(flat.numel() // 10, sorted=False).indices
    out = torch.zeros_like(flat)
    out[where] = flat[where]
    return out.view(x.shape)


def per_tensor(x: torch.Tensor) -> torch.Tensor:
    lo, hi = torch.aminmax(x)
    scale = float(hi - lo) / 255
    return torch.quantize_per_tensor(x, scale, round(-float(lo) / scale), torch.quint8).dequantize()


BASELINES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sort quantization by full sort, 8 bits": (full_sort, "sort:bits=8"),
    "50 Lloyd iterations, 16 centroids": (lloyd, "kmeans:bits=4"),
    "torch.svd_lowrank, rank 8": (svd_lowrank, "lowrank:rank=8"),
    "torch.topk, 10 %": (torch_topk, "topk:ratio=0.1"),
    "torch.quantize_per_tensor, 8 bits": (per_tensor, "uniform:bits=8"),
}


def baselines(args: argparse.Namespace, results: Kept) -> None:
    """Encode and decode together, theirs and ours in turn, on 64 MiB of fp32."""
    for name, (function, spec) in BASELINES.items():
        def make(function: Callable = function, spec: str = spec) -> dict[str, Any]:
            x, codec = tensor("64M", torch.float32, args.device), parse_codec(spec)
            state, last = codec.init_state("bench"), {}

            def timed(label: str, call: Callable[[], torch.Tensor]) -> Callable[[], None]:
                def run() -> None:
                    last[label] = call()
                    if x.device.type != "cpu":
                        torch.accelerator.synchronize()

                return run

            calls = {"clone": x.clone, "theirs": lambda: function(x),
                     "ours": lambda: codec.decode(codec.encode(x, state))}  # fmt: skip
            calls = {label: timed(label, call) for label, call in calls.items()}
            times = harness.in_turn(calls, args.baseline_repeats, warmup=1)
            ratios = harness.ratios(times["theirs"], times["ours"])
            median = {label: 1e3 * statistics.median(values) for label, values in times.items()}
            error = {k: float((last[k] - x).norm() / x.norm()) for k in ("ours", "theirs")}
            return {"codec": spec, "n": args.baseline_repeats, "ms": median, "rel_error": error,
                    "faster": statistics.median(ratios), "faster_range": [ratios[0], ratios[-1]]}  # fmt: skip

        row = results(name, make, "baselines")
        error = row["rel_error"]
        print(f"{name:42s} {row['faster']:6.1f} times as long as {row['codec']}, "
              f"errors {error['theirs']:.5f} and {error['ours']:.5f}")  # fmt: skip


FIRST_CALL = """
import sys, time, torch
from hf_actcompress.codecs import parse_codec
codec, x = parse_codec("block:bits=4"), torch.randn(2048, 768)
began = time.perf_counter()
for _ in range(int(sys.argv[1])):
    codec.decode(codec.encode(x))
print(time.perf_counter() - began)
"""

FIRST_STEPS = """
import sys, time, torch
from transformers import AutoConfig, AutoModelForSequenceClassification
from hf_actcompress import ActCompressConfig, compress_model
config = AutoConfig.for_model("bert", num_hidden_layers=24, hidden_size=256, num_attention_heads=4,
                              intermediate_size=1024)
model = AutoModelForSequenceClassification.from_config(config).train()
batch = {"input_ids": torch.randint(1000, 30000, (8, 128)), "labels": torch.randint(0, 2, (8,))}
if sys.argv[1] != "none":
    handle = compress_model(model, ActCompressConfig(saved=sys.argv[1]))
for step in range(6):
    began = time.perf_counter()
    model(**batch).loss.backward()
    print(time.perf_counter() - began)
"""

SAVED = "block:bits=4"


def compilation(args: argparse.Namespace, results: Kept) -> None:
    """Seconds in new processes, with the C++ library to be compiled and with it at hand: the first encode and decode,
    and the first and later training steps of a model with compressed saved tensors."""
    def run(script: str, cache: str, *options: object, kernels: str = "1") -> list[float]:
        env = {**os.environ, VARIABLE: kernels, "XDG_CACHE_HOME": cache}
        command = [sys.executable, "-c", script, *map(str, options)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return [float(line) for line in done.stdout.split()]

    def calls() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as cache:
            found = {
                "plain torch, first call": run(FIRST_CALL, cache, 1, kernels="0"),
                "C++ to be compiled, first call": run(FIRST_CALL, cache, 1),
                "C++ at hand, first call": run(FIRST_CALL, cache, 1),
                "50 calls, plain torch": run(FIRST_CALL, cache, 50, kernels="0"),
                "50 calls, C++": run(FIRST_CALL, cache, 50),
            }  # fmt: skip
        return {name: values[0] for name, values in found.items()}

    def steps() -> dict[str, float]:
        found = {}
        with tempfile.TemporaryDirectory() as cache:
            for name, saved in (("without", "none"), ("C++ to be compiled", SAVED), ("C++ at hand", SAVED)):
                found[f"{name}, first step"], *later = run(FIRST_STEPS, cache, saved)
                found[f"{name}, later"] = statistics.median(later)
        return found

    makers = {"encode and decode of 6 MiB, block:bits=4": calls,
              f"training steps of a BERT of 24 layers, saved {SAVED}": steps}  # fmt: skip
    for part, make in makers.items():
        for name, seconds in results(part, make, "compilation").items():
            print(f"{part}: {name:32s} {seconds:7.2f} s")


PARTS = {"sizes": sizes, "baselines": baselines, "compilation": compilation}


def main() -> None:
    parser = harness.arguments(__doc__, force=True)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="like 64M")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--baseline-repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, help="default: results/codecs.json, on a GPU codecs_cuda.json")
    args = parser.parse_args()
    name = "codecs" if args.device == "cpu" else f"codecs_{args.device.partition(':')[0]}"
    results = Kept(args.results or harness.RESULTS / f"{name}.json", "codecs.py", args.force)
    for part in args.parts:
        PARTS[part](args, results)


if __name__ == "__main__":
    main()
