"""The scripts of benchmarks/ import one another by their bare names."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in (
        "tables", "reference", "accuracy", "predictor", "predictor_study", "predictor_pages", "harness", "gpu",
        "memory", "architectures", "saved_architectures",
    ):  # fmt: skip
        sys.modules.pop(name, None)
