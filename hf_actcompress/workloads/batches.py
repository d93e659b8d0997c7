"""Training batches for a model, both by name, and evaluation batches: for `hf-actcompress analyze` and `card`.

transformers, timm and datasets are imported inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from .by_name import takes_images
from .data import TaskData, load_images, load_text, tokenize_splits
from .images import collate_images, prepare_images
from .metrics import build_compute_metrics
from .models import load_image_model, load_text_model, packaged_minilm, stored_preprocessing

# Task names: (folder under `root`, hub id, configuration on the hub).
TASKS: dict[str, tuple[str, str, str | None]] = {
    "cola": ("glue/cola", "nyu-mll/glue", "cola"), "sst2": ("glue/sst2", "nyu-mll/glue", "sst2"),
    "rte": ("glue/rte", "nyu-mll/glue", "rte"), "cifar10": ("cifar10", "uoft-cs/cifar10", None),
    "mnist": ("mnist", "ylecun/mnist", None),
}  # fmt: skip


def training_batches(
    model: str, data: str, *, root: Path, batches: int, batch_size: int, image_size: int = 96, max_length: int = 128,
    seed: int = 0,
) -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Any]]:  # fmt: skip
    """The model with the task's classes in training mode, `batches` training batches, and what both are in words.

    data: "embedded", one of TASKS (looked for under `root`, then on the hub), a local folder, or a hub id.
    Raises ValueError for a model or data that cannot be found, or that do not belong together.
    """
    from transformers import DataCollatorWithPadding, set_seed

    set_seed(seed)
    name, task = _find(data, root)
    images, needed = takes_images(model), batches * batch_size
    found = (load_images if images else load_text)(name, task, max_train=needed, max_eval=1, seed=seed)
    if images:
        built, wants = load_image_model(model, found.num_labels, image_size, label_names=found.label_names)
        rows, collate = prepare_images(found, wants)[0], collate_images
    else:
        built, tokenizer = load_text_model(model, found.num_labels, label_names=found.label_names,
                                           texts=found.texts())  # fmt: skip
        rows, collate = tokenize_splits(found, tokenizer, max_length)[0], DataCollatorWithPadding(tokenizer)
    if len(rows) < needed:
        raise ValueError(
            f"{data!r} has {len(rows)} training rows, and {batches} batches of {batch_size} need {needed}. Ask for "
            "fewer or smaller ones."
        )
    made = [collate([rows[k] for k in range(i * batch_size, (i + 1) * batch_size)]) for i in range(batches)]
    about = {
        "model": model, "class": type(built).__name__, "parameters": sum(p.numel() for p in built.parameters()),
        "data": found.source, "batches": batches, "batch_size": batch_size, "seed": seed,
    }  # fmt: skip
    return built.train(), made, about


def evaluation_batches(
    data: TaskData, batch_size: int, *, folders: Sequence[Path] = (), config: Any = None,
    image_size: int | None = None, max_length: int = 128,
) -> tuple[list[dict[str, Tensor]], Callable[[Any, Any], dict[str, float]] | None]:  # fmt: skip
    """The evaluation split in batches, and the metrics of (logits, labels) for texts, None for images.

    folders: of the models that are evaluated; texts take the first tokenizer among them, else MiniLM's.
    config: of an image classifier, which says what it expects of its images; None for texts.
    """
    if config is not None:
        wants = stored_preprocessing(config, str(folders[0]) if folders else "")
        if image_size is not None:
            wants = replace(wants, size=image_size)
        rows, collate, metrics = prepare_images(data, wants)[1], collate_images, None
    else:
        from transformers import AutoTokenizer, DataCollatorWithPadding

        found = next((folder for folder in folders if any(folder.glob("tokenizer*"))), None)
        tokenizer = AutoTokenizer.from_pretrained(found or packaged_minilm(), trust_remote_code=False)
        rows, collate = tokenize_splits(data, tokenizer, max_length)[1], DataCollatorWithPadding(tokenizer)
        compute = build_compute_metrics(data.task, data.num_labels)
        metrics = lambda logits, labels: compute(SimpleNamespace(predictions=logits, label_ids=labels))  # noqa: E731
    starts = range(0, len(rows), batch_size)
    return [dict(collate([rows[i] for i in range(at, min(at + batch_size, len(rows)))])) for at in starts], metrics


def _find(data: str, root: Path) -> tuple[str, str | None]:
    """(folder, hub id or "embedded"; configuration of a hub id)."""
    if data not in TASKS or Path(data).is_dir():
        return data, None
    folder, hub, task = TASKS[data]
    return (str(root / folder), None) if (root / folder).is_dir() else (hub, task)
