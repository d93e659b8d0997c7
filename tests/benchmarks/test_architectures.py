"""benchmarks/architectures.py builds small models that train, and the measurement tells exact from inexact."""

import pytest
import torch
from torch import nn


@pytest.mark.parametrize("name", ["bert", "llama", "clip"])
def test_small_models_of_transformers(name):
    pytest.importorskip("transformers")
    from architectures import of_transformers, sharpen
    from saved_architectures import try_step

    model, batch = of_transformers(name, 2, try_step)
    assert model.training and sum(p.numel() for p in model.parameters()) < 1e6
    assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
    before = {key: p.clone() for key, p in model.named_parameters()}
    found = sharpen(model)
    assert found and all("q" in key for key in found)
    assert {key for key, p in model.named_parameters() if not torch.equal(p, before[key])} == set(found)


def test_errors_and_kept_bytes():
    pytest.importorskip("transformers")
    from architectures import of_transformers
    from saved_architectures import Step, compared, try_step

    found = compared(Step(*of_transformers("llama", 8, try_step)), (8, 2))
    assert found["identity"] and 0 < found["8"]["error"] < 0.02 < found["2"]["error"] < 2
    assert found["2"]["held_bytes"] < found["8"]["held_bytes"] < found["8"]["raw_bytes"] / 3
    assert "LogSoftmax" in found["exactly"]
