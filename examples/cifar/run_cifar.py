"""Fine-tune an image classifier with compressed layer boundaries.

With no arguments: a packaged EfficientNet-Lite0 learns scikit-learn's handwritten digits, compressed to 4 bits.

    python examples/cifar/run_cifar.py
    python examples/cifar/run_cifar.py --dataset ../shared/data/cifar10 --codec sort:bits=8
    python examples/cifar/run_cifar.py --dataset uoft-cs/cifar10 --model mobilenetv2_100 --pretrained True
    accelerate launch examples/cifar/run_cifar.py --image_size 64
"""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments, set_seed

from hf_actcompress.workloads import build_compute_metrics, collate_images, prepare_images
from hf_actcompress.workloads.arguments import ImageDataArguments as DataArguments
from hf_actcompress.workloads.arguments import ImageModelArguments as ModelArguments
from hf_actcompress.workloads.run import leave_process_group, parse_arguments, train_and_report

DEFAULTS = {
    "output_dir": "outputs/cifar",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "learning_rate": 1e-3,
    "remove_unused_columns": False,
}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    model_args, data_args, training_args, compression = parse_arguments(
        [ModelArguments, DataArguments, TrainingArguments], argv, DEFAULTS
    )
    set_seed(training_args.seed)
    with training_args.main_process_first(desc="data"):
        data = data_args.load()
    model, preprocessing = model_args.load(data)
    train, evaluation = prepare_images(data, preprocessing)
    return train_and_report(
        model=model,
        training_args=training_args,
        compression=compression,
        train=train,
        evaluation=evaluation,
        compute_metrics=build_compute_metrics(data.task, data.num_labels),
        data_collator=collate_images,
        about={"task": data.task, "data": data.source, "model": model_args.model, "image_size": preprocessing.size},
    )


if __name__ == "__main__":
    main()
    leave_process_group()
