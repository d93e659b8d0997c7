"""What a data set's columns mean: which one holds the label, which the texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LABEL_COLUMNS = ("label", "labels", "fine_label", "target")
# The text columns of the GLUE tasks, as in transformers' run_glue.py.
GLUE_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}


def check_known(dataset: Any, columns: Sequence[str], argument: str) -> None:
    unknown = [column for column in columns if column not in dataset.column_names]
    if unknown:
        raise ValueError(f"{argument} names unknown columns {unknown}; the data set has {dataset.column_names}.")


def find_label_column(dataset: Any, wanted: str | None) -> str:
    import datasets

    if wanted is not None:
        check_known(dataset, [wanted], "label_column")
        return wanted
    for name in LABEL_COLUMNS:
        if name in dataset.column_names:
            return name
    classes = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    raise ValueError(
        f"No label column among {dataset.column_names}: one of {list(LABEL_COLUMNS)} or a single ClassLabel column "
        "is needed; name yours with label_column=."
    )


def find_text_columns(dataset: Any, task: str, label: str, wanted: Sequence[str] | None) -> tuple[str, ...]:
    if wanted is not None:
        if not 1 <= len(wanted) <= 2:
            raise ValueError(f"text_columns={list(wanted)}: a tokenizer takes one text or a pair of texts.")
        check_known(dataset, wanted, "text_columns")
        return tuple(wanted)
    known = [columns for columns in (GLUE_COLUMNS.get(task), *GLUE_COLUMNS.values()) if columns]
    # Pairs before single columns: qnli's (question, sentence) must not be read as (sentence,).
    for columns in [*known[: task in GLUE_COLUMNS], *sorted(known, key=len, reverse=True)]:
        if all(column in dataset.column_names for column in columns):
            return columns
    strings = [
        name for name, kind in dataset.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")
    ]
    strings = [name for name in strings if name != label]
    if len(strings) in (1, 2):
        return tuple(strings)
    raise ValueError(
        f"{task!r} has {len(strings)} text columns ({strings}) among {dataset.column_names}; one or two are needed: "
        "name them with text_columns=, or use load_images for images."
    )


def find_image_column(dataset: Any, task: str, wanted: str | None) -> str:
    import datasets

    if wanted is not None:
        check_known(dataset, [wanted], "image_column")
        return wanted
    images = [column for column, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        raise ValueError(
            f"{task!r} has {len(images)} image columns among {dataset.column_names}; one is needed: "
            "name it with image_column=, or use load_text for a text task."
        )
    return images[0]


def encode_labels(splits: dict[str, Any], label: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Makes the label column a ClassLabel with the same classes in both splits; leaves a regression alone."""
    import datasets

    kind = splits["train"].features[label]
    if isinstance(kind, datasets.ClassLabel):
        return splits, tuple(kind.names)
    if getattr(kind, "dtype", "").startswith("float"):
        return splits, ()
    values = sorted(set(splits["train"][label]) | set(splits["eval"][label]))
    index = {value: position for position, value in enumerate(values)}
    names = [str(value) for value in values]
    encoded = {}
    for name, split in splits.items():
        column = [index[value] for value in split[label]]
        split = split.remove_columns(label).add_column(label, column)
        encoded[name] = split.cast_column(label, datasets.ClassLabel(names=names))
    return encoded, tuple(names)
