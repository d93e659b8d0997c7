"""What example scripts, benchmarks and commands share: data, models, metrics and results.

It works without a network, too (`embedded`, "minilm", "tiny-bert", "efficientnet-lite0").  Optional libraries are
imported where they are used: importing this package loads none of them.  Only run.py, pipelined.py and by_name.py know
compression.
"""

from hf_actcompress.workloads.data import TaskData, load_images, load_text, tokenize_splits
from hf_actcompress.workloads.embedded import digits, docstrings
from hf_actcompress.workloads.images import (
    CachedImages,
    Preprocessing,
    collate_images,
    image_transforms,
    prepare_images,
    with_transform,
)  # fmt: skip
from hf_actcompress.workloads.metrics import build_compute_metrics
from hf_actcompress.workloads.models import load_image_model, load_text_model
from hf_actcompress.workloads.results import environment, print_results, write_results

__all__ = [
    "CachedImages",
    "Preprocessing",
    "TaskData",
    "build_compute_metrics",
    "collate_images",
    "digits",
    "docstrings",
    "environment",
    "image_transforms",
    "load_image_model",
    "load_images",
    "load_text",
    "load_text_model",
    "prepare_images",
    "print_results",
    "tokenize_splits",
    "with_transform",
    "write_results",
]
