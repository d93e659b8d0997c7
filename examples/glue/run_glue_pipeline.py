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

from hf_actcompress.pipeline.launch import guarded, join, share
from hf_actcompress.workloads import build_compute_metrics, load_text, load_text_model, tokenize_splits
from hf_actcompress.workloads.pipelined import parse_pipeline_arguments, train_pipeline_and_report

DEFAULTS = {"output_dir": "outputs/glue_pipeline"}


@dataclass
class ModelArguments:
    model: str = field(
        default="minilm", metadata={"help": "'minilm' (packaged weights), a local folder, or a hub id; on every rank."}
    )


@dataclass
class DataArguments:
    dataset: str = field(
        default="embedded",
        metadata={"help": "'embedded' (docstrings), a local folder such as data/glue/rte, or a hub id such as glue."},
    )
    task: str | None = field(default=None, metadata={"help": "Configuration of a hub data set: cola, rte, sst2, ..."})
    max_length: int = field(default=128, metadata={"help": "Tokens per example; longer ones are cut."})
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "Pad batches to a multiple of this; each new length costs a forward and backward pass once. "
            "Default: pad all to max_length, as the delta codec needs."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many rows only."})
    data_seed_for_subset: int = field(default=0, metadata={"help": "Which rows max_train_samples takes."})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args = parse_pipeline_arguments([ModelArguments, DataArguments], argv, DEFAULTS)
    rank, _ = join(args.timeout)
    set_seed(args.seed)
    data = facts = train = evaluation = None
    if rank == 0:
        data = load_text(
            data_args.dataset,
            data_args.task,
            max_train=data_args.max_train_samples,
            max_eval=data_args.max_eval_samples,
            seed=data_args.data_seed_for_subset,
        )
        facts = {"task": data.task, "data": data.source, "labels": data.num_labels, "names": data.label_names}
    facts = share(facts)
    model, tokenizer = load_text_model(
        model_args.model, facts["labels"], label_names=facts["names"], texts=None if data is None else data.texts()
    )
    if data is not None:
        train, evaluation = tokenize_splits(data, tokenizer, data_args.max_length)
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
        compute_metrics=build_compute_metrics(facts["task"], facts["labels"]),
        processing_class=tokenizer,
        about={
            "task": facts["task"],
            "data": facts["data"],
            "model": model_args.model,
            "max_length": data_args.max_length,
        },
    )


if __name__ == "__main__":
    guarded(main)
