"""What reduce.sh runs in each namespace, and the rows of its table.

    sudo benchmarks/reduce.sh [--models minilm mobilenetv2] [--rates 100 1000] [--processes 2 4] [--again]

A row is a model at a rate with so many processes.  Every method trains a copy of its own with
DistributedDataParallel, from the same weights on the same batches; steps of all methods alternate, and the first two
of each are not timed.  Rank 0 writes benchmarks/results/reduce.json after each row; rows that it has are not run
again.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

import harness
import torch
import torch.distributed as dist
from slow_link import batch_of, load_model
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hf_actcompress import ActCompressConfig, compress_model

MODELS, RATES, PROCESSES = ("minilm", "mobilenetv2"), (100, 1000), (2, 4)
ROWS = {"minilm": 8, "mobilenetv2": 4, "tiny": 2}  # of a process
TOKENS = 40
WARM = 2  # DDP arranges its buckets anew after the first step, and PowerSGD begins then
STEPS = {100: 3, 1000: 6}
PLAIN = {"DDP fp32": None, "DDP fp16": default_hooks.fp16_compress_hook}
SPECS = {
    "PowerSGD 4": "powersgd:rank=4,start=2", "8 bits": "ef+block:bits=8", "4 bits": "ef+block:bits=4",
    "2 bits": "ef+block:bits=2,round=stochastic", "1 bit": "ef+sign",
    "topk 1 %": "ef+topk:ratio=0.01|block:bits=8",
}  # fmt: skip


def main() -> None:
    parser = harness.arguments(__doc__, results="reduce")
    parser.add_argument("what", choices=("rows", "rank"))
    parser.add_argument("--row")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=(*MODELS, "tiny"))
    parser.add_argument("--rates", nargs="+", type=int, default=RATES)
    parser.add_argument("--processes", nargs="+", type=int, default=PROCESSES, choices=(2, 3, 4))
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    if args.what == "rank":
        measure(args.row, args.results)
        return
    known = {} if args.again else harness.read(args.results, {}).get("rows", {})
    rows = [f"{m}@{r}@{n}" for n in args.processes for m in args.models for r in args.rates]
    print(*[row for row in rows if row not in known])


def measure(row: str, path: Path) -> None:
    model_name, rate, _ = row.split("@")
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo", timeout=timedelta(seconds=300))
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = ROWS[model_name]
    batch = {name: value[rank * rows : (rank + 1) * rows] for name, value in batch_of(model_name).items()}
    batch = {name: value[:, :TOKENS] if value.dim() == 2 else value for name, value in batch.items()}
    labels = batch.pop("labels")
    methods = {}
    for name in (*PLAIN, *SPECS):
        model = DistributedDataParallel(load_model(model_name).train())
        if PLAIN.get(name):
            model.register_comm_hook(None, PLAIN[name])
        elif name in SPECS:
            compress_model(model, ActCompressConfig(reduce=SPECS[name]))
        methods[name] = model, torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    times: dict[str, list[float]] = {name: [] for name in (*methods, "compute")}
    sent: dict[str, list[int]] = {name: [] for name in methods}
    losses = {}
    total = WARM + STEPS.get(int(rate), 5)
    for step in range(total):
        for name, (model, optimizer) in methods.items():
            dist.barrier()
            before, began = transmitted(), time.perf_counter()
            output = model(**batch)
            loss = cross_entropy(output.logits if hasattr(output, "logits") else output, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            dist.barrier()
            if step >= WARM:
                times[name].append(time.perf_counter() - began)
                sent[name].append(transmitted() - before)
            losses[name] = float(loss.detach())
        if step >= WARM:  # what a step takes without any communication
            model, optimizer = methods["DDP fp32"]
            dist.barrier()
            began = time.perf_counter()
            with model.no_sync():
                output = model(**batch)
                cross_entropy(output.logits if hasattr(output, "logits") else output, labels).backward()
            optimizer.zero_grad()
            dist.barrier()
            times["compute"].append(time.perf_counter() - began)
        if rank == 0:
            print(f"{row}: step {step + 1} of {total}", file=sys.stderr, flush=True)
    if rank == 0:
        entry = {
            "model": model_name, "mbit": int(rate), "processes": size, "rows": rows,
            "parameters": sum(p.numel() for p in load_model(model_name).parameters()),
            "compute": statistics.median(times["compute"]), "losses": losses,
            "methods": {name: {"seconds": sorted(times[name]), "bytes": statistics.median(sent[name]),
                               "samples_per_second": rows * size / statistics.median(times[name])}
                        for name in methods},
        }  # fmt: skip
        known = harness.read(path, {}).get("rows", {})
        harness.write(path, {"rows": {**known, row: entry}, **harness.about("sudo benchmarks/reduce.sh")})
        base = entry["methods"]["DDP fp32"]["samples_per_second"]
        for name, one in entry["methods"].items():
            print(f"{name:12} {one['samples_per_second']:8.2f} samples/s {one['samples_per_second'] / base:6.2f} "
                  f"{one['bytes'] / 1e6:8.2f} MB", flush=True)  # fmt: skip
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def transmitted() -> int:
    """Bytes that left this namespace's interface."""
    return int(Path("/sys/class/net/net/statistics/tx_bytes").read_text())


if __name__ == "__main__":
    main()
