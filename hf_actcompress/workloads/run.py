"""What example scripts do around their data and model: arguments, training with compression, evaluation, results."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_actcompress.config import DEFAULT_CODEC, json_mapping
from hf_actcompress.workloads.options import CompressionArguments
from hf_actcompress.workloads.results import print_results, write_results

logger = logging.getLogger(__name__)

DEFAULTS = {
    "do_train": True,
    "do_eval": True,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 20,
    "report_to": [],
}


def parse_arguments(types: Sequence[type], argv: Sequence[str] | None, defaults: Mapping[str, Any]) -> tuple[Any, ...]:
    """`parse_plain`, and CompressionArguments as the last of the results.

    Without --codec and --saved the scripts compress boundaries to 4 bits.  Raises ValueError for a wrong codec too.
    """
    parsed = parse_plain([*types, CompressionArguments], argv, defaults)
    # A misspelt codec should not cost the loading of data and model first.
    parsed[-1].to_config(DEFAULT_CODEC)
    return parsed


def parse_plain(types: Sequence[type], argv: Sequence[str] | None, defaults: Mapping[str, Any]) -> tuple[Any, ...]:
    """Dataclasses from the command line, or from a single JSON (or YAML) file or JSON text given instead.

    `defaults` replace those of TrainingArguments and the like, for both forms.
    Raises ValueError for a file that is not there, is no JSON or holds unknown keys.
    """
    import torch
    from transformers import HfArgumentParser

    parser = HfArgumentParser(types)
    argv = list(sys.argv[1:] if argv is None else argv)
    # Without it bf16 and torchrun on a machine without an accelerator end in an error about GPUs.
    defaults = {**DEFAULTS, "use_cpu": not torch.accelerator.is_available(), **defaults}
    if len(argv) == 1 and argv[0].lstrip().startswith("{"):
        return parser.parse_dict({**defaults, **_values(argv[0], "the argument")})
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        path = Path(argv[0])
        if not path.is_file():
            raise ValueError(f"There is no argument file at {path.absolute()}.")
        return parser.parse_dict({**defaults, **_values(path.read_text(), str(path), path.suffix)})
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv)


def _values(text: str, where: str, suffix: str = ".json") -> dict[str, Any]:
    if suffix == ".json":
        return json_mapping(text, where)
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML ({error}).") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where} holds a {type(values).__name__}, where a mapping of name to value is needed.")
    return values


def train_and_report(
    *,
    model: Any,
    training_args: Any,
    compression: CompressionArguments,
    train: Any,
    evaluation: Any,
    compute_metrics: Callable[[Any], dict[str, float]],
    about: Mapping[str, Any],
    processing_class: Any = None,
    data_collator: Any = None,
) -> dict[str, Any]:
    """Train, evaluate with and without compression as `--evaluate` says, write and print the record.

    Returns the record: `metrics`, `samples_per_second`, `compression` (one row per boundary and direction),
    `history` (the Trainer's log), the configuration and `about`.
    """
    from transformers import Trainer

    from hf_actcompress.callback import ActCompressCallback
    from hf_actcompress.ops.cpu.malloc import keep_freed_memory

    if training_args.device.type == "cpu":
        keep_freed_memory()  # a step spends up to half of its time on page faults otherwise
    config = compression.to_config(DEFAULT_CODEC)
    callback = None if config is None else ActCompressCallback(config)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=compute_metrics,
        processing_class=processing_class,
        data_collator=data_collator,
        callbacks=[] if callback is None else [callback],
    )
    record: dict[str, Any] = {
        **about,
        "codec": config.codec if config is not None and config.codec else "none",
        "epochs": training_args.num_train_epochs,
        "batch_size": training_args.train_batch_size * training_args.gradient_accumulation_steps,
        "learning_rate": training_args.learning_rate,
        "seed": training_args.seed,
        "dtype": "bf16 autocast" if training_args.bf16 else "fp32",
        "config": None if config is None else config.to_dict(),
    }
    if training_args.do_train:
        outcome = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        record["samples_per_second"] = {"training": outcome.metrics["train_samples_per_second"]}
        record["train_loss"] = outcome.metrics["train_loss"]
        trainer.save_model()
        trainer.save_state()
    if training_args.do_eval:
        metrics = _evaluate(trainer, callback, model)
        record["metrics"] = metrics
    if callback is not None:
        config = callback.config  # with what auto has chosen
        record["config"] = config.to_dict()
    record["compression"] = callback.stats if callback is not None else []
    record["history"] = trainer.state.log_history
    if trainer.is_world_process_zero():
        if config is not None:
            config.save_pretrained(training_args.output_dir)
        path = write_results(training_args.output_dir, record)
        print_results({key: value for key, value in record.items() if key not in ("history", "config")})
        print(f"Results: {path}")
    return record


def _evaluate(trainer: Any, callback: Any, model: Any) -> dict[str, dict[str, float]]:
    """{metric: {"compressed": ..., "plain": ...}}, as far as the configuration asks for them."""
    variants: dict[str, dict[str, float]] = {}
    if callback is None or callback.config.evaluate != "on":
        variants["plain"] = trainer.evaluate()
    if callback is not None and callback.config.evaluate != "off":
        with callback.attached(model) as handle:
            variants["compressed"] = trainer.evaluate()
            callback.stats = callback.stats or handle.stats()
    times = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    skipped = ("epoch", *(f"eval_{name}" for name in times))
    names = dict.fromkeys(name for metrics in variants.values() for name in metrics if name not in skipped)
    return {
        name.removeprefix("eval_"): {variant: metrics.get(name) for variant, metrics in variants.items()}
        for name in names
    }


def leave_process_group() -> None:
    """`hf_actcompress.pipeline.launch.leave`, once nothing of what was trained is needed: call it after `main`."""
    from hf_actcompress.pipeline.launch import leave

    leave()
