"""Fine-tune a text classifier with compressed layer boundaries.

With no arguments: a packaged MiniLM learns from which library a docstring comes, compressed to 4 bits.

    python examples/glue/run_glue.py
    python examples/glue/run_glue.py --dataset ../shared/data/glue/cola --codec sort:bits=8 --first 1 --last 2
    python examples/glue/run_glue.py --dataset glue --task rte --model roberta-base --codec none
    torchrun --nproc_per_node 2 examples/glue/run_glue.py --use_cpu True
    python examples/glue/run_glue.py arguments.json
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from hf_actcompress.workloads import build_compute_metrics, tokenize_splits
from hf_actcompress.workloads.arguments import TextDataArguments
from hf_actcompress.workloads.arguments import TextModelArguments as ModelArguments
from hf_actcompress.workloads.run import leave_process_group, parse_arguments, train_and_report

DEFAULTS = {
    "output_dir": "outputs/glue",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "learning_rate": 5e-5,
}


@dataclass
class DataArguments(TextDataArguments):
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every batch to max_length (static shapes for torch_compile, ef+)."}
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, training_args, compression = parse_arguments(
        [ModelArguments, DataArguments, TrainingArguments], argv, DEFAULTS
    )
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="data"):
        data = data_args.load()
    model, tokenizer = model_args.load(data, data.texts())
    train, evaluation = tokenize_splits(data, tokenizer, data_args.max_length, pad=data_args.pad_to_max_length)
    return train_and_report(
        model=model,
        training_args=training_args,
        compression=compression,
        train=train,
        evaluation=evaluation,
        compute_metrics=build_compute_metrics(data.task, data.num_labels),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        about={"task": data.task, "data": data.source, "model": model_args.model},
    )


if __name__ == "__main__":
    main()
    leave_process_group()
