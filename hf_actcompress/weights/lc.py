"""LCCallback: Learning-Compression in a transformers Trainer by one line.

The penalty's gradient, mu (w - Delta) - lambda, is added in `on_pre_optimizer_step`, the only event between the
finished gradient and the optimizer: once per update, after gradients have been accumulated, averaged by DDP (the
penalty is the same on every process), unscaled (fp16) and clipped.  Clipping therefore limits the gradient of the data
only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..observe.trainer import go_first, resumed_from, save_with_checkpoints
from .learning import LearningCompression
from .scheme import Scheme, parse_scheme

logger = logging.getLogger(__name__)

STATE_NAME = "lc_state.safetensors"  # in each checkpoint


class LCCallback(TrainerCallback):
    """Train towards weights that can be compressed.

        callback = LCCallback({"conv*": "prune:keep=104", "fc*": "codebook:k=2"}, mu=1e-3, growth=1.3)
        Trainer(..., callbacks=[callback]).train()     # the model now holds the compressed weights
        callback.save("small")                         # load_compressed("small", model) brings them back

    scheme: which compression for which layers, see `hf_actcompress.weights.find_tasks`.
    mu, growth: weight of the penalty at first, and its factor at each C step.  With SGD keep learning rate times mu
        below 1.
    every: "epoch", or a number of optimizer steps: when a C step is done; and one at the end.
    tune: the share of the optimizer steps, at the end, in which the model holds compressed weights and only their
        floats (codebooks, kept values, right factors) are trained; which values share an entry or are zero is fixed.

    Training starts from direct compression.  In evaluation mode (evaluation, prediction, `metric_for_best_model`) the
    model uses the compressed weights.  Checkpoints hold the trained ones, with mu, lambda and the compressed forms
    beside them, so that `resume_from_checkpoint` continues exactly.  At the end the model holds the compressed
    weights: the last, or with `load_best_model_at_end` those of the best checkpoint.

    Log lines get `lc/mu`, `lc/penalty` (its value at that moment), `lc/loss` (the logged loss with it), `lc/distance`
    (relative, between trained and compressed weights) and `lc/ratio` (of the whole model's bits).

    Raises ValueError for schemes that do not fit the model, FSDP and DeepSpeed, and fp16 without clipping.
    """

    def __init__(
        self, scheme: Scheme | str, *, mu: float = 1e-3, growth: float = 1.2, every: int | str = "epoch",
        tune: float = 0.0,
    ) -> None:  # fmt: skip
        if every != "epoch" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"every={every!r}: a C step is done each 'epoch', or after so many steps, 1 or more.")
        if not 0 <= tune < 1:
            raise ValueError(f"tune={tune!r}: a share of the training, from 0 to below 1; 0.2 is its last fifth.")
        self.tune = tune
        self.scheme = parse_scheme(scheme)  # a misspelt one should not cost a training's start
        self.mu, self.growth, self.every = mu, growth, every
        self.lc: LearningCompression | None = None
        self._steps = 0  # optimizer steps between C steps
        self._hook: Any = None
        self._trainer: Any = None
        self._stop_saving: Callable[[], None] | None = None

    def save(self, folder: str | Path, **about: Any) -> Path:
        """Write the compressed model (see `save_compressed`)."""
        if self.lc is None:
            raise ValueError("There is nothing to save yet: LCCallback compresses when training begins.")
        return self.lc.save(folder, **about)

    # -- Trainer events ---------------------------------------------------------------------------------------
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._detach()  # a run that raised never reached on_train_end
        self._trainer = go_first(self)
        if self._trainer is not None:
            self._stop_saving = save_with_checkpoints(self._trainer, self._save)
        if getattr(args, "deepspeed", None):
            raise ValueError("LCCallback needs whole parameters and gradients; DeepSpeed keeps them apart. Use DDP.")
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                "LCCallback with fp16 needs max_grad_norm > 0: without clipping, gradients are still scaled when the "
                "penalty is added. Use bf16, or set max_grad_norm."
            )
        self._steps = self._between(args, kwargs.get("train_dataloader"))
        share = _from_first_process if args.world_size > 1 else None
        self.lc = LearningCompression(model, self.scheme, mu=self.mu, growth=self.growth, share=share)
        if state.global_step > 0:
            self._load(resumed_from(args, state))
        self._hook = model.register_forward_pre_hook(self._choose_weights)
        logger.info(
            "Learning-Compression: %s; %.1f times smaller, a C step every %d steps",
            "; ".join(f"{task.pattern} ({len(task.names)}): {task.compression}" for task in self.lc.tasks),
            self.lc.ratio, self._steps,
        )  # fmt: skip

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._back()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.lc is not None:
            self.lc.add_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Counted in steps for epochs, too: what evaluates and saves within or at the end of an epoch comes after it.
        if self.lc is None:
            return
        if self.lc.settled:
            self.lc.hold()
        elif self.tune and state.global_step >= (1 - self.tune) * state.max_steps:
            self.lc.settle()
        elif state.global_step % self._steps == 0 or state.global_step == state.max_steps:
            self.lc.c_step()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._back()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        self._back()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if self.lc is None or self._hook is None or logs is None or "loss" not in logs:
            return
        with torch.no_grad():
            penalty = float(self.lc.penalty())
        extra = {
            "lc/mu": self.lc.mu, "lc/penalty": penalty, "lc/loss": logs["loss"] + penalty,
            "lc/distance": self.lc.distance(), "lc/ratio": self.lc.ratio,
        }  # fmt: skip
        logs.update(extra)
        # The Trainer has copied `logs` into the history before it calls.
        if state.log_history:
            state.log_history[-1].update(extra)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer is None:  # otherwise the state is in the checkpoint already
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.is_world_process_zero)

    def _save(self, folder: Path, first_process: bool) -> None:
        if self.lc is None or not first_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        tensors, texts = self.lc.state_dict()
        unfinished = folder / f"{STATE_NAME}.tmp"
        save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished, metadata=texts)
        os.replace(unfinished, folder / STATE_NAME)  # by renaming, so that a crash leaves no half of a file

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.lc is None:
            return
        self._back()
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(Path(state.best_model_checkpoint))
        self._detach()
        self.lc.finish()

    # -- helpers ----------------------------------------------------------------------------------------------
    def _choose_weights(self, model: Any, inputs: Any) -> None:
        assert self.lc is not None
        if model.training:
            self.lc.use_trained()
        else:
            self.lc.use_compressed()

    def _back(self) -> None:
        if self.lc is not None and self._hook is not None:
            self.lc.use_trained()

    def _detach(self) -> None:
        self._back()
        if self._stop_saving is not None:
            self._stop_saving()
            self._stop_saving = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _between(self, args: TrainingArguments, batches: Any) -> int:
        if self.every != "epoch":
            return int(self.every)
        try:
            return max(1, -(-len(batches) // args.gradient_accumulation_steps))
        except TypeError:
            raise ValueError(
                "every='epoch' needs training data of known length; give the number of steps between C steps, such "
                "as LCCallback(..., every=500)."
            ) from None

    def _load(self, folder: Path) -> None:
        assert self.lc is not None
        path = folder / STATE_NAME
        if not path.is_file():
            logger.warning("%s has no %s: Learning-Compression starts afresh from its weights", folder, STATE_NAME)
            return
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            self.lc.load_state_dict(tensors, file.metadata())


def _from_first_process(value: Tensor) -> Tensor:
    from accelerate.utils import broadcast

    return broadcast(value.contiguous(), from_process=0)
