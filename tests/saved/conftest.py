"""Fixtures for the tests of saved tensors."""

import pytest

from hf_actcompress.saved import kept


@pytest.fixture
def small_tensors(monkeypatch):
    """Compress tensors of 16 elements too: tiny models have no larger ones."""
    monkeypatch.setattr(kept, "SMALLEST", 16)
