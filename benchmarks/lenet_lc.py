"""LeNet5 on MNIST by Learning-Compression: every run of docs/weights.md, one JSON each in results/lenet_lc.

    python benchmarks/lenet_lc.py --data ../shared/data/mnist                 # all, the most important first
    python benchmarks/lenet_lc.py --data ../shared/data/mnist --only target,front
    python benchmarks/lenet_lc.py --list

A run whose JSON is there is not repeated.  All start from one dense reference (trained first) and take the same 20
epochs; each run's file is saved, loaded again and evaluated.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

sys.path.insert(0, str(harness.ROOT / "examples" / "mnist"))

from run_lc import CODEBOOK, LOWRANK, MIXES, PRUNE, compress, reference  # noqa: E402

from hf_actcompress.workloads.lenet import load_digits  # noqa: E402

RESULTS = harness.RESULTS / "lenet_lc"


def shared(conv1: int, conv2: int, linear: int, k: int) -> dict[str, str]:
    """Pruning, and a codebook for what stays."""
    return {"conv1": f"prune:keep={conv1},k={k}", "conv2": f"prune:keep={conv2},k={k}",
            "fc*": f"prune:keep={linear},k={k}"}  # fmt: skip


# Name -> scheme.  In the order in which they are run.
RUNS: dict[str, dict[str, str]] = {
    "front-100": shared(230, 2150, 7400, 16),
    "front-105": shared(225, 2050, 6950, 16),
    "front-26": shared(400, 8000, 47000, 16),
    "front-37": shared(350, 6000, 29000, 16),
    "front-200": shared(180, 880, 2500, 16),
    "front-70": shared(300, 3000, 12500, 16),
    "front-150": shared(200, 1320, 4000, 16),
    "front-50": shared(320, 4600, 20000, 16),
    "target-26": MIXES["prune-codebook"],
    "target-37": {"conv1": PRUNE.format(104), "conv2": PRUNE.format(2505), "fc1": "lowrank:rank=5", "fc2": CODEBOOK},
    "target-47": {"conv*": PRUNE.format(2505), "fc*": PRUNE.format(4200)},
    "k4-100": shared(250, 2400, 9900, 4),
    "k4-200": shared(180, 950, 3300, 4),
    "k8-50": shared(300, 4000, 24500, 8),
    "k8-30": shared(400, 8000, 43000, 8),
    "k4-150": shared(220, 1500, 5900, 4),
    **{f"codebook-{k}": {"*": f"codebook:k={k}"} for k in (2, 4, 8, 16, 32, 64)},
    **{f"prune-{n}": {"*": PRUNE.format(n)} for n in (4000, 8000, 16000, 32000)},
    **{f"lowrank-{alpha}": {"*": LOWRANK.format(alpha)} for alpha in ("2e-7", "5e-7", "1e-6", "2e-6", "5e-6")},
    **{f"mix-{name}": scheme for name, scheme in MIXES.items() if name not in ("prune-codebook", "codebook-codebook")},
    "sum-codebook-prune": {"*": f"{CODEBOOK} + prune:keep=1%"},
    "binary": {"*": "binary"}, "ternary": {"*": "ternary"},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    name: str
    path: Path

    def __str__(self) -> str:
        return self.name


def main() -> None:
    parser = harness.arguments(__doc__, plan=True)
    parser.add_argument("--data", default="../shared/data/mnist", help="a folder or hub id with MNIST")
    parser.add_argument("--work", default="outputs/lenet", type=Path, help="for the reference and the models")
    parser.add_argument("--results", default=RESULTS, type=Path)
    parser.add_argument("--only", help="beginnings of run names, separated by commas")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--reference_epochs", type=float, default=25)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    runs = [Run(name, options.results / f"{name}.json") for name in RUNS
            if options.only is None or name.startswith(tuple(options.only.split(",")))]  # fmt: skip
    if options.list:
        print("\n".join(f"{run.name:22}{json.dumps(RUNS[run.name])}" for run in runs))
        return
    torch.set_num_threads(options.threads)
    train, evaluation = load_digits(options.data, shift=2, max_train=options.max_train_samples)
    dense, quiet = options.work / "reference.safetensors", not sys.stderr.isatty()
    model, error = reference(dense, train, evaluation, options.reference_epochs, disable_tqdm=quiet)
    print(f"reference: {error:.2f} % error", flush=True)

    def make(run: Run) -> dict[str, Any]:
        record = compress(model, RUNS[run.name], train, evaluation, options.work / run.name, epochs=options.epochs,
                          disable_tqdm=quiet)  # fmt: skip
        command = f"lenet_lc.py --only {run.name} --epochs {options.epochs:g}"
        return {**record, "name": run.name, "reference_error": error, "images": len(train),
                **harness.about(f"{command} --reference_epochs {options.reference_epochs:g}")}  # fmt: skip

    harness.run_all(runs, make, said=lambda record: (
        f"{record['error']:.2f} % at {record['ratio']:.1f}x (direct {record['direct_error']:.2f} %, "
        f"{record['seconds']:.0f} s)"
    ))  # fmt: skip


if __name__ == "__main__":
    main()
