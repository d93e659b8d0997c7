"""LeNet5 and MNIST for weight compression: the 431,080-parameter network, and digits that are read once and stay in
memory as one tensor.

What is compressed, and how, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_actcompress.workloads.results import bf16_is_fast

MEAN, STD = 0.1307, 0.3081


class LeNet5(nn.Module):
    """Caffe's LeNet5: 20 and 50 filters of 5 x 5, then 800 -> 500 -> 10.  Takes [B, 1, 28, 28]."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)
        self.dropout = dropout

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """{"logits"}, with labels {"loss", "logits"}: what the Trainer asks for."""
        # Half the time on a CPU.  Not `contiguous`: with one channel it would find nothing to do.
        x = pixel_values.to(memory_format=torch.channels_last)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        x = F.dropout(F.relu(self.fc1(x)), self.dropout, self.training)
        logits = self.fc2(x).float()
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Digits(torch.utils.data.Dataset):
    """Images uint8 [N, 28, 28] and labels [N], handed out by the batch.

    shift: each image is moved by up to that many pixels along both axes, at random (torch's generator, which the
    Trainer seeds and restores).
    """

    def __init__(self, pixels: Tensor, labels: Tensor, shift: int = 0) -> None:
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images and {len(labels)} labels: the numbers must be equal.")
        self.labels, self.shift = labels.long(), shift
        self.pixels = F.pad(pixels, (shift,) * 4)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(rows)
        pixels = self.pixels[index]
        if self.shift:
            top, left = torch.randint(2 * self.shift + 1, (2, len(index), 1))
            span = torch.arange(28)
            batch = torch.arange(len(index))[:, None, None]
            pixels = pixels[batch, (top + span)[:, :, None], (left + span)[:, None, :]]
        return {"pixel_values": ((pixels.float() / 255 - MEAN) / STD)[:, None], "labels": self.labels[index]}

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([row]).items()}


def as_batch(batch: Any) -> Any:
    """The Trainer's collator: `Digits` hands out batches."""
    return batch


def load_digits(
    name_or_path: str, *, shift: int = 0, max_train: int | None = None, max_eval: int | None = None
) -> tuple[Digits, Digits]:
    """(train, evaluation) of MNIST or another set of 28 x 28 grey images with 10 classes: a folder or a hub id."""
    from hf_actcompress.workloads.data import load_images

    data = load_images(name_or_path, max_train=max_train, max_eval=max_eval)
    train, evaluation = (_decode(split, data) for split in (data.train, data.eval))
    return Digits(*train, shift=shift), Digits(*evaluation)


def _decode(split: Any, data: Any) -> tuple[Tensor, Tensor]:
    import numpy as np

    pixels = np.stack([np.asarray(image.convert("L")) for image in split[data.image_column]])
    if pixels.shape[1:] != (28, 28):
        raise ValueError(f"The images of {data.task!r} are {pixels.shape[1:]}, and LeNet5 takes 28 x 28.")
    return torch.from_numpy(pixels), torch.tensor(split[data.label_column])


def error_rate(prediction: Any) -> dict[str, float]:
    """The Trainer's compute_metrics: {"error": per cent}."""
    wrong = (prediction.predictions.argmax(-1) != prediction.label_ids).mean()
    return {"error": 100 * float(wrong)}


def make_trainer(
    model: nn.Module | None, train: Digits, evaluation: Digits, output_dir: str, *, epochs: float,
    learning_rate: float, weight_decay: float = 5e-4, callbacks: Sequence[Any] = (),
    loss: Callable[..., Tensor] | None = None,
    model_init: Callable[..., nn.Module] | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """A Trainer with SGD and momentum 0.9 whose learning rate falls along a cosine; batches of 256.

    In bf16 autocast where that is fast.
    """
    from transformers import Trainer, TrainingArguments

    settings = {
        "output_dir": output_dir, "num_train_epochs": epochs, "learning_rate": learning_rate,
        "weight_decay": weight_decay, "lr_scheduler_type": "cosine", "warmup_steps": 20,
        "bf16": bf16_is_fast(),
        "per_device_train_batch_size": 256, "per_device_eval_batch_size": 1000, "remove_unused_columns": False,
        "eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": "no", "report_to": [],
        "use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": torch.accelerator.is_available(),
    }  # fmt: skip
    return Trainer(
        model=model, args=TrainingArguments(**{**settings, **arguments}), train_dataset=train,
        eval_dataset=evaluation, data_collator=as_batch, compute_metrics=error_rate, callbacks=list(callbacks),
        compute_loss_func=loss, model_init=model_init,
        # The Trainer's own "sgd" has no momentum.
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": learning_rate, "momentum": 0.9, "nesterov": True}),
    )  # fmt: skip
