"""A Trainer on a tiny BERT and 16 rows: 4 steps an epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_actcompress import ActCompressCallback, ActCompressConfig

from . import build, text_batch

STEPS = 4  # per epoch
COARSE = "uniform:bits=1"
FIRST, LAST = "bert.encoder.layer.0", "bert.encoder.layer.3"


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    batch = text_batch(count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        return iter(rows())


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(
    folder: Any, *callbacks: Any, model: Any = None, data: Any = None, kind: type = Trainer, **options: Any
) -> Trainer:
    """Options go to TrainingArguments, except `model_init`, `eval_dataset` and `compute_metrics`."""
    own = {name: options.pop(name) for name in ("model_init", "eval_dataset", "compute_metrics") if name in options}
    values = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    if model is None and "model_init" not in own:
        model = build("bert")
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **values),
        train_dataset=rows() if data is None else data,
        callbacks=list(callbacks),
        **{"eval_dataset": rows(8), **own},
    )


def callback(codec=COARSE, **options):
    return ActCompressCallback(ActCompressConfig(codec, **options))


def trained(folder, *callbacks, resume=None, **options):
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def calls(compression):
    return {row["direction"]: row["calls"] for row in compression.stats}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


class Stumble(TrainerCallback):
    """Raises at the end of one step, once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            raise RuntimeError("the cable was pulled")


class Watch(TrainerCallback):
    """Notes the codecs in use at the end of every step."""

    def __init__(self, callback: Any) -> None:
        self.callback, self.codecs = callback, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.codecs.append(str(next(iter(self.callback.handle.boundaries.values())).forward.codec))
