"""Command-line arguments that example scripts share: which model, which data.  Each loads what it names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .data import TaskData, load_images, load_text
from .models import load_image_model, load_text_model


@dataclass
class TextModelArguments:
    model: str = field(
        default="minilm",
        metadata={"help": "'minilm' (packaged weights), 'tiny-bert' (random), a local folder, or a hub id."},
    )

    def load(self, task: Any, texts: Iterable[str] | None = None) -> tuple[Any, Any]:
        """(model, tokenizer) for a TaskData, or anything else with `num_labels` and `label_names`."""
        return load_text_model(self.model, task.num_labels, label_names=task.label_names, texts=texts)


@dataclass
class TextDataArguments:
    dataset: str = field(
        default="embedded",
        metadata={"help": "'embedded' (docstrings), a local folder such as data/glue/rte, or a hub id such as glue."},
    )
    task: str | None = field(default=None, metadata={"help": "Configuration of a hub data set: cola, rte, sst2, ..."})
    max_length: int = field(default=128, metadata={"help": "Tokens per example; longer ones are cut."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many rows only."})
    data_seed_for_subset: int = field(default=0, metadata={"help": "Which rows max_train_samples takes."})

    def load(self) -> TaskData:
        return load_text(self.dataset, self.task, max_train=self.max_train_samples, max_eval=self.max_eval_samples,
                         seed=self.data_seed_for_subset)  # fmt: skip


@dataclass
class ImageModelArguments:
    model: str = field(
        default="efficientnet-lite0",
        metadata={
            "help": "'efficientnet-lite0' (packaged weights), a timm name, 'torchvision:NAME', a local folder, or a "
            "hub id."
        },
    )
    pretrained: bool | None = field(
        default=None, metadata={"help": "Load ImageNet weights from the hub; default: only packaged ones."}
    )
    image_size: int = field(default=96, metadata={"help": "Pixels squared."})
    channels_last: bool = field(default=True, metadata={"help": "Channels-last weights: faster convolutions on CPUs."})

    def load(self, task: Any) -> tuple[Any, Any]:
        """(model, preprocessing) for a TaskData, or anything else with `num_labels` and `label_names`."""
        import torch

        model, preprocessing = load_image_model(
            self.model, task.num_labels, self.image_size, pretrained=self.pretrained, label_names=task.label_names
        )
        return model.to(memory_format=torch.channels_last) if self.channels_last else model, preprocessing


@dataclass
class ImageDataArguments:
    dataset: str = field(
        default="embedded",
        metadata={"help": "'embedded' (digits), a local folder such as data/cifar10, or a hub id: uoft-cs/cifar10."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many images only."})
    data_seed_for_subset: int = field(default=0, metadata={"help": "Which images max_train_samples takes."})

    def load(self) -> TaskData:
        return load_images(self.dataset, max_train=self.max_train_samples, max_eval=self.max_eval_samples,
                           seed=self.data_seed_for_subset)  # fmt: skip
