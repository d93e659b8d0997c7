"""Teach a small text classifier what a large one knows.

A teacher is fine-tuned, or taken from a folder.  The student is a few layers of the same network, or another model,
and is trained with the teacher, or alone for comparison.

    python examples/glue/run_distill.py                                        # packaged MiniLM, embedded data
    python examples/glue/run_distill.py --dataset ../shared/data/glue/sst2 --max_train_samples 5000
    python examples/glue/run_distill.py --dataset glue --task sst2 --teacher bert-base-uncased --layers 4 --hidden 1
    python examples/glue/run_distill.py --alone True
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_actcompress.weights.depth import drop_layers
from hf_actcompress.weights.distillation import DistillationTrainer
from hf_actcompress.weights.structured import count
from hf_actcompress.workloads import (
    build_compute_metrics,
    load_text_model,
    print_results,
    tokenize_splits,
    write_results,
)  # fmt: skip
from hf_actcompress.workloads.arguments import TextDataArguments
from hf_actcompress.workloads.run import parse_plain

DEFAULTS = {
    "output_dir": "outputs/distill",
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5e-5,
    "eval_strategy": "no",
}


@dataclass
class ModelArguments:
    teacher: str = field(
        default="minilm",
        metadata={"help": "'minilm', 'tiny-bert', a hub id, or a local folder. A folder with a fine-tuned model and "
                  "--teacher_epochs 0 is used as it is."},
    )  # fmt: skip
    teacher_epochs: float = field(default=2, metadata={"help": "Epochs of fine-tuning the teacher; 0 leaves it."})
    student: str | None = field(
        default=None, metadata={"help": "A model of its own; default: --layers layers of the teacher before training."}
    )
    layers: int = field(default=3, metadata={"help": "Layers that the student keeps of the teacher's network."})
    alone: bool = field(default=False, metadata={"help": "Train the student without the teacher, for comparison."})
    temperature: float = field(default=2.0, metadata={"help": "Softens the teacher's outputs."})
    alpha: float = field(default=0.5, metadata={"help": "Share of the teacher in the loss."})
    hidden: float = field(default=0.0, metadata={"help": "Weight of the loss on hidden states."})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, training_args = parse_plain([ModelArguments, TextDataArguments, TrainingArguments], argv,
                                                       DEFAULTS)  # fmt: skip
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="data"):
        data = data_args.load()

    def load(name: str) -> Any:
        return load_text_model(name, data.num_labels, label_names=data.label_names, texts=data.texts())

    teacher, tokenizer = load(model_args.teacher)
    set_seed(training_args.seed)  # whatever the teacher was, the student starts from the same numbers
    student, _ = load(model_args.student or model_args.teacher)
    if model_args.student is None:
        total = student.config.get_text_config().num_hidden_layers
        if not 0 < model_args.layers < total:
            raise ValueError(f"--layers {model_args.layers}: the teacher has {total} layers; keep 1 to {total - 1}.")
        drop_layers(student, total - model_args.layers)
    train, evaluation = tokenize_splits(data, tokenizer, data_args.max_length)
    common = {"train_dataset": train, "eval_dataset": evaluation, "processing_class": tokenizer,
              "compute_metrics": build_compute_metrics(data.task, data.num_labels),
              "data_collator": DataCollatorWithPadding(tokenizer)}  # fmt: skip
    record: dict[str, Any] = {
        "task": data.task, "data": data.source, "teacher": model_args.teacher, "alone": model_args.alone,
        "temperature": model_args.temperature, "alpha": model_args.alpha, "hidden": model_args.hidden,
        "epochs": training_args.num_train_epochs, "batch_size": training_args.train_batch_size,
        "learning_rate": training_args.learning_rate, "seed": training_args.seed,
        "parameters": {"teacher": count(teacher), "student": count(student)}, "metrics": {},
    }  # fmt: skip

    if not model_args.alone:
        folder = Path(training_args.output_dir) / "teacher"
        args = replace(training_args, output_dir=str(folder), num_train_epochs=model_args.teacher_epochs)
        trainer = Trainer(teacher, args, **common)
        if model_args.teacher_epochs:
            trainer.train()
            trainer.save_model()
        record["metrics"]["teacher"] = _metrics(trainer.evaluate())
    set_seed(training_args.seed)  # the student sees the same batches with and without a teacher
    if model_args.alone:
        trainer = Trainer(student, training_args, **common)
    else:
        trainer = DistillationTrainer(student, training_args, teacher=teacher, temperature=model_args.temperature,
                                      alpha=model_args.alpha, hidden=model_args.hidden, **common)  # fmt: skip
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    record["metrics"]["student"] = _metrics(trainer.evaluate())
    record["history"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    path = write_results(training_args.output_dir, record)
    print_results({key: value for key, value in record.items() if key != "history"})
    print(f"Results: {path}")
    return record


def _metrics(found: dict[str, float]) -> dict[str, float]:
    times = ("epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    named = {name.removeprefix("eval_"): value for name, value in found.items()}
    return {name: value for name, value in named.items() if name not in times}


if __name__ == "__main__":
    main()
