"""Data sets by name: an embedded one, a local folder or a hub id, with the meaning of their columns.

Images become tensors in `images.py`, sentences become tokens in `tokenize_splits`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_actcompress.workloads import embedded
from hf_actcompress.workloads.columns import encode_labels, find_image_column, find_label_column, find_text_columns
from hf_actcompress.workloads.hub import cached_only_when_offline

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
EVAL_SPLITS = ("validation", "validation_matched", "valid", "val", "dev", "test")
HELD_OUT = 0.1
# Data whose meaning a mirror image changes: a mirrored 2 is no digit.
_UNFLIPPABLE = ("digit", "mnist", "svhn", "letter", "char")


@dataclass(frozen=True)
class TaskData:
    """A data set with its meaning.

    Attributes:
        train, eval: the two splits.
        task: a short name such as "cola", "cifar10", "digits".
        label_column: the column with the answer.
        label_names: the classes; empty for a regression.
        text_columns: one or two string columns (text tasks).
        image_column: the image column (image tasks).
        flip: whether a mirrored image keeps its label.
        source: where the data came from and how it was split, in words.
    """

    train: datasets.Dataset
    eval: datasets.Dataset
    task: str
    label_column: str
    label_names: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    image_column: str | None = None
    flip: bool = False
    source: str = ""

    @property
    def is_regression(self) -> bool:
        return not self.label_names

    @property
    def num_labels(self) -> int:
        return len(self.label_names) or 1

    def texts(self) -> Iterator[str]:
        """Every training text, for a tokenizer that is made from them."""
        for column in self.text_columns:
            yield from self.train[column]


def load_text(
    name_or_path: str = EMBEDDED,
    task: str | None = None,
    *,
    max_train: int | None = None,
    max_eval: int | None = None,
    seed: int = 0,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> TaskData:
    """Loads a text classification (or regression) task.

    Args:
        name_or_path: "embedded" (the `docstrings` task), a local folder, or a hub id such as "nyu-mll/glue".
        task: the hub configuration, or a sub-folder of a local folder, such as "cola".
        max_train, max_eval: keep only so many rows, chosen by a shuffle with `seed`.
        text_columns, label_column: override what is detected.

    Raises:
        ValueError: if the data cannot be found or reached, or if its columns are not understood.
    """
    splits, name, source = _load(name_or_path, task, embedded.docstrings, "docstrings", seed)
    label = find_label_column(splits["train"], label_column)
    texts = find_text_columns(splits["train"], name, label, text_columns)
    train, evaluation, names = _prepare(splits, label, max_train, max_eval, seed)
    return TaskData(train, evaluation, name, label, names, text_columns=texts, source=source)


def load_images(
    name_or_path: str = EMBEDDED,
    task: str | None = None,
    *,
    max_train: int | None = None,
    max_eval: int | None = None,
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> TaskData:
    """Loads an image classification task.

    Args:
        name_or_path: "embedded" (the `digits` images), a local folder (parquet, or one folder of images a class),
            or a hub id such as "uoft-cs/cifar10".
        task: the hub configuration, or a sub-folder of a local folder.
        max_train, max_eval: keep only so many rows, chosen by a shuffle with `seed`.
        image_column, label_column: override what is detected.

    Raises:
        ValueError: if the data cannot be found or reached, or if its columns are not understood.
    """
    splits, name, source = _load(name_or_path, task, embedded.digits, "digits", seed)
    label = find_label_column(splits["train"], label_column)
    image = find_image_column(splits["train"], name, image_column)
    train, evaluation, names = _prepare(splits, label, max_train, max_eval, seed)
    if not names:
        raise ValueError(f"The label column {label!r} of {name!r} holds real numbers; load_images needs classes.")
    flip = not any(word in name.lower() for word in _UNFLIPPABLE)
    return TaskData(train, evaluation, name, label, names, image_column=image, flip=flip, source=source)


def _load(
    name: str, task: str | None, embedded_set: Any, embedded_task: str, seed: int
) -> tuple[dict[str, Any], str, str]:
    """The splits "train" and "eval", the task's name and the source in words."""
    splits, found, source = _find(name, task, embedded_set, embedded_task)
    splits, source = _two_splits(splits, source, seed)
    return splits, found, source


def _find(name: str, task: str | None, embedded_set: Any, embedded_task: str) -> tuple[Any, str, str]:
    """All splits, the task's name and the source in words."""
    import datasets

    if name == EMBEDDED:
        if task not in (None, embedded_task):
            raise ValueError(f"The embedded data set is {embedded_task!r}, got task={task!r}; leave the task out.")
        return embedded_set(), embedded_task, f"embedded {embedded_task}"
    folder = Path(name).expanduser()
    if folder.is_dir():
        if task is not None and (folder / task).is_dir():
            folder = folder / task
        elif task is not None and folder.resolve().name != task:
            raise ValueError(f"{folder.resolve()} has no folder {task!r} (task=); it holds {_children(folder)}.")
        return _load_folder(folder), task or folder.resolve().name, f"local folder {folder.resolve().name}"

    looked = f"{name!r} is not a local folder (looked for {folder.resolve()})"
    remedy = 'To run offline use "--dataset embedded" or name a local folder that exists.'
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise ValueError(f"{looked}, and such a path cannot be a hub id. {remedy}")
    with cached_only_when_offline() as state:
        try:
            splits = datasets.load_dataset(name, task)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"{looked}, and loading it as a hub id (configuration {task!r}) failed; "
                f"the hub is {_say(state)} ({reason}). {remedy}"
            ) from error
    return splits, task or name.rsplit("/", 1)[-1], f"hub {name}" + (f", {task}" if task else "")


def _say(state: str) -> str:
    return {
        "online": "reachable",
        "offline mode": "switched off by HF_HUB_OFFLINE",
        "no network": "out of reach: no network",
    }[state]


def _children(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())


def _load_folder(folder: Path) -> Any:
    import datasets

    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    tasks = sorted(child.name for child in folder.iterdir() if child.is_dir() and any(child.glob("train*.*")))
    if tasks and not any(folder.glob("*.parquet")):
        raise ValueError(f"The folder {folder.resolve()} holds several tasks, {tasks}: name one with task=.")
    try:
        return datasets.load_dataset(str(folder.resolve()))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"The folder {folder.resolve()} could not be read as a data set "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). It holds {_children(folder)}; allowed are "
            "parquet, csv or json files named by split, or one folder of images a class."
        ) from error


def _two_splits(splits: Any, source: str, seed: int) -> tuple[dict[str, Any], str]:
    """Train and eval, whatever the latter is called; a tenth of train is held out where there is no other."""
    import datasets

    if "train" not in splits:
        raise ValueError(f"The data set ({source}) has the splits {sorted(splits)}; a split named 'train' is needed.")
    for name in EVAL_SPLITS:
        if name in splits:
            return {"train": splits["train"], "eval": splits[name]}, f"{source} (train/{name})"
    train = splits["train"]
    classes = [column for column, kind in train.features.items() if isinstance(kind, datasets.ClassLabel)]
    parts = train.train_test_split(HELD_OUT, seed=seed, stratify_by_column=classes[0] if len(classes) == 1 else None)
    logger.warning("%s has no split named any of %s: a tenth of train is held out.", source, EVAL_SPLITS)
    return {"train": parts["train"], "eval": parts["test"]}, f"{source} (train, a tenth of it held out)"


def _prepare(
    splits: dict[str, Any], label: str, max_train: int | None, max_eval: int | None, seed: int
) -> tuple[Any, Any, tuple[str, ...]]:
    """(train, eval, classes) with the label column as classes, cut to so many rows."""
    splits, names = encode_labels(splits, label)
    kept = []
    for argument, limit, split in (("max_train", max_train, splits["train"]), ("max_eval", max_eval, splits["eval"])):
        if limit is not None and limit < 1:
            raise ValueError(f"{argument}={limit}: give 1 or more rows, or None for all {len(split)}.")
        if limit is not None and limit < len(split):
            split = split.shuffle(seed=seed).select(range(limit))
        kept.append(split)
    return kept[0], kept[1], names


def tokenize_splits(
    data: TaskData, tokenizer: Any, max_length: int = 128, *, pad: bool = False
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(train, eval) as token ids with a `labels` column, cut to `max_length` tokens.

    pad: pad every row to `max_length`, so that all batches have one shape; else the collator pads.
    """

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[column] for column in data.text_columns]
        return tokenizer(*texts, truncation=True, max_length=max_length, padding="max_length" if pad else False)

    def prepare(split: datasets.Dataset) -> datasets.Dataset:
        if data.label_column != "labels":
            split = split.rename_column(data.label_column, "labels")
        drop = [column for column in split.column_names if column != "labels"]
        return split.map(tokenize, batched=True, remove_columns=drop, desc="tokenizing")

    return prepare(data.train), prepare(data.eval)
