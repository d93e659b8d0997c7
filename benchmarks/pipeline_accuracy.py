"""Accuracy on SST-2 through a real pipeline of two processes: the runs behind the table in docs/results.md.

    python benchmarks/pipeline_accuracy.py                       # everything that is not there yet
    python benchmarks/pipeline_accuracy.py --list
    python benchmarks/pipeline_accuracy.py --device cuda:0       # what is not known here goes to the recipe
    python benchmarks/pipeline_accuracy.py --bf16                # where that is fast

Client and server on one machine: the client holds block 0 with the embeddings, and the last block with the head; the
server the four blocks between.  One JSON per run under benchmarks/results/pipeline_accuracy/; a run whose file exists
is skipped, so an interrupted call goes on where it stopped.  Data: a folder with glue/sst2 in Parquet (--data, default
../shared/data).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import ROOT

RESULTS = harness.RESULTS / "pipeline_accuracy"
CODECS = (
    ("none", "identity"),
    ("block:bits=4", "block:bits=8,round=stochastic"),
    ("delta+rotated:bits=2", "block:bits=4,round=stochastic"),
)
SEEDS = (0, 1, 2)
OPTIONS = (
    "--topology client-server --cuts 0 2 4 --max_train_samples 5000 --max_length 40 --num_train_epochs 2 "
    "--learning_rate 5e-5 --batch_size 32 --disable_tqdm True"
).split()


@dataclass(frozen=True)
class Run:
    codec: str
    grad_codec: str
    seed: int

    @property
    def path(self) -> Path:
        return RESULTS / harness.file_name(self.codec, self.grad_codec, f"seed{self.seed}")


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def execute(run: Run, data: Path, extra: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
            "--master_port", free_port(), ROOT / "examples/glue/run_glue_pipeline.py", "--dataset", data / "glue/sst2",
            "--codec", run.codec, "--grad_codec", run.grad_codec, "--seed", run.seed, "--output_dir", out, *OPTIONS,
            *extra,
        ]  # fmt: skip
        began = time.time()
        found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True)
        record = harness.read(Path(out) / "results.json")
    record["seconds"] = round(time.time() - began, 1)
    record["command"] = " ".join(["python benchmarks/pipeline_accuracy.py", *extra])
    record["history"] = [{name: entry[name] for name in ("step", "loss")} for entry in record["history"]]
    return record


def main() -> None:
    parser = harness.arguments(__doc__, data=True, force=True, plan=True)
    args, extra = parser.parse_known_args()
    runs = [Run(codec, grad, seed) for seed in SEEDS for codec, grad in CODECS]
    if args.list:
        return harness.list_runs(runs)
    harness.require_data(args.data)
    harness.run_all(runs, lambda run: execute(run, args.data, extra), args.force)


if __name__ == "__main__":
    main()
