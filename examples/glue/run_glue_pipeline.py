"""Fine-tune a text classifier on a GLUE task over a pipeline whose stages exchange compressed payloads.

With no arguments: a packaged MiniLM learns an embedded task on two processes, activations and gradients in 4 bits.

    torchrun --nproc_per_node 2 examples/glue/run_glue_pipeline.py
    torchrun --nproc_per_node 2 examples/glue/run_glue_pipeline.py --topology client-server --cuts 0 2 4 \\
        --dataset ../shared/data/glue/sst2 --codec delta+rotated:bits=2 --grad_codec block:bits=4,round=stochastic
    torchrun --nproc_per_node 2 examples/glue/run_glue_pipeline.py --save_steps 50 --resume

On two hosts, the same on each with `torchrun --nnodes 2 --nproc_per_node 1 --node_rank R --master_addr HOST`.  Only
rank 0 needs the data; with client-server, tokens and labels never leave it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import DataCollatorWithPadding, set_seed

from hf_actcompress.pipeline.launch import guarded, join
from hf_actcompress.workloads import build_compute_metrics, tokenize_splits
from hf_actcompress.workloads.arguments import TextDataArguments
from hf_actcompress.workloads.arguments import TextModelArguments as ModelArguments
from hf_actcompress.workloads.pipelined import (
    load_on_first_rank,
    parse_pipeline_arguments,
    train_pipeline_and_report,
)  # fmt: skip

DEFAULTS = {"output_dir": "outputs/glue_pipeline"}


@dataclass
class DataArguments(TextDataArguments):
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "Pad batches to a multiple of this; each new length costs a forward and backward pass once. "
            "Default: pad all to max_length, as the delta codec needs."
        },
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args = parse_pipeline_arguments([ModelArguments, DataArguments], argv, DEFAULTS)
    join(args.timeout, args.secret)
    set_seed(args.seed)
    data, task = load_on_first_rank(data_args)
    model, tokenizer = model_args.load(task, None if data is None else data.texts())
    train, evaluation = (None, None) if data is None else tokenize_splits(data, tokenizer, data_args.max_length)
    multiple = data_args.pad_to_multiple_of
    padding = "longest" if multiple else "max_length"
    collate = DataCollatorWithPadding(
        tokenizer, padding, max_length=data_args.max_length, pad_to_multiple_of=multiple
    )
    return train_pipeline_and_report(
        model=model,
        args=args,
        train=train,
        evaluation=evaluation,
        collate=collate,
        compute_metrics=build_compute_metrics(task.task, task.num_labels),
        processing_class=tokenizer,
        about={"task": task.task, "data": task.source, "model": model_args.model, "max_length": data_args.max_length},
    )


if __name__ == "__main__":
    guarded(main)
