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

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import accuracy
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pipeline_accuracy"
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


def path_of(codec: str, grad_codec: str, seed: int) -> Path:
    return RESULTS / f"{re.sub('[^a-zA-Z0-9.=+_]+', '-', f'{codec}__{grad_codec}')}__seed{seed}.json"


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def execute(codec: str, grad_codec: str, seed: int, data: Path, extra: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
            "--master_port", free_port(), ROOT / "examples/glue/run_glue_pipeline.py", "--dataset", data / "glue/sst2",
            "--codec", codec, "--grad_codec", grad_codec, "--seed", seed, "--output_dir", out, *OPTIONS, *extra,
        ]  # fmt: skip
        began = time.time()
        found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=True)
        record = json.loads((Path(out) / "results.json").read_text())
    record["seconds"] = round(time.time() - began, 1)
    record["command"] = " ".join(["python benchmarks/pipeline_accuracy.py", *extra])
    record["history"] = [{name: entry[name] for name in ("step", "loss")} for entry in record["history"]]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--list", action="store_true", help="show the plan and what is done")
    args, extra = parser.parse_known_args()
    runs = [(codec, grad, seed) for seed in SEEDS for codec, grad in CODECS]
    if args.list:
        for run in runs:
            print("done" if path_of(*run).exists() else "open", path_of(*run).name)
        return
    if not args.data.is_dir():
        raise SystemExit(f"There is no data folder at {args.data}; give one with --data.")
    RESULTS.mkdir(parents=True, exist_ok=True)
    for run in tqdm(runs, desc="runs"):
        path = path_of(*run)
        # Several calls may share the work.
        with accuracy.claimed(SimpleNamespace(path=path)) as ours:
            if not ours or path.exists():
                continue
            record = execute(*run, args.data, extra)
            path.with_suffix(".tmp").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
            path.with_suffix(".tmp").replace(path)


if __name__ == "__main__":
    main()
