"""torchvision's classifiers as transformers models, so that the Trainer, `save_pretrained` and Auto classes know them.

timm has its own wrapper in transformers; torchvision has none.  Importing this file registers the two classes below,
after which `AutoModelForImageClassification.from_pretrained` loads what they have saved.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

# Options without which a model trains or prunes differently from what its name says: outputs of auxiliary heads, and
# GoogLeNet's initialisation, which torchvision itself means to drop.
_OPTIONS = {
    "googlenet": {"aux_logits": False, "init_weights": False, "transform_input": False},
    "inception_v3": {"aux_logits": False, "init_weights": False, "transform_input": False},
}


class TorchvisionConfig(PreTrainedConfig):
    model_type = "torchvision"

    def __init__(self, architecture: str = "googlenet", model_args: dict[str, Any] | None = None, **rest: Any) -> None:
        self.architecture, self.model_args = architecture, model_args or {}
        super().__init__(**rest)


class TorchvisionForImageClassification(PreTrainedModel):
    """A torchvision classifier: `pixel_values` [B, 3, H, W] and perhaps `labels` [B] to loss and `logits` [B, C]."""

    config_class = TorchvisionConfig
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # **unused is no way to normalise the loss; the Trainer has to

    def __init__(self, config: TorchvisionConfig) -> None:
        from torchvision import models

        super().__init__(config)
        if config.architecture not in models.list_models(module=models):
            close = difflib.get_close_matches(config.architecture, models.list_models(module=models), n=5, cutoff=0.4)
            raise ValueError(f"torchvision has no classifier {config.architecture!r}; close names: {close or 'none'}.")
        options = {**_OPTIONS.get(config.architecture, {}), **config.model_args}
        self.net = models.get_model(config.architecture, weights=None, num_classes=config.num_labels, **options)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torchvision has initialised its own layers."""

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None, **unused: Any
    ) -> Any:
        logits = self.net(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(TorchvisionConfig.model_type, TorchvisionConfig, exist_ok=True)
AutoModelForImageClassification.register(TorchvisionConfig, TorchvisionForImageClassification, exist_ok=True)


def pretrained_weights(name: str, num_labels: int) -> dict[str, Tensor]:
    """torchvision's ImageNet weights of `name` (a download), without a head of another number of classes."""
    from torchvision import models

    weights = models.get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)
    heads = [key for key, value in weights.items() if value.shape[:1] == torch.Size([1000]) and num_labels != 1000]
    return {key: value for key, value in weights.items() if key not in heads and not key.startswith("aux")}
