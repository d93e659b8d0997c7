"""A run that resumes from a checkpoint goes on as if it had not been interrupted; schedules of codecs."""

import logging

import pytest
from helpers import build, hooks_on
from helpers.trainers import (
    COARSE,
    FIRST,
    STEPS,
    Stream,
    Stumble,
    Watch,
    callback,
    calls,
    make_trainer,
    same,
    trained,
    weights,
)

from hf_actcompress import ActCompressConfig

REMEMBERING = ("block:bits=3,round=stochastic", "kmeans:bits=2", "lowrank:rank=2", "ef+topk:ratio=0.2")
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 3}


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("codec", REMEMBERING)
def test_a_resumed_run_is_the_unbroken_run(tmp_path, codec, restore):
    compression = callback(codec, first=2)
    whole = trained(tmp_path, compression, **CHECKPOINTS)
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"actcompress_config.json", "actcompress_state_rank0.safetensors", "model.safetensors"} <= names
    assert ActCompressConfig.from_pretrained(tmp_path / "checkpoint-3") == compression.config
    again = callback(codec, first=2)
    resumed = trained(
        tmp_path, again, resume=str(tmp_path / "checkpoint-3"), restore_callback_states_from_checkpoint=restore,
        **CHECKPOINTS,
    )  # fmt: skip
    assert same(weights(whole), weights(resumed))
    assert losses(whole) == losses(resumed)
    keys = ("boundary", "direction", "calls", "raw_bytes", "payload_bytes", "rel_error")
    for one, other in zip(again.stats, compression.stats, strict=True):
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}


def losses(trainer):
    """Every number of the log that is no time."""
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
        for entry in trainer.state.log_history if "loss" in entry
    ]  # fmt: skip


@pytest.mark.parametrize("codec", REMEMBERING)
def test_the_saved_state_is_what_makes_it_so(tmp_path, codec):
    whole = trained(tmp_path, callback(codec, first=2), **CHECKPOINTS)
    (tmp_path / "checkpoint-3" / "actcompress_state_rank0.safetensors").unlink()
    resumed = trained(tmp_path, callback(codec, first=2), resume=str(tmp_path / "checkpoint-3"), **CHECKPOINTS)
    assert not same(weights(whole), weights(resumed))


def test_resuming_the_latest_checkpoint_and_from_another_folder(tmp_path):
    whole = trained(tmp_path / "a", callback("kmeans:bits=2"), **CHECKPOINTS)
    latest = trained(tmp_path / "a", callback("kmeans:bits=2"), resume=True, **CHECKPOINTS)
    elsewhere = trained(
        tmp_path / "b", callback("kmeans:bits=2"), resume=tmp_path / "a" / "checkpoint-3", **CHECKPOINTS
    )
    assert same(weights(whole), weights(latest))
    assert same(weights(whole), weights(elsewhere))


def test_a_run_that_crashed_goes_on_as_if_it_had_not(tmp_path):
    whole = trained(tmp_path / "a", callback("ef+kmeans:bits=2"), **CHECKPOINTS)
    compression = callback("ef+kmeans:bits=2")
    trainer = make_trainer(tmp_path / "b", compression, Stumble(5), **CHECKPOINTS)
    with pytest.raises(RuntimeError, match="cable"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(trainer))


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_a_checkpoint_made_without_the_callback(tmp_path, caplog, restore):
    trained(tmp_path, **CHECKPOINTS)
    compression = callback("kmeans:bits=2")
    with caplog.at_level(logging.WARNING, "hf_actcompress"):
        trained(
            tmp_path, compression, resume=str(tmp_path / "checkpoint-3"),
            restore_callback_states_from_checkpoint=restore, **CHECKPOINTS,
        )  # fmt: skip
    assert "fresh state" in caplog.text
    assert calls(compression)["forward"] == 2 * STEPS - 3
    assert (tmp_path / "checkpoint-6" / "actcompress_config.json").is_file()


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_a_checkpoint_with_compression_by_a_trainer_without(tmp_path, restore):
    trained(tmp_path, callback("kmeans:bits=2"), **CHECKPOINTS)
    trainer = trained(
        tmp_path, resume=str(tmp_path / "checkpoint-3"), restore_callback_states_from_checkpoint=restore, **CHECKPOINTS
    )
    assert trainer.state.global_step == 2 * STEPS
    assert not hooks_on(trainer.model)


def test_resuming_with_another_codec_warns_and_starts_afresh(tmp_path, caplog):
    trained(tmp_path, callback("kmeans:bits=2"), **CHECKPOINTS)
    compression = callback("kmeans:bits=3")
    with caplog.at_level(logging.WARNING, "hf_actcompress"):
        trained(tmp_path, compression, resume=str(tmp_path / "checkpoint-3"), **CHECKPOINTS)
    text = f"was written with other codecs: these codecs start with fresh state: {FIRST}/forward, {FIRST}/backward"
    assert caplog.text.count(text) == 1
    assert {row["codec"] for row in compression.stats} == {"kmeans:bits=3"}


def test_a_state_file_cut_short_by_a_crash_is_named_and_left_out(tmp_path, caplog):
    trained(tmp_path, callback("kmeans:bits=2"), **CHECKPOINTS)
    path = tmp_path / "checkpoint-3" / "actcompress_state_rank0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "hf_actcompress"):
        trained(tmp_path, callback("kmeans:bits=2"), resume=str(tmp_path / "checkpoint-3"), **CHECKPOINTS)
    assert "actcompress_state_rank0.safetensors is not a file of states" in caplog.text
    assert f"start with fresh state: {FIRST}/forward" in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))


def test_states_are_in_the_checkpoint_before_an_older_one_may_go(tmp_path, monkeypatch):
    """The Trainer deletes older checkpoints within _save_checkpoint, before on_save."""
    kept = []

    def rotate(*args, **kwargs):
        newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        kept.append((newest.name, sorted(path.name for path in newest.glob("actcompress*"))))

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    trained(tmp_path, callback("ef+block:bits=4"), save_strategy="steps", save_steps=2, max_steps=4)
    files = ["actcompress_config.json", "actcompress_state_rank0.safetensors"]
    assert kept == [("checkpoint-2", files), ("checkpoint-4", files)]


def test_a_hyperparameter_search_keeps_states_in_the_trials_folder(tmp_path):
    pytest.importorskip("optuna")
    trainer = make_trainer(
        tmp_path, callback("ef+topk:ratio=0.2"), model_init=lambda trial=None: build("bert"), max_steps=2,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}, n_trials=2,
        direction="minimize", backend="optuna", compute_objective=lambda metrics: metrics.get("eval_loss", 0.0),
    )  # fmt: skip
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("actcompress_state*"))
    assert found == [f"run-{n}/checkpoint-2/actcompress_state_rank0.safetensors" for n in (0, 1)]


def test_a_scheduled_codec_that_does_not_fit_is_found_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, callback(schedule={2: "lowrank:rank=500"}), num_train_epochs=4)
    with pytest.raises(ValueError, match=r"^schedule\[2\]: .*rank=500"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not hooks_on(trainer.model)


def test_a_checkpoint_without_states_is_no_loss_for_codecs_without_any(tmp_path, caplog):
    trained(tmp_path, callback("block:bits=4"), **CHECKPOINTS)
    (tmp_path / "checkpoint-3" / "actcompress_state_rank0.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "hf_actcompress"):
        trained(tmp_path, callback("block:bits=4"), resume=str(tmp_path / "checkpoint-3"), **CHECKPOINTS)
    assert "fresh state" not in caplog.text


# Schedule


def test_the_schedule_switches_at_the_epoch_and_after_resumption(tmp_path):
    config = {"schedule": {0: "kmeans:bits=3", 1: "kmeans:bits=2"}}
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    compression = callback(**config)
    whole = trained(tmp_path, compression, watch := Watch(compression), **options)
    assert watch.codecs == ["kmeans:bits=3"] * STEPS + ["kmeans:bits=2"] * STEPS
    for step in (2, STEPS, STEPS + 2):
        compression = callback(**config)
        resumed = trained(
            tmp_path, compression, again := Watch(compression), resume=str(tmp_path / f"checkpoint-{step}"), **options
        )
        assert again.codecs == watch.codecs[step:]
        assert same(weights(whole), weights(resumed))


def test_the_schedule_counts_epochs_of_data_without_a_length(tmp_path):
    compression = callback(schedule={1: "uniform:bits=2", 2: "uniform:bits=3"})
    trained(tmp_path, compression, watch := Watch(compression), data=Stream(), max_steps=10, num_train_epochs=5)
    assert watch.codecs == [COARSE] * STEPS + ["uniform:bits=2"] * STEPS + ["uniform:bits=3"] * 2


def test_attached_uses_the_codec_that_training_ended_with(tmp_path):
    compression = callback("uniform:bits=8", schedule={1: "kmeans:bits=2", 40: "uniform:bits=1"})
    trainer = trained(tmp_path, compression)
    with compression.attached(trainer.model) as handle:
        assert {row["codec"] for row in handle.stats()} == {"kmeans:bits=2"}
        assert handle.state_dict()[f"{FIRST}/forward"]["state"]["centroids"] is not None
