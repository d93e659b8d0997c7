"""Six short trainings with fixed seeds: a restructured package has to give every loss again, bit for bit.

    python benchmarks/reference_runs.py            # run all, compare with results/reference_runs.json
    python benchmarks/reference_runs.py --record   # write that file
    python benchmarks/reference_runs.py --only saved_4 auto_ratio

Losses are kept as hexadecimal floats.  Codecs run on one thread and the clock stands still, so that nothing
depends on the machine's load.  Needs the data folder (default ../shared/data) and the packaged MiniLM.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks" / "results" / "reference_runs.json"
GLUE = ["examples/glue/run_glue.py", "--dataset", "{data}/glue/rte", "--max_length", "48", "--max_train_samples", "96",
        "--max_eval_samples", "32", "--per_device_train_batch_size", "16", "--max_steps", "6", "--seed", "0",
        "--output_dir", "{out}", "--evaluate", "on"]  # fmt: skip
CIFAR = ["examples/cifar/run_cifar.py", "--dataset", "{data}/tiny/cifar10", "--max_train_samples", "64",
         "--max_eval_samples", "32", "--per_device_train_batch_size", "16", "--max_steps", "6", "--seed", "0",
         "--output_dir", "{out}", "--dataloader_num_workers", "0"]  # fmt: skip
PIPELINE = ["examples/glue/run_glue_pipeline.py", "--dataset", "{data}/glue/rte", "--max_length", "48",
            "--max_train_samples", "64", "--max_eval_samples", "32", "--batch_size", "16", "--max_steps", "4",
            "--codec", "rotated:bits=2", "--grad_codec", "block:bits=4,round=stochastic",
            "--output_dir", "{out}"]  # fmt: skip
LC = ["examples/mnist/run_lc.py", "--dataset", "{data}/mnist", "--scheme", "prune-codebook", "--epochs", "2",
      "--reference_epochs", "1", "--max_train_samples", "1024", "--max_eval_samples", "256", "--every", "2",
      "--output_dir", "{out}"]  # fmt: skip
BOUNDARIES = ["--codec", "block:bits=4", "--grad_codec", "ef+topk:ratio=0.2|uniform:bits=8", "--first", "1", "--last",
              "2", "--layers", '{"*layer.2*": "kmeans:bits=4"}']  # fmt: skip
RUNS: dict[str, list[str]] = {
    "glue_boundaries": [*GLUE, *BOUNDARIES],
    "cifar_boundaries": [*CIFAR, "--codec", "sort:bits=8", "--grad_codec", "rotated:bits=4", "--last", "2"],
    "saved_4": [*GLUE, "--first", "0", "--last", "0", "--saved", "block:bits=4"],
    "saved_auto": [*GLUE, "--first", "0", "--last", "0", "--saved", "auto:budget=0.15"],
    "auto_ratio": [*GLUE, "--codec", "auto:ratio=8"],
    "pipeline": PIPELINE,
    "learning_compression": LC,
}


def child(script: str, arguments: list[str]) -> None:
    """Run a script as the main program and print every loss that it trains on."""
    import runpy
    import time

    import torch
    from torch.nn import functional as F

    torch.set_num_threads(1)
    losses: list[str] = []
    if "pipeline" in script:  # a stage's backward pass starts from a gradient
        plain = F.cross_entropy

        def cross_entropy(*args: object, **kwargs: object) -> torch.Tensor:
            loss = plain(*args, **kwargs)
            losses.append(float(loss.detach()).hex())
            return loss

        F.cross_entropy = cross_entropy
    else:
        backward = torch.Tensor.backward

        def recorded(self: torch.Tensor, *args: object, **kwargs: object) -> None:
            losses.append(float(self.detach()).hex())
            backward(self, *args, **kwargs)

        torch.Tensor.backward = recorded
        now = time.perf_counter()
        time.perf_counter = lambda: now
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(ROOT / Path(script).parent))
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        if losses:
            Path(os.environ["REFERENCE_OUT"]).write_text(json.dumps(losses))


def losses_of(name: str, data: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        places = {"{data}": data, "{out}": f"{folder}/run"}
        script, *arguments = RUNS[name]
        for place, path in places.items():
            arguments = [word.replace(place, path) for word in arguments]
        out = Path(folder) / "losses.json"
        variables = {
            **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT), "REFERENCE_OUT": str(out), "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        command = [sys.executable, __file__, "--child", script, *arguments]
        if name == "pipeline":
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            shared = {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
            ranks = [
                subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)
            ]  # fmt: skip
            texts = [rank.communicate(timeout=500)[0] for rank in ranks]
            failed = any(rank.returncode for rank in ranks)
        else:
            done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
            texts, failed = [done.stdout + done.stderr], done.returncode
        if failed:
            raise SystemExit(f"{name} failed:\n" + "\n".join(text[-3000:] for text in texts))
        return json.loads(out.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the file instead of comparing with it")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"))
    options = parser.parse_args()
    known = json.loads(FILE.read_text()) if FILE.is_file() else {}
    wrong = 0
    for name in options.only:
        found = losses_of(name, options.data)
        if options.record:
            known[name] = found
            print(f"{name}: {len(found)} losses, the last {float.fromhex(found[-1]):.6f}", flush=True)
            continue
        same = found == known[name]
        wrong += not same
        first = next((i for i, (a, b) in enumerate(zip(found, known[name], strict=False)) if a != b), len(found))
        print(f"{name}: {len(found)} losses " + ("the same" if same else f"DIFFER from number {first} on"), flush=True)
    if options.record:
        FILE.write_text(json.dumps(known, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
