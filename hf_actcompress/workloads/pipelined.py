"""What pipeline scripts do around their data and model: arguments, training, the merged model, results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_actcompress.pipeline.arguments import PipelineArguments
from hf_actcompress.workloads.data import TaskData
from hf_actcompress.workloads.results import print_results, write_results


def parse_pipeline_arguments(
    types: Sequence[type], argv: Sequence[str] | None, defaults: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The dataclasses of `types` and PipelineArguments from the command line.

    Raises ValueError for a wrong codec or option, before data and model are loaded.
    """
    from transformers import HfArgumentParser

    from hf_actcompress.codecs import parse_codec

    parser = HfArgumentParser([*types, PipelineArguments])
    parser.set_defaults(**defaults)
    parsed = parser.parse_args_into_dataclasses(list(sys.argv[1:] if argv is None else argv))
    for option in ("codec", "grad_codec"):
        spec = getattr(parsed[-1], option)
        try:
            if spec not in (None, "none"):
                parse_codec(spec)
        except ValueError as error:
            raise ValueError(f"--{option}: {error}") from None
    return parsed


def load_on_first_rank(data_args: Any) -> tuple[TaskData | None, Any]:
    """(data on rank 0 and None elsewhere, on every rank what a model has to know of it).

    The second has the fields task, source, num_labels and label_names of TaskData.
    """
    import torch.distributed as dist

    from hf_actcompress.pipeline.launch import share

    data = data_args.load() if dist.get_rank() == 0 else None
    names = ("task", "source", "num_labels", "label_names")
    return data, SimpleNamespace(**share(None if data is None else {name: getattr(data, name) for name in names}))


def train_pipeline_and_report(
    *,
    model: Any,
    args: PipelineArguments,
    train: Any,
    evaluation: Any,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    compute_metrics: Callable[[Any], dict[str, float]],
    about: Mapping[str, Any],
    processing_class: Any = None,
) -> dict[str, Any]:
    """Train, evaluate, bring the model together on rank 0 and save it there as `from_pretrained` loads it.

    The data is rank 0's; the others give None.  Returns the record, on every rank; rank 0 writes and prints it.
    """
    from hf_actcompress.pipeline.training import PipelineTrainer

    trainer = PipelineTrainer(
        model, args, train=train, evaluation=evaluation, collate=collate, compute_metrics=compute_metrics
    )
    history = trainer.train()
    metrics = trainer.evaluate()
    names = ("total", "compute", "encode", "decode", "wait", "forward", "backward", "side")
    sums = [
        {name: sum(entry["ranks"][rank][name] for entry in history) for name in names} for rank in range(trainer.size)
    ]
    seconds = max(one["total"] for one in sums) or 1.0
    samples = trainer.step * args.batch_size
    record = {
        **about, "codec": args.codec, "grad_codec": args.grad_codec, "topology": args.topology,
        "schedule": args.schedule, "micro_batches": args.micro_batches, "batch_size": args.batch_size,
        "cuts": trainer.cuts, "epochs": args.num_train_epochs,
        "learning_rate": args.learning_rate, "seed": args.seed, "dtype": "bf16 autocast" if args.bf16 else "fp32",
        "steps": trainer.step, "metrics": metrics, "samples_per_second": {"training": samples / seconds},
        "ranks": sums, "history": history,
    }  # fmt: skip
    if trainer.merge():
        folder = Path(args.output_dir)
        model.save_pretrained(folder)
        if processing_class is not None:
            processing_class.save_pretrained(folder)
        path = write_results(folder, record)
        print_results({key: value for key, value in record.items() if key not in ("history", "ranks", "cuts")})
        print_ranks(sums)
        print(f"Results: {path}")
    return record


def print_ranks(sums: Sequence[Mapping[str, float]]) -> None:
    """Where each rank's time went, and what it sent."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Seconds, and MB sent")
    for name in ("rank", "total", "compute", "codec", "waiting for the link", "activations", "gradients"):
        table.add_column(name, justify="right")
    for rank, one in enumerate(sums):
        times = (one["total"], one["compute"], one["encode"] + one["decode"], one["wait"])
        sizes = (one["forward"] / 1e6, one["backward"] / 1e6)
        table.add_row(str(rank), *(f"{value:.1f}" for value in (*times, *sizes)))
    Console().print(table)
