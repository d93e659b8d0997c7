"""ActCompressCallback: compression in a transformers Trainer by one line.

The hooks are attached when training begins, after the Trainer has wrapped the model, and removed when it ends.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .attach import Handle, compress_model
from .codecs.states import load_states, save_states
from .config import ActCompressConfig
from .observe.log_line import LogLine
from .observe.records import FILE_NAME as ANALYSIS_NAME
from .observe.records import Writer
from .observe.trainer import EvaluateTwice, go_first, resumed_from, save_with_checkpoints
from .observe.warning import warning_of

logger = logging.getLogger(__name__)

ALLOTMENT_NAME = "actcompress_allotment.json"  # of saved="auto:...", to be read: resuming takes it from the state


class ActCompressCallback(TrainerCallback):
    """Compress layer boundaries while a Trainer trains.

        trainer = Trainer(..., callbacks=[ActCompressCallback("block:bits=4")])

    config: an ActCompressConfig, or just a codec spec.
    example_inputs: inputs of one forward pass, for models whose input cannot be guessed.

    Each log line of the Trainer (and so `log_history` and TensorBoard) gets at most eight numbers about the time since
    the last line: `compress/forward_ratio` and `forward_error` (relative, the mean over boundaries), the same for
    `backward`, `worst_error` (of a boundary and direction), and `saved_mb`, the megabytes saved so far; with `saved`,
    `compress/saved/plain_mb` and `held_mb`, what autograd would have held of a forward pass and what was held, and
    `mean_bits` where a budget chooses them; with `analysis`, `compress/grad_cosine` and `grad_error` of the last
    sampled step, and all records go to `<output_dir>/actcompress_analysis.jsonl`.  `handle.stats()` has everything by
    layer, and after training `stats`; evaluation then runs without compression unless it is done under
    `with callback.attached(model):`.

    Checkpoints get the configuration and, per rank, the codecs' state; both are picked up by
    `resume_from_checkpoint`.  A checkpoint without them starts with fresh state.
    """

    def __init__(self, config: ActCompressConfig | str | None = None, *, example_inputs: Any = None) -> None:
        self.config = ActCompressConfig.of(config)
        _refuse_per_sample(self.config)
        self.example_inputs = example_inputs
        self.handle: Handle | None = None
        self.stats: list[dict[str, Any]] = []
        self._last_state: dict[str, Any] = {}
        self._line: LogLine | None = None
        self._epoch: int | None = None  # the last one trained in
        self._epoch_begun = False
        self._warned = False
        self._analysed: dict[str, Any] | None = None  # the last row that the probe has written
        self._trainer: Any = None
        self._stop_saving: Callable[[], None] | None = None

    @contextlib.contextmanager
    def attached(self, model: Any) -> Iterator[Handle]:
        """Compression as at the end of training, for evaluation or prediction after it."""
        with compress_model(model, self.config, example_inputs=self.example_inputs) as handle:
            handle.set_epoch(max(self.config.schedule or {0: None}) if self._epoch is None else self._epoch)
            handle.load_state_dict(copy.deepcopy(self._last_state))
            yield handle

    # -- Trainer events ---------------------------------------------------------------------------------------
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._go_first()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._detach()  # a run that raised never reached on_train_end
        self._go_first()
        self.handle = compress_model(model, self.config, example_inputs=self.example_inputs)
        self._epoch = _epoch(state)
        self._epoch_begun = False
        self.handle.set_epoch(self._epoch)
        self._line, self._warned = LogLine(self.handle), False
        if self.handle.probe is not None:
            self._record_analysis(args, state)
        if state.global_step > 0:
            self._load(resumed_from(args, state))
        logger.info("compressing %s", self._describe())
        if self._trainer is not None:
            self._stop_saving = save_with_checkpoints(self._trainer, self._save)
            if self.config.evaluate == "both":
                self._trainer.evaluate = EvaluateTwice(self._trainer.evaluate, self.handle)

    def _describe(self) -> str:
        """What is compressed where, for the log."""
        assert self.handle is not None
        parts = []
        if self.handle.cuts:
            cuts = ", ".join(f"{name} (layer {layer.index})" for name, layer in self.handle.cuts.items())
            codecs = self.config.codec
            if self.config.auto is None:
                codecs = "{} forward, {} backward".format(*self.config.scheduled(self._epoch or 0))
            parts.append(f"{cuts}: {codecs}")
        if self.config.saved:
            parts.append(f"saved tensors: {self.config.saved}")
        if self.config.reduce:
            parts.append(f"gradients between processes: {self.config.reduce}")
        return "; ".join(parts)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle is None:
            return
        if self._epoch_begun:
            # Counted, because `state.epoch` lags behind for data without a length and for epochs that are cut short.
            self._epoch += 1
        self._epoch_begun = True
        self.handle.set_epoch(self._epoch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.handle is not None and self.handle.probe is not None:
            self.handle.probe.arm(state.global_step, state.epoch)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.handle is None or logs is None:
            return
        self.handle.check_finite()
        if "loss" not in logs:
            return
        extra = self._metrics()
        warning = warning_of(self._line.errors, self.config.warn_error, self._line.codecs())
        if warning and not self._warned:
            logger.warning(warning)
            self._warned = True
        logs.update(extra)
        # The Trainer has copied `logs` into the history before it calls.
        if state.log_history:
            state.log_history[-1].update(extra)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer is None:  # else the state is in the checkpoint already
            self._save(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.is_world_process_zero)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()

    # -- helpers ----------------------------------------------------------------------------------------------
    def _save(self, folder: Path, first_process: bool) -> None:
        """Write the configuration, and this process's codec states and meters, into a checkpoint's folder."""
        if self.handle is None:
            return
        self._remember_choice()
        folder.mkdir(parents=True, exist_ok=True)
        if first_process:
            self.config.save_pretrained(folder)
            if self.handle.budget is not None:
                table = self.handle.budget.table()
                (folder / ALLOTMENT_NAME).write_text(json.dumps(table, indent=1) + "\n")
        meters = {name: meter.state_dict() for name, meter in self.handle.meters.items()}
        save_states(folder / _state_file(), self.handle.state_dict(), meters=meters)

    def _record_analysis(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.handle is not None and self.handle.probe is not None
        probe, write = self.handle.probe, None
        if state.is_world_process_zero:
            write = Writer(Path(args.output_dir) / ANALYSIS_NAME, probe.model, resume_at=state.global_step)

        def note(rows: list[dict[str, Any]]) -> None:
            self._analysed = rows[-1]
            if write is not None:  # every process measures, because batch norms may wait for each other
                write(rows)

        self._analysed, probe.write = None, note

    def _remember_choice(self) -> None:
        """Into the configuration that is saved; the user's own object stays as it is."""
        assert self.handle is not None
        if self.handle.auto is not None and self.handle.auto.chosen:
            self.config = dataclasses.replace(self.config, resolved=self.handle.auto.chosen)

    def _detach(self) -> None:
        if self._stop_saving is not None:
            self._stop_saving()
            self._stop_saving = None
        if self._trainer is not None and isinstance(vars(self._trainer).get("evaluate"), EvaluateTwice):
            self._trainer.evaluate.restore(self._trainer, "evaluate")
        if self.handle is None:
            return
        self._remember_choice()
        self.stats = self.handle.stats()
        self._last_state = self.handle.state_dict()
        self.handle.remove()
        self.handle = None

    def _metrics(self) -> dict[str, float]:
        assert self._line is not None
        row, self._analysed = self._analysed or {}, None
        return self._line.metrics({key: row.get(key) for key in ("grad_cosine", "grad_error")})

    def _go_first(self) -> None:
        """Move before the callbacks that report, so that they see what `on_log` adds."""
        self._trainer = go_first(self)
        if self._trainer is None:
            logger.warning("the calling Trainer was not found: compression metrics reach log_history only")

    def _load(self, folder: Path) -> None:
        """Take over what a checkpoint holds of codecs and meters; names, once, what it does not hold."""
        assert self.handle is not None and self._line is not None
        path, why, values, meters = folder / _state_file(), "", {}, {}
        if not path.is_file():
            why = f"{folder} has no {path.name}"
        else:
            try:
                values, more = load_states(path)
                meters = more.get("meters", {})
            except ValueError as error:
                why = str(error).rstrip(".")
        missing = self.handle.load_state_dict(values)
        if missing:
            why = why or f"{folder} was written with other codecs"
            logger.warning("%s: these codecs start with fresh state: %s", why, ", ".join(missing))
        self._line.restore(meters)


def _refuse_per_sample(config: ActCompressConfig) -> None:
    """A codec that remembers samples would stop in the first step: a Trainer does not say which ones a batch holds."""
    for option, codec, _ in config.all_codecs():
        if codec.traits.per_sample:
            raise ValueError(
                f"{option}={str(codec)!r} has to know which samples a batch holds, and transformers.Trainer does not "
                "hand that on. Choose another codec, or train in a loop of your own: with compress_model, run each "
                "forward pass within hf_actcompress.codecs.sample_ids(ids); hf_actcompress.pipeline does it by itself."
            )


def _epoch(state: TrainerState) -> int:
    # At the start of epoch n the Trainer has counted to n, give or take a rounding error.
    return int((state.epoch or 0.0) + 1e-6)


def _state_file() -> str:
    return f"actcompress_state_rank{os.environ.get('RANK', 0)}.safetensors"
