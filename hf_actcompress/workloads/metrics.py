"""The metrics a task is judged by, as a `compute_metrics` for the Trainer.

GLUE tasks are measured by `evaluate` where it can load them and by scikit-learn otherwise: the same numbers under the
same names, and the log says once which it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from hf_actcompress.workloads.columns import GLUE_COLUMNS as GLUE_TASKS
from hf_actcompress.workloads.hub import cached_only_when_offline

logger = logging.getLogger(__name__)

MATTHEWS, F1, CORRELATION = ("cola",), ("mrpc", "qqp"), ("stsb",)
TOP_K = 5
_told: set[str] = set()


def build_compute_metrics(task: str, num_labels: int) -> Callable[[Any], dict[str, float]]:
    """A function from an `EvalPrediction` (logits [N, C] or [N, 1], labels [N]) to named metrics.

    | task | metrics |
    | --- | --- |
    | cola | matthews_correlation, accuracy |
    | mrpc, qqp | accuracy, f1 |
    | stsb, or `num_labels` 1 | pearson, spearmanr |
    | all others, images too | accuracy, and top5_accuracy where there are more than 5 classes |

    Rows with a NaN or an infinity among their logits are counted in the log: their argmax means nothing.

    Raises:
        ValueError: if `num_labels` is below 1, or does not suit the task.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels={num_labels}: give 2 or more classes, or 1 for a regression.")
    if (num_labels == 1) != (task in CORRELATION) and task in GLUE_TASKS:
        kind = "a regression (num_labels=1)" if task in CORRELATION else "a classification (num_labels of 2 or more)"
        raise ValueError(f"The task {task!r} is {kind}, got num_labels={num_labels}.")
    glue = _load_glue(task) if task in GLUE_TASKS else None

    def compute_metrics(prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
        labels = np.asarray(prediction.label_ids)
        bad = int((~np.isfinite(logits)).any(axis=-1).sum())
        if bad:
            logger.warning(
                "%d of %d predictions are not finite; the metrics of this evaluation mean little.", bad, len(labels)
            )
        if num_labels == 1:
            values = logits.reshape(-1)
            metrics = glue.compute(predictions=values, references=labels) if glue else _correlation(values, labels)
        else:
            classes = logits.argmax(axis=-1)
            metrics = glue.compute(predictions=classes, references=labels) if glue else _classes(task, classes, labels)
            metrics.setdefault("accuracy", float((classes == labels).mean()))
            if num_labels > TOP_K:
                metrics["top5_accuracy"] = _top_k(logits, labels)
        return {name: float(value) for name, value in metrics.items()}

    return compute_metrics


def _load_glue(task: str) -> Any:
    """`evaluate`'s metric, or None with one line in the log."""
    try:
        import evaluate

        with cached_only_when_offline() as state:
            # Without a cached copy evaluate would search the hub first.
            if state == "online":
                return evaluate.load("glue", task)
        reason = f"the hub is not there ({state})"
    except (ImportError, OSError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if "glue" not in _told:
        _told.add("glue")
        logger.warning("evaluate.load('glue') is not available, %s: scikit-learn computes the same metrics.", reason)
    return None


def _classes(task: str, classes: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score, matthews_corrcoef

    if task in MATTHEWS:
        return {"matthews_correlation": matthews_corrcoef(labels, classes)}
    if task in F1:
        return {"accuracy": float((classes == labels).mean()), "f1": f1_score(labels, classes)}
    return {}


def _correlation(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    return {"pearson": pearsonr(values, labels)[0], "spearmanr": spearmanr(values, labels)[0]}


def _top_k(logits: np.ndarray, labels: np.ndarray) -> float:
    best = np.argpartition(logits, -TOP_K, axis=-1)[:, -TOP_K:]
    return float((best == labels[:, None]).any(axis=-1).mean())
