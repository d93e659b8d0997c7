"""Fixtures: the shared data sets (skipped where absent) and a hub that is never asked."""

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def shared():
    def folder(name: str) -> str:
        path = SHARED / name
        if not path.is_dir():
            pytest.skip(f"shared data set {name} is not on this machine")
        return str(path)

    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    """No test may depend on the network; caches go to a temporary folder."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


@pytest.fixture(scope="session")
def docstring_task():
    pytest.importorskip("sklearn")
    from hf_actcompress.workloads import docstrings

    return docstrings()
