"""Metrics against values worked out by hand, without evaluate and with a stand-in for it."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest

from hf_actcompress.workloads import build_compute_metrics, metrics

pytest.importorskip("sklearn")

# Predicted 1 1 1 0 0 0, true 1 1 0 0 0 1: tp=2, fp=1, tn=2, fn=1.
LOGITS = np.array([[0, 1], [0, 2], [0, 3], [1, 0], [2, 0], [3, 0]], dtype=np.float32)
LABELS = np.array([1, 1, 0, 0, 0, 1])
MATTHEWS = (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3)
F1 = 2 * 2 / (2 * 2 + 1 + 1)


def run(task, logits, labels, num_labels):
    return build_compute_metrics(task, num_labels)(SimpleNamespace(predictions=logits, label_ids=labels))


@pytest.mark.parametrize(
    "task, expected",
    [
        ("cola", {"matthews_correlation": MATTHEWS, "accuracy": 4 / 6}),
        ("mrpc", {"accuracy": 4 / 6, "f1": F1}),
        ("rte", {"accuracy": 4 / 6}),
        ("sst2", {"accuracy": 4 / 6}),
        ("docstrings", {"accuracy": 4 / 6}),
    ],
)
def test_classification(task, expected):
    assert run(task, LOGITS, LABELS, 2) == pytest.approx(expected)
    assert run(task, (LOGITS, "hidden states"), LABELS, 2) == pytest.approx(expected)


def test_regression():
    # Ranks: 1 2 4 3 against 1 2 3 4, so rho = 1 - 6*(1+1)/(4*15).
    values, labels = np.array([[1.0], [2.0], [4.0], [3.0]]), np.array([1.0, 2.0, 3.0, 4.0])
    expected = {"pearson": 0.8, "spearmanr": 1 - 12 / 60}
    assert run("stsb", values, labels, 1) == pytest.approx(expected)


def test_top_5():
    logits = np.tile(np.arange(10.0), (4, 1))
    result = run("cifar10", logits, np.array([9, 5, 4, 0]), 10)
    assert result == {"accuracy": 0.25, "top5_accuracy": 0.5}
    assert "top5_accuracy" not in run("three", logits[:, :3], np.array([2, 2, 1, 0]), 3)


def test_values_that_are_not_finite_are_reported(caplog):
    logits = LOGITS.copy()
    logits[0, 0] = np.nan
    run("rte", logits, LABELS, 2)
    assert "1 of 6 predictions are not finite" in caplog.text


def test_the_fallback_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(metrics, "_told", set())
    with caplog.at_level(logging.WARNING):
        build_compute_metrics("cola", 2)
        build_compute_metrics("rte", 2)
    assert caplog.text.count("scikit-learn computes the same metrics") == 1


def test_evaluate_is_used_where_it_works(monkeypatch):
    glue = SimpleNamespace(compute=lambda predictions, references: {"matthews_correlation": 0.123})
    monkeypatch.setattr(metrics, "_load_glue", lambda task: glue)
    assert run("cola", LOGITS, LABELS, 2) == pytest.approx({"matthews_correlation": 0.123, "accuracy": 4 / 6})


@pytest.mark.parametrize("task, labels", [("stsb", 2), ("cola", 1), ("things", 0)])
def test_the_number_of_labels_must_suit(task, labels):
    with pytest.raises(ValueError, match=f"num_labels={labels}"):
        build_compute_metrics(task, labels)
