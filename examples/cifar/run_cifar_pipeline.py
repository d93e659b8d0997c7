"""Fine-tune an image classifier over a pipeline whose stages exchange compressed payloads.

With no arguments: a packaged EfficientNet-Lite0 learns scikit-learn's handwritten digits on two processes.

    torchrun --nproc_per_node 2 examples/cifar/run_cifar_pipeline.py
    torchrun --nproc_per_node 2 examples/cifar/run_cifar_pipeline.py --dataset ../shared/data/cifar10 \\
        --model mobilenetv2_100 --topology client-server --codec block:bits=4 --grad_codec block:bits=8

On two hosts, the same on each with `torchrun --nnodes 2 --nproc_per_node 1 --node_rank R --master_addr HOST`.  Only
rank 0 needs the data; with client-server, images and labels never leave it.
"""

from __future__ import annotations

from typing import Any

from transformers import set_seed

from hf_actcompress.pipeline.launch import guarded, join
from hf_actcompress.workloads import build_compute_metrics, collate_images, prepare_images
from hf_actcompress.workloads.arguments import ImageDataArguments as DataArguments
from hf_actcompress.workloads.arguments import ImageModelArguments as ModelArguments
from hf_actcompress.workloads.pipelined import (
    load_on_first_rank,
    parse_pipeline_arguments,
    train_pipeline_and_report,
)  # fmt: skip

DEFAULTS = {"output_dir": "outputs/cifar_pipeline", "batch_size": 64, "eval_batch_size": 128, "learning_rate": 1e-3}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args = parse_pipeline_arguments([ModelArguments, DataArguments], argv, DEFAULTS)
    join(args.timeout, args.secret)
    set_seed(args.seed)
    data, task = load_on_first_rank(data_args)
    model, preprocessing = model_args.load(task)
    train, evaluation = (None, None) if data is None else prepare_images(data, preprocessing)
    return train_pipeline_and_report(
        model=model,
        args=args,
        train=train,
        evaluation=evaluation,
        collate=collate_images,
        compute_metrics=build_compute_metrics(task.task, task.num_labels),
        about={"task": task.task, "data": task.source, "model": model_args.model, "image_size": preprocessing.size},
    )


if __name__ == "__main__":
    guarded(main)
