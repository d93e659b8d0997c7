"""Command-line arguments that recipes share: which image model, and which pictures."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ImageModelArguments:
    model: str = field(
        default="efficientnet-lite0",
        metadata={"help": "'efficientnet-lite0' (packaged weights), a timm name, a local folder, or a hub id."},
    )
    pretrained: bool | None = field(
        default=None, metadata={"help": "Load timm's weights from the hub; default: only packaged ones."}
    )
    image_size: int = field(default=96, metadata={"help": "Pixels squared."})
    channels_last: bool = field(default=True, metadata={"help": "Channels-last weights: faster convolutions on CPUs."})


@dataclass
class ImageDataArguments:
    dataset: str = field(
        default="embedded",
        metadata={"help": "'embedded' (digits), a local folder such as data/cifar10, or a hub id: uoft-cs/cifar10."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many images only."})
    data_seed_for_subset: int = field(default=0, metadata={"help": "Which images max_train_samples takes."})
