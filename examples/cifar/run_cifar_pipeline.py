"""Fine-tune an image classifier over a pipeline whose stages exchange compressed payloads.

With no arguments: a packaged EfficientNet-Lite0 learns scikit-learn's handwritten digits on two processes.

    torchrun --nproc_per_node 2 examples/cifar/run_cifar_pipeline.py
    torchrun --nproc_per_node 2 examples/cifar/run_cifar_pipeline.py --dataset ../shared/data/cifar10 \\
        --model mobilenetv2_100 --topology client-server --codec block:bits=4 --grad_codec block:bits=8

On two hosts, the same on each with `torchrun --nnodes 2 --nproc_per_node 1 --node_rank R --master_addr HOST`.  Only
rank 0 needs the data; with client-server, pictures and labels never leave it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import set_seed

from hf_actcompress.pipeline.launch import guarded, join, share
from hf_actcompress.workloads import (
    build_compute_metrics,
    collate_images,
    load_image_model,
    load_images,
    prepare_images,
)  # fmt: skip
from hf_actcompress.workloads.arguments import ImageDataArguments as DataArguments
from hf_actcompress.workloads.arguments import ImageModelArguments as ModelArguments
from hf_actcompress.workloads.pipelined import parse_pipeline_arguments, train_pipeline_and_report

DEFAULTS = {"output_dir": "outputs/cifar_pipeline", "batch_size": 64, "eval_batch_size": 128, "learning_rate": 1e-3}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, args = parse_pipeline_arguments([ModelArguments, DataArguments], argv, DEFAULTS)
    rank, _ = join(args.timeout)
    set_seed(args.seed)
    data = facts = train = evaluation = None
    if rank == 0:
        data = load_images(
            data_args.dataset,
            max_train=data_args.max_train_samples,
            max_eval=data_args.max_eval_samples,
            seed=data_args.data_seed_for_subset,
        )
        facts = {"task": data.task, "data": data.source, "labels": data.num_labels, "names": data.label_names}
    facts = share(facts)
    model, preprocessing = load_image_model(
        model_args.model,
        facts["labels"],
        model_args.image_size,
        pretrained=model_args.pretrained,
        label_names=facts["names"],
    )
    if model_args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if data is not None:
        train, evaluation = prepare_images(data, preprocessing)
    return train_pipeline_and_report(
        model=model,
        args=args,
        train=train,
        evaluation=evaluation,
        collate=collate_images,
        compute_metrics=build_compute_metrics(facts["task"], facts["labels"]),
        about={
            "task": facts["task"],
            "data": facts["data"],
            "model": model_args.model,
            "image_size": preprocessing.size,
        },
    )


if __name__ == "__main__":
    guarded(main)
