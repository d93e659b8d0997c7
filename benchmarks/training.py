"""Training throughput with compressed boundaries against none.

    python benchmarks/training.py
    python benchmarks/training.py --models minilm --codecs block:bits=4

Every round runs a block of steps without compression and one with each codec, in turn, so that other load on the
machine meets all alike; the first step of a block is not timed.  Boundaries: after the first layer and before the
last.  Writes benchmarks/results/training.json after each model, with --device cuda training_cuda.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import harness
import torch
from tqdm import tqdm

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.workloads import load_image_model, load_text_model

CODECS = (
    "identity", "uniform:bits=8", "block:bits=8", "block:bits=4", "block:bits=2",
    "rotated:bits=2", "sort:bits=8", "kmeans:bits=4", "topk:ratio=0.1",
    "lowrank:rank=8", "float8",
)  # fmt: skip


def images(size: int, batch: int, device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor], int]:
    model, _ = load_image_model("mobilenetv2_100", 10, size, pretrained=False)
    model = model.to(device, memory_format=torch.channels_last)
    pixels = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return model, {"pixel_values": pixels, "labels": torch.randint(0, 10, (batch,), device=device)}, batch


def text(device: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor], int]:
    model, _ = load_text_model("minilm", 2)
    batch = {
        "input_ids": torch.randint(1000, 30000, (32, 128), device=device),
        "attention_mask": torch.ones(32, 128, dtype=torch.long, device=device),
        "labels": torch.randint(0, 2, (32,), device=device),
    }
    return model.to(device), batch, 32


MODELS: dict[str, Callable[[str], tuple[torch.nn.Module, dict[str, torch.Tensor], int]]] = {
    "minilm 32x128": text,
    "mobilenetv2_100 96 px, batch 64": lambda device: images(96, 64, device),
    "mobilenetv2_100 224 px, batch 32": lambda device: images(224, 32, device),
}


def measure(name: str, args: argparse.Namespace, first: int = 1, last: int = 1) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, batch, samples = MODELS[name](args.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device != "cpu":
            torch.accelerator.synchronize()

    rates: dict[str, list[float]] = {codec: [] for codec in ("none", *args.codecs)}
    with tqdm(total=args.rounds * len(rates), desc=name) as progress:
        for _ in range(-1, args.rounds):  # the first round warms up: it fills states
            for codec, found in rates.items():
                config = ActCompressConfig(codec, first=first, last=last) if codec != "none" else None
                with compress_model(model, config) if config else nullcontext():
                    step()
                    took = sum(harness.seconds(step) for _ in range(args.steps))
                    found.append(samples * args.steps / took)
                progress.update()
    rows = []
    for codec, found in rates.items():
        shares = harness.ratios(found[1:], rates["none"][1:])
        rows.append({"codec": codec, "samples_per_second": statistics.median(found[1:]), "n": args.rounds,
                     "of_none": statistics.median(shares), "of_none_range": [shares[0], shares[-1]]})  # fmt: skip
        print(f"{codec:60s} {rows[-1]['samples_per_second']:8.1f} samples/s  {rows[-1]['of_none']:.3f} of none")
    return rows


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="parts of names do")
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, help="default: results/training.json, on a GPU training_cuda.json")
    args = parser.parse_args()
    name = "training" if args.device == "cpu" else "training_cuda"
    command = "training.py" + ("" if args.device == "cpu" else f" --device {args.device}")
    keep = harness.Kept(args.results or harness.RESULTS / f"{name}.json", command, force=True)
    for model in MODELS:
        if any(part in model for part in args.models):
            keep(model, lambda model=model: measure(model, args), part="models")


if __name__ == "__main__":
    main()
