"""What slow_link.sh runs on each side of the link, and the rows of its table.

    sudo benchmarks/slow_link.sh [--models minilm mobilenetv2] [--rates 10 100 1000] [--stages 2] [--again]

A row is a model at a rate.  Every codec trains a copy of its own, from the same weights on the same batch, over and
over (so that `delta` has seen its samples).  Steps of all codecs alternate, so that other load on the machine meets
all alike, and the first of each is not timed.  Rank 0 writes benchmarks/results/slow_link.json after each row; rows
that it has are not run again.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy

from hf_actcompress import parse_codec, workloads
from hf_actcompress.pipeline import CompressedPipelineStage, EarlySchedule1F1B, split
from hf_actcompress.workloads.results import environment

PATH = harness.RESULTS / "slow_link.json"
RATES = (10, 100, 1000)
CUTS = {
    ("minilm", 2): (2,), ("minilm", 3): (1, 3), ("mobilenetv2", 2): (0,), ("mobilenetv2", 3): (0, 9),
    ("tiny", 2): (1,), ("tiny", 3): (0, 1),
}  # fmt: skip
ROWS = {"minilm": 32, "mobilenetv2": 16, "tiny": 8}
MODELS = ("minilm", "mobilenetv2")  # "tiny" is there to try the script
CHUNKS = 8
STEPS = {10: 3, 100: 5, 1000: 6}
TORCH, BF16 = "torch", "bf16"  # torch's own stage and schedule; activations and gradients cast at the cut
EIGHT = "block:bits=8,round=stochastic"
CODECS: dict[str, tuple[str, str | None]] = {
    TORCH: ("identity", None), "none": ("identity", None), BF16: ("identity", None),
    "block 8": ("block:bits=8", EIGHT), "block 4/8": ("block:bits=4", EIGHT),
    "delta 4/8": ("delta+block:bits=4", EIGHT),
    "topk 10 %, 8 bits": ("topk:ratio=0.1|uniform:bits=8", None),
    "sort 8": ("sort:bits=8", None),
}  # fmt: skip


def load_model(model: str) -> nn.Module:
    torch.manual_seed(0)
    if model == "tiny":
        return workloads.load_text_model("tiny-bert", 2, texts=["a few words"])[0]
    if model == "minilm":
        return workloads.load_text_model("minilm", 2)[0]
    found = workloads.load_image_model("mobilenetv2_100", 10, 224, pretrained=False)[0]
    return found.to(memory_format=torch.channels_last)


def batch_of(model: str) -> dict[str, Tensor]:
    """The first rows of the real training set, the same on every rank."""
    rows = ROWS[model]
    if model == "tiny":
        ids = torch.arange(rows * 16).view(rows, 16) % 7
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 1] % 2}
    if model == "minilm":
        data = workloads.load_text(str(harness.DATA / "glue/sst2"), max_train=rows, max_eval=1)
        train, _ = workloads.tokenize_splits(data, workloads.load_text_model("minilm", 2)[1], 128, pad=True)
        return {name: torch.tensor(train[name]) for name in ("input_ids", "attention_mask", "labels")}
    data = workloads.load_images(str(harness.DATA / "cifar10"), max_train=rows, max_eval=1)
    _, wants = workloads.load_image_model("mobilenetv2_100", 10, 224, pretrained=False)
    train, _ = workloads.prepare_images(data, wants)
    torch.manual_seed(0)
    return workloads.collate_images([train[k] for k in range(rows)])


class Cast(nn.Module):
    """bf16 between the stages: what one does without codecs."""

    def __init__(self, stage: nn.Module, first: bool, last: bool) -> None:
        super().__init__()
        self.stage, self.first, self.last = stage, first, last

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = self.stage(*(args if self.first else (args[0].float(),)), **kwargs)
        return y if self.last else y.bfloat16()


class _Clock:
    """Adds the seconds of forward and backward, without those that the stage spends on codecs and waiting."""

    def _timed(self, name: str, function: Any, args: tuple, kwargs: dict) -> Any:
        before, began = self._elsewhere(), time.perf_counter()
        found = function(*args, **kwargs)
        self.compute[name] += time.perf_counter() - began - (self._elsewhere() - before)
        return found

    def _elsewhere(self) -> float:
        return sum(self.seconds.values()) + self.links.waited if hasattr(self, "links") else 0.0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed("forward", super().forward_one_chunk, args, kwargs)

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed("backward", super().backward_one_chunk, args, kwargs)


class PlainStage(_Clock, PipelineStage):
    """Torch's own, but for images in channels_last, whose buffers it makes and then refuses: they go as they lie."""

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return _dense(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return _dense(super().get_bwd_send_ops(bwd_chunk_id))

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return _dense(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return _dense(super().get_bwd_recv_ops(bwd_chunk_id))


def _dense(ops: list[dist.P2POp]) -> list[dist.P2POp]:
    for op in ops:
        if op.tensor.dim() == 4:
            if op.op is dist.isend:
                op.tensor = op.tensor.contiguous(memory_format=torch.channels_last)
            op.tensor = op.tensor.permute(0, 2, 3, 1)
        elif op.op is dist.isend:
            op.tensor = op.tensor.contiguous()
    return ops


class Stage(_Clock, CompressedPipelineStage):
    pass


class Runner:
    """One codec's copy of this rank's stage."""

    def __init__(self, label: str, model: nn.Module, cuts: tuple[int, ...], rank: int) -> None:
        count, device = len(cuts) + 1, torch.device("cpu")
        module: nn.Module = split(copy.deepcopy(model).train(), cuts=cuts)[rank]
        self.label, self.first, self.last = label, rank == 0, rank == count - 1
        own = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(own, lr=5e-5 if hasattr(model, "bert") else 1e-3)
        if label == BF16:
            module = Cast(module, self.first, self.last)
        if label == TORCH:
            self.stage: Any = PlainStage(module, rank, count, device)
            self.schedule: Any = Schedule1F1B(self.stage, CHUNKS, cross_entropy)
        else:
            codec, grad = (None if spec is None else parse_codec(spec) for spec in CODECS[label])
            self.stage = Stage(module, rank, count, device, codec=codec, grad_codec=grad)
            self.schedule = EarlySchedule1F1B(self.stage, CHUNKS, cross_entropy)
        self.stage.compute = Counter()
        self.records: list[dict[str, Any]] = []

    def step(self, batch: dict[str, Tensor], number: int) -> float:
        stage, found = self.stage, []
        stage.compute.clear()
        before = {name: Counter(getattr(stage, name, ())) for name in ("bytes", "raw_bytes", "seconds")}
        side = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
        inputs = batch.get("input_ids", batch.get("pixel_values"))
        if self.label != TORCH:
            stage.sample_ids(range(len(inputs)), CHUNKS)
        torch.manual_seed(1000 + number)  # dropout is that of every other codec
        dist.barrier()
        wire, began = counters(), time.perf_counter()
        if self.last:
            self.schedule.step(target=batch["labels"], losses=found, **side)
        else:
            self.schedule.step(*((inputs,) if self.first else ()), **side)
        stepping = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        ended = time.perf_counter()
        dist.barrier()
        after = counters()
        record = {"step": time.perf_counter() - began, **stage.compute, "optimizer": ended - stepping,
                  "wire": {name: after[name] - wire[name] for name in wire}}  # fmt: skip
        for name, old in before.items():
            record[name] = {k: v - old[k] for k, v in getattr(stage, name, {}).items()}
        if self.last:
            record["loss"] = float(torch.stack(found).mean().detach())
        self.records.append(record)
        return record["step"]


def counters() -> dict[str, int]:
    """Bytes and packets that left this side, by the interface's own count: to the 'next' stage and the one before."""
    found = {}
    for name in ("next", "prev"):
        for what in ("bytes", "packets"):
            path = Path(f"/sys/class/net/{name}/statistics/tx_{what}")
            if path.is_file():
                found[f"{name} {what}"] = int(path.read_text())
    return found


def measure(model: str, rate: int, stages: int, steps: int) -> dict[str, Any] | None:
    """One row, on every rank; rank 0 has the result."""
    rank, cuts = dist.get_rank(), CUTS[model, stages]
    whole = load_model(model)
    batch = batch_of(model)
    runners = [Runner(label, whole, cuts, rank) for label in CODECS]
    del whole
    with Progress(disable=rank != 0, transient=True) as progress:
        task = progress.add_task("", total=(steps + 1) * len(runners))
        for number in range(steps + 1):
            for runner in runners:
                progress.update(task, description=f"{model} at {rate} Mbit/s: {runner.label}")
                took = runner.step(batch, number)
                progress.advance(task)
                if rank == 0:
                    progress.console.print(f"{model} {rate} Mbit/s {runner.label}: step {number} {took:.3f} s")
    mine = {runner.label: runner.records for runner in runners}
    everyone: list[Any] = [None] * stages
    dist.gather_object(mine, everyone if rank == 0 else None)
    if rank:
        return None
    return {"model": model, "rate": rate, "stages": stages, "rows": ROWS[model], "chunks": CHUNKS, "cuts": cuts,
            "codecs": {label: summary(label, [ranks[label] for ranks in everyone]) for label in CODECS}}  # fmt: skip


def summary(label: str, ranks: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the timed steps, of the step as the slowest rank saw it; everything else by rank."""
    timed = [records[1:] for records in ranks]
    seconds = [max(step) for step in zip(*([r["step"] for r in records] for records in timed), strict=True)]

    def middle(records: list[dict[str, Any]], *path: str) -> float:
        values = []
        for record in records:
            for key in path:
                record = record.get(key, 0) if isinstance(record, dict) else 0
            values.append(record)
        return statistics.median(values)

    return {
        "codec": CODECS[label], "seconds": statistics.median(seconds), "all": seconds,
        "loss": [record["loss"] for record in ranks[-1]],
        **{name: [middle(records, name) for records in timed] for name in ("forward", "backward", "optimizer")},
        **{name: [middle(records, "seconds", name) for records in timed] for name in ("encode", "decode", "wait")},
        # What left each rank towards the next stage (forward) and the one before (backward).
        **{f"{name}_{way}": [middle(records, name, way) for records in timed]
           for name in ("bytes", "raw_bytes") for way in ("forward", "backward")},
        **{f"{name}_{way}": [middle(records, "wire", f"{end} {what}") for records in timed]
           for name, what in (("wire", "bytes"), ("packets", "packets"))
           for way, end in (("forward", "next"), ("backward", "prev"))},
    }  # fmt: skip


def row_name(model: str, stages: int, rate: int) -> str:
    return f"{model}{'' if stages == 2 else f'-{stages}stages'}@{rate}"


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("what", choices=("rows", "rank"), help="list the rows to do, or be one process of a row")
    parser.add_argument("--row")
    parser.add_argument("--models", nargs="+", choices=list(ROWS), default=MODELS)
    parser.add_argument("--rates", nargs="+", type=int, default=RATES, help="Mbit/s")
    parser.add_argument("--stages", type=int, choices=(2, 3), default=2)
    parser.add_argument("--steps", type=int, help="timed steps (default 3 at 10 Mbit/s, 5 at 100, 6 at 1000)")
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), help="only these")
    parser.add_argument("--output", type=Path, default=PATH)
    parser.add_argument("--again", action="store_true", help="measure rows that the file has already")
    args = parser.parse_args()
    for label in set(CODECS) - set(args.codecs or CODECS):
        del CODECS[label]
    if args.what == "rows":
        known = harness.read(args.output, {"rows": {}})["rows"]
        rows = [row_name(model, args.stages, rate) for model in args.models for rate in args.rates]
        print(*(row for row in rows if args.again or row not in known))
        return
    model, rate = args.row.split("@")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    steps = args.steps or STEPS.get(int(rate), 3)
    found = measure(model.split("-")[0], int(rate), dist.get_world_size(), steps)
    if found is not None:
        record = harness.read(args.output, {"rows": {}})
        record["command"] = "sudo benchmarks/slow_link.sh"
        record["environment"] = {**environment(), "cores_per_process": min(1, os.cpu_count() / found["stages"])}
        if args.codecs and args.row in record["rows"]:  # codecs are added to a row that is there
            found["codecs"] = {**record["rows"][args.row]["codecs"], **found["codecs"]}
        record["rows"][args.row] = found
        harness.write(args.output, record)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
