"""Make an image classifier smaller in three ways, and compare what was gained and lost on one report card.

A dense network is trained, or taken from a folder; a share of its weights is then set to zero one by one
(unstructured), the same share of its channels is cut out and the rest retrained (structured), and it is quantized to
int8 with a calibration set.

    python examples/cifar/run_prune.py                                   # scikit-learn's digits, a few minutes
    python examples/cifar/run_prune.py --dataset ../shared/data/cifar10 --max_train_samples 10000 --image_size 64
    python examples/cifar/run_prune.py --dataset uoft-cs/cifar100 --image_size 224 --pretrained True

Each step has a folder below --output_dir and is skipped once it is finished there; training goes on from its last
checkpoint.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_actcompress.cli import main as command_line
from hf_actcompress.weights.manifest import is_pruned, load_pruned, save_pruned
from hf_actcompress.weights.quantize import quantize_static, save_quantized
from hf_actcompress.weights.structured import prune
from hf_actcompress.workloads import (
    TaskData,
    build_compute_metrics,
    collate_images,
    load_image_model,
    prepare_images,
)  # fmt: skip
from hf_actcompress.workloads.arguments import ImageDataArguments
from hf_actcompress.workloads.results import bf16_is_fast
from hf_actcompress.workloads.run import parse_plain

STEPS = ("dense", "unstructured", "structured", "int8", "card")
DEFAULTS = {
    "output_dir": "outputs/prune",
    "num_train_epochs": 20,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    "bf16": bf16_is_fast(),
    "eval_strategy": "no",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "remove_unused_columns": False,
}


@dataclass
class ModelArguments:
    model: str = field(
        default="torchvision:googlenet",
        metadata={"help": "'torchvision:NAME', a timm name, a local folder with trained weights, or a hub id."},
    )
    pretrained: bool = field(default=False, metadata={"help": "Start from ImageNet weights (a download)."})
    image_size: int = field(default=32, metadata={"help": "Pixels squared."})
    steps: list[str] = field(default_factory=lambda: list(STEPS), metadata={"help": f"Which of {' '.join(STEPS)}."})
    share: float = field(default=0.2, metadata={"help": "Share of the weights, and of the channels, to prune."})
    importance: str = field(default="taylor", metadata={"help": "Of channels: 'l1', 'l2' or 'taylor'."})
    round_to: int = field(default=8, metadata={"help": "Numbers of channels stay multiples of this."})
    retrain_epochs: float = field(default=5, metadata={"help": "Epochs after structured pruning."})
    retrain_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of these epochs."})
    calibration_samples: int = field(default=256, metadata={"help": "Training images that int8 ranges come from."})


@dataclass
class Job:
    """What every step needs."""

    model_args: ModelArguments
    data_args: ImageDataArguments
    training_args: TrainingArguments
    data: TaskData
    train: Any
    evaluation: Any
    calibration: Any

    def folder(self, step: str) -> Path:
        return Path(self.training_args.output_dir) / step

    def done(self, step: str) -> bool:
        return (self.folder(step) / "step.json").is_file()

    def finish(self, step: str, record: dict[str, Any]) -> None:
        (self.folder(step) / "step.json").write_text(json.dumps(record, indent=2))

    def trainer(self, model: Any, step: str, **changes: Any) -> Trainer:
        args = replace(self.training_args, output_dir=str(self.folder(step) / "training"), **changes)
        metrics = build_compute_metrics(self.data.task, self.data.num_labels)
        return Trainer(model=model, args=args, train_dataset=self.train, eval_dataset=self.evaluation,
                       compute_metrics=metrics, data_collator=collate_images)  # fmt: skip


def train(job: Job, model: Any, step: str, **changes: Any) -> dict[str, Any]:
    """Trains `model` as `step`, from its last checkpoint where there is one; returns what to remember."""
    trainer = job.trainer(model, step, **changes)
    folder = Path(trainer.args.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    outcome = trainer.train(resume_from_checkpoint=last)
    return {"metrics": trainer.evaluate(), "train_loss": outcome.metrics["train_loss"], "epochs": trainer.state.epoch,
            "history": [entry for entry in trainer.state.log_history if "loss" in entry]}  # fmt: skip


def dense(job: Job) -> None:
    given = job.model_args
    model, _ = load_image_model(
        given.model, job.data.num_labels, given.image_size, pretrained=given.pretrained,
        label_names=job.data.label_names,
    )  # fmt: skip
    model = model.to(memory_format=torch.channels_last)
    record = train(job, model, "dense")
    save_pruned(model, job.folder("dense"))
    job.finish("dense", record)


def unstructured(job: Job) -> None:
    """The smallest weights of all layers together become zero; nothing is retrained."""
    from torch.nn.utils import prune as torch_prune

    model = load_pruned(job.folder("dense"))
    layers = [(m, "weight") for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=job.model_args.share)
    for module, name in layers:
        torch_prune.remove(module, name)
    save_pruned(model, job.folder("unstructured"))
    job.finish("unstructured", {"metrics": job.trainer(model, "unstructured").evaluate()})


def structured(job: Job) -> None:
    given, folder = job.model_args, job.folder("structured")
    if not is_pruned(folder / "pruned"):
        model = load_pruned(job.folder("dense"))
        batches = list(itertools.islice(job.trainer(model, "structured").get_train_dataloader(), 8))
        inputs = {"pixel_values": batches[0]["pixel_values"][:2]}
        outcome = prune(model, inputs, channels=given.share, importance=given.importance, round_to=given.round_to,
                        batches=batches if given.importance == "taylor" else None)  # fmt: skip
        print(outcome)
        save_pruned(model, folder / "pruned")  # a resumed training starts from the same shapes
    model = load_pruned(folder / "pruned").to(memory_format=torch.channels_last)
    before = job.trainer(model, "structured").evaluate()
    record = train(job, model, "structured", num_train_epochs=given.retrain_epochs,
                   learning_rate=given.retrain_learning_rate, warmup_steps=0)  # fmt: skip
    save_pruned(model, folder)
    job.finish("structured", {**record, "before_retraining": before})


def int8(job: Job) -> None:
    model = load_pruned(job.folder("dense"))
    # Ranges are those of images as the model will see them: not cropped, not mirrored.
    calibration = torch.utils.data.Subset(job.calibration, range(job.model_args.calibration_samples))
    batches = [collate_images([calibration[i] for i in range(start, min(start + 32, len(calibration)))])
               for start in range(0, len(calibration), 32)]  # fmt: skip
    quantized = quantize_static(model, batches)
    save_quantized(quantized, job.folder("int8"))
    job.finish("int8", {})


def card(job: Job) -> None:
    """The table of all four; also from the command line: hf-actcompress card FOLDER... --data DATASET."""
    folders = [str(job.folder(step)) for step in STEPS[:-1] if job.done(step)]
    options = ["--data", job.data_args.dataset, "--output", str(job.folder("card")), "--repeats", "30"]
    if job.data_args.max_eval_samples:
        options += ["--max-samples", str(job.data_args.max_eval_samples)]
    if command_line(["card", *folders, *options]):
        raise SystemExit("The card could not be made.")


def main(argv: list[str] | None = None) -> None:
    model_args, data_args, training_args = parse_plain([ModelArguments, ImageDataArguments, TrainingArguments], argv,
                                                       DEFAULTS)  # fmt: skip
    unknown = [step for step in model_args.steps if step not in STEPS]
    if unknown:
        raise ValueError(f"--steps holds {unknown}; the steps are {', '.join(STEPS)}.")
    set_seed(training_args.seed)
    if model_args.calibration_samples < 2:
        raise ValueError(f"--calibration_samples {model_args.calibration_samples}: give 2 or more.")
    data = data_args.load()
    _, preprocessing = load_image_model(model_args.model, data.num_labels, model_args.image_size)
    train_rows, evaluation = prepare_images(data, preprocessing)
    few = min(model_args.calibration_samples, len(data.train))
    model_args.calibration_samples = few
    _, plain = prepare_images(replace(data, eval=data.train.select(range(few))), preprocessing)
    job = Job(model_args, data_args, training_args, data, train_rows, evaluation, plain)
    for step in STEPS:
        if step in model_args.steps and not job.done(step):
            print(f"step: {step}", flush=True)
            globals()[step](job)


if __name__ == "__main__":
    main()
