"""Pairs of processes that train over a pipeline, and what becomes of them when something goes wrong.

    python pipeline_pairs.py FOLDER

Imports once and forks a pair for each case below, so that each has two real processes on loopback without the seconds
that imports take.  FOLDER gets report.json: {case: [[exit code, stderr, seconds], ...by rank]}.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import transformers  # noqa: E402, F401
from torch.distributed import TCPStore  # noqa: E402
from torch.distributed.pipelining import Schedule1F1B  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import hf_actcompress.pipeline.launch as launch  # noqa: E402
import hf_actcompress.pipeline.training as training  # noqa: E402
from helpers import build, text_batch  # noqa: E402
from helpers.processes import ROOT  # noqa: E402
from hf_actcompress import parse_codec  # noqa: E402
from hf_actcompress.pipeline import CompressedPipelineStage, split  # noqa: E402
from hf_actcompress.pipeline.arguments import PipelineArguments  # noqa: E402
from hf_actcompress.pipeline.wire import HEADER, WireFormat  # noqa: E402

ROWS, DEADLINE = 20, 60.0
COMMON = {"batch_size": 8, "num_train_epochs": 4, "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True,
          "eval_batch_size": 8, "timeout": 30.0}  # fmt: skip
DELTA = {"topology": "client-server", "codec": "delta+block:bits=2", "grad_codec": "block:bits=8,round=stochastic",
         "save_steps": 4}  # fmt: skip


@dataclass
class Case:
    """options: of both ranks; other: of rank 1 besides; fault: what happens there, {step: name}; pause: rank 1 starts
    so many seconds later, or (None) never."""

    options: dict[str, Any] = field(default_factory=dict)
    other: dict[str, Any] = field(default_factory=dict)
    fault: dict[int, str] = field(default_factory=dict)
    pause: float | None = 0.0
    model: str = "bert"
    dropout: bool = True
    after: str | None = None  # uses the folder of that case
    damage: str | None = None  # a copy of it, in which a byte of this checkpoint's file is another one


CASES = {
    "plain": Case({"codec": "none", "max_grad_norm": 0.1}, dropout=False),
    "whole": Case(DELTA),
    "killed": Case(DELTA, fault={7: "kill"}),
    "resumed": Case({**DELTA, "resume": True}, after="killed"),
    "other codec on resuming": Case({**DELTA, "resume": True, "codec": "block:bits=2"}, after="killed"),
    "hangs": Case({"timeout": 2.0}, fault={3: "hang"}),
    "late": Case(pause=2.0, fault={}),
    "absent": Case({"timeout": 2.0}, pause=None),
    "other codec": Case(other={"codec": "block:bits=3"}),
    "other model": Case(model="bert/roberta"),
    "damaged": Case({"checksum": True}, fault={2: "damage"}),
    "nan": Case({"nonfinite": "raise"}, fault={3: "nan"}),
    "overflow": Case({"fp16": True, "codec": "block:bits=8"}, fault={3: "inf"}, dropout=False),
    "torn": Case({**DELTA, "resume": True}, after="whole", damage="step-12/rank1.safetensors"),
    "other secret": Case({"secret": "one"}, other={"secret": "another"}),
    "other settings": Case(other={"seed": 3, "batch_size": 12}),
    "nowhere": Case({"output_dir": "/proc/nowhere", "save_steps": 4}),
    "shape": Case(fault={2: "shape"}),
    "glue": Case(),
    "cifar": Case(),
}


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def rows() -> list[dict[str, torch.Tensor]]:
    batch = text_batch(rows=ROWS)
    return [{name: value[i] for name, value in batch.items()} for i in range(ROWS)]


def collate(chosen: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}


def accuracy(seen: Any) -> dict[str, float]:
    return {"accuracy": float((seen.predictions.argmax(-1) == seen.label_ids).mean())}


class Broken(training.PipelineTrainer):
    """Rank 1 does what the case says in the middle of a step."""

    fault: dict[int, str] = {}

    def _loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return super()._loss(output, target) * (torch.inf if self.fault.get(self.step + 1) == "inf" else 1)

    def _train_step(self, batch: Any) -> None:
        what = self.fault.get(self.step + 1) if self.rank == 1 else None
        stage = self.stages[0]
        if what in ("kill", "hang"):
            collect = stage.collect

            def struck(direction: str, chunk: int, place: int) -> Any:
                if chunk == 2 and what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if chunk == 2:
                    time.sleep(4)
                return collect(direction, chunk, place)

            stage.collect = struck
        elif what == "damage":
            write = WireFormat.write

            def damaging(wire: WireFormat, payload: Any, buffer: torch.Tensor, *args: Any, **more: Any) -> Any:
                done = write(wire, payload, buffer, *args, **more)
                buffer[HEADER + 5] ^= 1
                return done

            WireFormat.write = damaging
        elif what == "nan":
            next(stage.submod.parameters()).data.fill_(torch.nan)
        super()._train_step(batch)


def train(case: Case, rank: int, folder: Path) -> None:
    options = {**COMMON, "output_dir": str(folder), **case.options, **(case.other if rank else {})}
    model = build(case.model.split("/")[rank if "/" in case.model else 0])
    Broken.fault = case.fault
    trainer = Broken(
        model if case.dropout else without_dropout(model), PipelineArguments(**options),
        train=rows() if rank == 0 else None, evaluation=rows()[:19] if rank == 0 else None, collate=collate,
        compute_metrics=accuracy,
    )  # fmt: skip
    history, metrics = trainer.train(), trainer.evaluate()
    if trainer.merge():
        torch.save(model.state_dict(), folder / "merged.pt")
        record = {"history": history, "metrics": metrics, "skipped": trainer.skipped}
        (folder / "log.json").write_text(json.dumps(record))


def other_shape(rank: int) -> None:
    """torch's own schedule, and a smaller batch after the first, of which nobody was told."""
    launch.join(20.0)
    modules = split(build("bert"), stages=2)
    stage = CompressedPipelineStage(
        modules[rank], rank, 2, torch.device("cpu"), codec=parse_codec("block:bits=4"), timeout=20.0
    )
    schedule = Schedule1F1B(stage, n_microbatches=2, loss_fn=cross_entropy)
    for size in (8, 6):
        batch = text_batch(rows=size)
        if rank:
            schedule.step(target=batch["labels"], attention_mask=batch["attention_mask"])
        else:
            schedule.step(batch["input_ids"], attention_mask=batch["attention_mask"])


def example(kind: str, rank: int, folder: Path) -> None:
    """The example scripts as they are, on a tiny model of each kind; data on rank 0 alone."""
    name = f"run_{kind}_pipeline"
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{kind}/{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if rank:  # must not be called
        module.DataArguments.load = None
    argv = "--max_train_samples 12 --max_eval_samples 10 --batch_size 4 --micro_batches 2 --eval_batch_size 8"
    own = {
        "glue": f"--model {folder}/model --max_length 16 --topology client-server --codec delta+block:bits=4",
        "cifar": "--model resnet10t --image_size 32 --bf16 True --codec block:bits=4 --channels_last False",
    }[kind]
    if kind == "glue":
        from hf_actcompress.workloads import load_text, load_text_model

        own += f" --dataset {folder}/data"
        if rank == 0:
            (folder / "data").mkdir()
            for split in ("train", "validation"):
                words = ("good", "bad")
                lines = [{"sentence": f"this is {words[k % 2]} number {k}", "label": k % 2} for k in range(12)]
                (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
            data = load_text(str(folder / "data"))
            names = data.label_names
            for part in load_text_model("tiny-bert", data.num_labels, label_names=names, texts=data.texts()):
                part.save_pretrained(folder / "model.part")
            (folder / "model.part").rename(folder / "model")
        while not (folder / "model").exists():
            time.sleep(0.1)
    record = module.main([*argv.split(), *own.split(), "--output_dir", str(folder), "--disable_tqdm"])
    if rank == 0:
        (folder / "returned.json").write_text(json.dumps(sorted(record)))


def child(name: str, case: Case, rank: int, folder: Path, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
    )  # fmt: skip
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{rank}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(DEADLINE - 5)  # where it hangs, if it does
    place = folder / (case.after if case.after and not case.damage else name)
    place.mkdir(exist_ok=True)
    if name == "shape":
        launch.guarded(lambda: other_shape(rank))
    elif name in ("glue", "cifar"):
        launch.guarded(lambda: example(name, rank, place))
    else:
        launch.guarded(lambda: train(case, rank, place))


def start(name: str, case: Case, rank: int, folder: Path, port: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            child(name, case, rank, folder, port)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(3)
    return pid


def hold_stores(number: int) -> tuple[int, list[int]]:
    """A process that holds that many stores, and their ports.  As under torchrun, the stores outlive the ranks.

    The process that forks the ranks must not hold them itself: a store answers in threads that look names up, and a
    rank forked meanwhile inherits the resolver's lock as taken, and waits for it for ever.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        stores = [TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in range(number)]
        os.write(write, json.dumps([store.port for store in stores]).encode() + b"\n")
        signal.pause()
    os.close(write)
    with open(read) as lines:
        return pid, json.loads(lines.readline())


def run(names: list[str], folder: Path) -> dict[str, list]:
    """The cases side by side; a process that does not end is killed and has the exit code None."""
    keeper, held = hold_stores(len(names))
    try:
        return run_on(dict(zip(names, held, strict=True)), folder)
    finally:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)


def run_on(ports: dict[str, int], folder: Path) -> dict[str, list]:
    now, running, found = 0.0, {}, {name: [None, None] for name in ports}
    waiting = {(name, rank): CASES[name].pause if rank else 0.0 for name in ports for rank in range(2)}
    last = time.monotonic()
    while waiting or running:
        # Not the time in which this process was stopped itself.
        now, last = now + min(0.5, time.monotonic() - last), time.monotonic()
        for (name, rank), pause in list(waiting.items()):
            if pause is None:
                del waiting[name, rank]
            elif now >= pause:
                del waiting[name, rank]
                running[start(name, CASES[name], rank, folder, ports[name])] = (name, rank, now)
        for pid, (name, rank, then) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended or now - then > DEADLINE:
                if not ended:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                code = os.waitstatus_to_exitcode(status) if ended else None
                words = (folder / f"{name}.{rank}.err").read_text(errors="replace")
                found[name][rank] = [code, words[-6000:], now - then]
                del running[pid]
        time.sleep(0.02)
    return found


def main() -> None:
    folder, chosen = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    torch.set_num_threads(1)
    for name in ("bert", "roberta", "resnet10t"):  # what is imported late
        build(name)
    import datasets  # noqa: F401
    import sklearn.metrics  # noqa: F401

    first = [name for name in chosen if CASES[name].after is None]
    report = {}
    for k in range(0, len(first), 4):
        report.update(run(first[k : k + 4], folder))
    for name in chosen:
        if CASES[name].damage is not None:
            shutil.copytree(folder / CASES[name].after, folder / name)
            path = folder / name / "checkpoints" / CASES[name].damage
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        if CASES[name].after is not None:
            report.update(run([name], folder))
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
