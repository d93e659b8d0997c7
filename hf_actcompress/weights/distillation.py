"""Distillation: a small model learns from the outputs of a large one, inside transformers' Trainer.

The losses are plain functions; `DistillationTrainer` adds them to the task's loss.  It knows neither pruning nor
codecs, whose callbacks work with it as with any Trainer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

PROJECTIONS = "distillation.safetensors"


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over rows (Hinton et al. 2015).

    Logits [..., C] of equal shapes.  The factor T^2 makes the size of the gradient independent of T.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"The student's logits are {list(student_logits.shape)}, the teacher's "
                         f"{list(teacher_logits.shape)}: both need the same classes.")  # fmt: skip
    student = F.log_softmax(student_logits.float() / temperature, dim=-1).flatten(0, -2)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1).flatten(0, -2)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def hidden_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of hidden states [B, L, D] after layer normalisation without weights, so that the scales of
    the two networks do not matter.  `mask` [B, L] leaves out padding."""
    width = student.shape[-1:]
    error = (F.layer_norm(student.float(), width) - F.layer_norm(teacher.float(), width)).square().mean(-1)
    if mask is None:
        return error.mean()
    mask = mask.to(error.dtype)
    return (error * mask).sum() / mask.sum().clamp(min=1)


def layer_map(student: int, teacher: int) -> list[int]:
    """For each of the student's layers 1..S the teacher's of the same relative depth: S=3, T=6 gives 2, 4, 6."""
    return [round((i + 1) * teacher / student) for i in range(student)]


class DistillationTrainer(Trainer):
    """A Trainer whose model also learns from `teacher`.

        trainer = DistillationTrainer(student, args, teacher=teacher, temperature=2.0, alpha=0.5, ...)

    Loss: (1 - alpha) * task + alpha * soft + hidden * hidden states.  The soft loss is `distillation_loss`, or the
    mean squared error of the outputs in a regression (one label).  Evaluation gives the task's loss alone.

    Args:
        teacher: gets the same inputs without labels, in eval mode and without gradients; it must take the student's
            tokens or images and return as many logits.
        temperature: above 0; the higher, the more the teacher's scores of wrong classes count.
        alpha: share of the soft loss, 0 to 1.
        hidden: weight of the loss on hidden states; needs models that return them.  A projection is learnt where
            widths differ; it is saved in checkpoints and is no part of the student.
        layers: the teacher's layer (1 is the first block's output) for each of the student's; default `layer_map`.
    """

    def __init__(
        self, *args: Any, teacher: nn.Module, temperature: float = 2.0, alpha: float = 0.5, hidden: float = 0.0,
        layers: Sequence[int] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r}: give a number above 0; 1 to 5 are usual.")
        if not 0 <= alpha <= 1 or hidden < 0:
            raise ValueError(f"alpha={alpha!r}, hidden={hidden!r}: alpha is from 0 to 1, hidden 0 or more.")
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = False  # our terms are means over the batch at hand
        self.temperature, self.alpha, self.hidden = temperature, alpha, hidden
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.layers = None if layers is None else list(layers)
        self.projections: nn.ModuleList | None = None
        if hidden:
            self._match_layers()
        self._parts: dict[str, list[Tensor]] = {}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        labels = inputs.get("labels")
        extra = {"output_hidden_states": True} if self.hidden else {}
        outputs = model(**inputs, **extra)
        if self.compute_loss_func is not None:
            task = self.compute_loss_func(outputs, labels, num_items_in_batch=None)
        elif self.label_smoother is not None and labels is not None:
            task = self.label_smoother(outputs, labels)
        else:
            task = outputs["loss"]
        with torch.no_grad():
            # At every step: other code that evaluates or trains the teacher may have changed its mode.
            self.teacher.eval()
            told = self.teacher(**{key: value for key, value in inputs.items() if key != "labels"}, **extra)
        if outputs["logits"].shape[-1] == 1:
            soft = F.mse_loss(outputs["logits"].float(), told["logits"].float())
        else:
            soft = distillation_loss(outputs["logits"], told["logits"], self.temperature)
        parts = {"task": task, "soft": soft}
        # Without labels there is no task loss: the teacher alone decides.
        loss = soft if task is None else (1 - self.alpha) * task + self.alpha * soft
        if self.hidden:
            parts["hidden"] = self._hidden(outputs["hidden_states"], told["hidden_states"], inputs)
            loss = loss + self.hidden * parts["hidden"]
        for name, value in parts.items():
            if value is not None:
                self._parts.setdefault(f"distill/{name}", []).append(value.detach())
        return (loss, outputs) if return_outputs else loss

    def _hidden(self, student: Sequence[Tensor], teacher: Sequence[Tensor], inputs: Mapping[str, Any]) -> Tensor:
        mask = inputs.get("attention_mask")
        losses = []
        for own, number in enumerate(self.layers):
            mine = student[own + 1]
            mine = mine if self.projections is None else self.projections[own](mine)
            fits = mask is not None and mask.shape == mine.shape[:2]
            losses.append(hidden_loss(mine, teacher[number], mask if fits else None))
        return torch.stack(losses).mean()

    def _match_layers(self) -> None:
        """Checks depths, and makes projections where widths differ."""
        depths = [getattr(m.config.get_text_config(), "num_hidden_layers", None) if hasattr(m, "config") else None
                  for m in (self.model, self.teacher)]  # fmt: skip
        if None in depths:
            raise ValueError("hidden > 0 needs two transformers models whose configurations have num_hidden_layers; "
                             "use hidden=0 for others.")  # fmt: skip
        self.layers = layer_map(*depths) if self.layers is None else self.layers
        if len(self.layers) != depths[0] or not all(0 <= i <= depths[1] for i in self.layers):
            raise ValueError(f"layers={self.layers}: give one number from 0 to {depths[1]} for each of the student's "
                             f"{depths[0]} layers.")  # fmt: skip
        widths = [m.config.get_text_config().hidden_size for m in (self.model, self.teacher)]
        if widths[0] != widths[1]:
            self.projections = nn.ModuleList(nn.Linear(*widths) for _ in self.layers).to(self.args.device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.projections is not None:
            optimizer.add_param_group({"params": list(self.projections.parameters()), "weight_decay": 0.0})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._parts:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._parts.items()}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.projections is not None and self.args.should_save:
            from safetensors.torch import save_file
            from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

            folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            if os.path.isdir(folder):
                save_file(self.projections.state_dict(), os.path.join(folder, PROJECTIONS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = os.path.join(resume_from_checkpoint, PROJECTIONS)
        if self.projections is not None:
            if not os.path.isfile(path):
                raise ValueError(f"{resume_from_checkpoint} has no {PROJECTIONS}: it was made without distillation of "
                                 "hidden states, or with models of equal width.")  # fmt: skip
            from safetensors.torch import load_file

            self.projections.load_state_dict(load_file(path))
