"""The Trainer with compressed saved tensors: logged, within the budget, resumed."""

import json

import pytest
import torch
from helpers import hooks_on
from helpers.trainers import (
    STEPS,
    make_trainer,
    same,
    weights,
)

from hf_actcompress import ActCompressCallback, ActCompressConfig


def test_saved_tensors_are_coded_and_logged(tmp_path, monkeypatch):
    from hf_actcompress.saved import kept

    monkeypatch.setattr(kept, "SMALLEST", 16)
    callback = ActCompressCallback(ActCompressConfig(first=0, last=0, saved="block:bits=4"))
    trainer = make_trainer(tmp_path, callback)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["compress/saved/ratio"] > 4 for line in lines)
    ratio = lines[0]["compress/saved/plain_mb"] / lines[0]["compress/saved/held_mb"]
    assert ratio == pytest.approx(lines[0]["compress/saved/ratio"], rel=0.05)
    row, = callback.stats
    assert row["direction"] == "saved" and row["calls"] == 2 * STEPS and row["bytes_saved"] > 0
    assert not hooks_on(trainer.model)


def test_saved_with_identity_is_training_without(tmp_path):
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    trainer = make_trainer(tmp_path, ActCompressCallback(ActCompressConfig(first=0, last=0, saved="identity")))
    trainer.train()
    assert same(weights(plain), weights(trainer))


def test_bits_of_a_budget_are_logged_and_saved(tmp_path, monkeypatch, caplog):
    from hf_actcompress.saved import kept

    monkeypatch.setattr(kept, "SMALLEST", 16)
    callback = ActCompressCallback(ActCompressConfig(first=0, last=0, saved="auto:budget=0.2"))
    trainer = make_trainer(tmp_path, callback, save_strategy="steps", save_steps=3)
    with caplog.at_level("INFO", logger="hf_actcompress.saved.budget"):
        trainer.train()
    assert "auto:budget=0.2 allots" in caplog.text
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert all(line["compress/saved/held_mb"] <= 0.21 * line["compress/saved/plain_mb"] for line in lines)
    table = json.loads((tmp_path / "checkpoint-3" / "actcompress_allotment.json").read_text())
    mean = sum(row["bits"] * row["numel"] for row in table) / sum(row["numel"] for row in table)
    assert mean == pytest.approx(lines[0]["compress/saved/mean_bits"], abs=1e-3)


@pytest.mark.parametrize("codec", ["block:bits=2", "auto:budget=0.2"])
@pytest.mark.parametrize("restore", [False, True])
def test_saved_tensors_resume_as_if_unbroken(tmp_path, monkeypatch, restore, codec):
    from hf_actcompress.saved import kept

    monkeypatch.setattr(kept, "SMALLEST", 16)

    def callback():
        return ActCompressCallback(ActCompressConfig(first=0, last=0, saved=codec))

    options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restore}
    whole = make_trainer(tmp_path, callback(), **options)
    whole.train()
    resumed = make_trainer(tmp_path, callback(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed))


def test_saved_works_under_torch_compile(tmp_path):
    """The callback gets the model without the compiled wrapper that calls it."""
    torch._dynamo.reset()
    callback = ActCompressCallback(ActCompressConfig(saved="block:bits=4"))
    trainer = make_trainer(tmp_path, callback, torch_compile=True, torch_compile_backend="aot_eager", max_steps=2)
    trainer.train()
    (row,) = callback.stats
    assert row["calls"] == 2
    assert any("compress/saved/held_mb" in log for log in trainer.state.log_history)
