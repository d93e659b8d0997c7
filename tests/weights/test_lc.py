"""LCCallback in a Trainer on a tiny BERT: 4 steps an epoch."""

import json
import logging

import pytest
import torch
from helpers import build
from helpers.processes import ROOT, forked
from helpers.trainers import STEPS, accuracy, make_trainer, rows, same, weights
from transformers import TrainerCallback

from hf_actcompress import ActCompressCallback
from hf_actcompress.weights import LCCallback, LearningCompression, load_compressed
from hf_actcompress.weights.lc import STATE_NAME

SCHEME = {"layer.*.dense": "codebook:k=4 + prune:keep=1%", "query": "lowrank:rank=auto,alpha=1e-6"}


def callback(**options):
    return LCCallback(SCHEME, **{"mu": 0.05, "growth": 1.5, **options})


class Loop(TrainerCallback):
    """Notes at each event which weights the model holds."""

    def __init__(self, callback):
        self.callback, self.seen = callback, []

    def note(self, event, model):
        lc = self.callback.lc
        held = all(torch.equal(p.float(), lc.delta[n]) for n, p in lc.parameters.items())
        self.seen.append((event, "compressed" if held else "trained"))

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.note("evaluating", model)

    def on_save(self, args, state, control, model=None, **kwargs):
        self.note("saving", model)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.note("step", model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.note("end", model)


def losses(trainer):
    return [(e["step"], e["loss"], e["lc/penalty"]) for e in trainer.state.log_history if "loss" in e]


def test_evaluation_sees_the_compressed_weights_and_checkpoints_hold_the_trained(tmp_path):
    lc = callback()
    watch = Loop(lc)
    trainer = make_trainer(
        tmp_path, lc, watch, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    seen = dict.fromkeys(watch.seen)
    # At the very first step nothing has been trained yet, and still the weights are not the compressed ones.
    assert list(seen) == [("step", "trained"), ("evaluating", "compressed"), ("saving", "trained"),
                          ("end", "compressed")]  # fmt: skip
    held = weights(trainer)
    metrics = trainer.evaluate()
    assert same(held, weights(trainer)) and not trainer.model._forward_pre_hooks
    last = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert metrics["eval_loss"] == last[-2]["eval_loss"]  # evaluated after the last C step, before training's end
    lc.save(tmp_path / "small")
    trainer.model.load_state_dict({k: torch.zeros_like(v) for k, v in held.items()})
    load_compressed(tmp_path / "small", trainer.model)
    assert same(held, weights(trainer))


def test_c_steps_and_the_log(tmp_path):
    trainer = make_trainer(tmp_path, lc := callback())
    trainer.train()
    assert lc.lc.c_steps == 2
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert [round(e["lc/mu"], 6) for e in logs] == [0.05] * 3 + [0.075] * 4 + [0.1125]
    for entry in logs:
        assert entry["lc/loss"] == pytest.approx(entry["loss"] + entry["lc/penalty"])
        assert entry["lc/ratio"] > 1 and entry["lc/distance"] > 0
    assert make_trainer(tmp_path, lc := callback(every=3)).train() and lc.lc.c_steps == 3  # 3, 6 and the last, 8


@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {"bf16": True},
    {"max_grad_norm": 1e-3},
])  # fmt: skip
def test_the_penalty_is_added_once_and_whole(tmp_path, options):
    """What the optimizer gets is the data's gradient, averaged and clipped, and the penalty's."""

    class Grads(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    settings = {"max_steps": 1, **options}
    plain, grads = Grads(), Grads()
    reference = make_trainer(tmp_path, plain, **settings)
    reference.train()
    trainer = make_trainer(tmp_path, callback(mu=0.3), grads, **settings)
    start = weights(trainer)
    trainer.train()
    trainer.model.load_state_dict(start)
    direct = LearningCompression(trainer.model, SCHEME, mu=0.3)  # what training started from
    for name, delta in direct.delta.items():
        torch.testing.assert_close(grads.found[name], plain.found[name] + 0.3 * (start[name] - delta))
    assert torch.equal(grads.found["classifier.bias"], plain.found["classifier.bias"])


@pytest.mark.parametrize("every", ["epoch", 3])
def test_a_resumed_run_is_the_unbroken_run(tmp_path, every):
    # Evaluation draws random numbers: at an epoch's end it must come before the checkpoint here as there.
    strategy = "epoch" if every == "epoch" else "steps"
    options = {"save_strategy": strategy, "save_steps": 5, "eval_strategy": "epoch"}
    whole = make_trainer(tmp_path, callback(every=every), **options)
    whole.train()
    folder = tmp_path / ("checkpoint-4" if every == "epoch" else "checkpoint-5")
    assert (folder / STATE_NAME).is_file()
    again = make_trainer(tmp_path / "again", lc := callback(every=every), **options)
    again.train(resume_from_checkpoint=str(folder))
    assert losses(again) == losses(whole)
    assert same(weights(again), weights(whole))
    assert lc.lc.c_steps == (2 if every == "epoch" else 3)


def test_the_state_is_in_the_checkpoint_before_an_older_one_may_go(tmp_path, monkeypatch):
    """The Trainer deletes older checkpoints within _save_checkpoint, before on_save."""
    kept = []

    def rotate(*args, **kwargs):
        newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        kept.append((newest.name, (newest / STATE_NAME).is_file(), bool(list(newest.glob("actcompress_state*")))))

    monkeypatch.setattr("transformers.trainer.rotate_checkpoints", rotate)
    trainer = make_trainer(tmp_path, ActCompressCallback("ef+block:bits=4"), callback(), save_strategy="steps",
                           save_steps=2, max_steps=4)  # fmt: skip
    trainer.train()
    assert kept == [("checkpoint-2", True, True), ("checkpoint-4", True, True)]
    assert "_save_checkpoint" not in vars(trainer)


def test_a_hyperparameter_search_keeps_states_in_the_trials_folder(tmp_path):
    pytest.importorskip("optuna")
    trainer = make_trainer(
        tmp_path, callback(), model_init=lambda trial=None: build("bert"), max_steps=2, save_strategy="steps",
        save_steps=2,
    )  # fmt: skip
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}, n_trials=2,
        direction="minimize", backend="optuna", compute_objective=lambda metrics: metrics.get("eval_loss", 0.0),
    )  # fmt: skip
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(STATE_NAME))
    assert found == [f"run-{n}/checkpoint-2/{STATE_NAME}" for n in (0, 1)]


def test_resuming_without_its_state_warns_and_with_another_scheme_is_refused(tmp_path, caplog):
    make_trainer(tmp_path, callback(), save_strategy="steps", save_steps=4).train()
    folder = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="written with the scheme"):
        make_trainer(tmp_path, LCCallback("codebook:k=2")).train(resume_from_checkpoint=folder)
    (tmp_path / "checkpoint-4" / STATE_NAME).unlink()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, callback()).train(resume_from_checkpoint=folder)
    assert "starts afresh from its weights" in caplog.text


def test_the_best_checkpoint_is_chosen_and_restored_compressed(tmp_path):
    lc = callback()
    trainer = make_trainer(
        tmp_path, lc, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, num_train_epochs=3,
        metric_for_best_model="eval_loss", learning_rate=0.1,
    )  # fmt: skip
    trainer.train()
    best = min(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    assert trainer.state.best_model_checkpoint.endswith(f"-{STEPS * lc.lc.c_steps}")


def test_training_twice_leaves_no_second_hook(tmp_path):
    trainer = make_trainer(tmp_path, callback())
    trainer.train()
    trainer.train()
    assert not trainer.model._forward_pre_hooks


@pytest.mark.parametrize(("make", "options", "message"), [
    (lambda: callback(every=0), {}, "every=0"),
    (lambda: LCCallback({"fc": "nonsense"}), {}, "Unknown compression"),
    (lambda: LCCallback({"fc": "binary"}), {}, "matches no parameter"),
    (lambda: callback().save("x"), {}, "nothing to save yet"),
])  # fmt: skip
def test_bad_input(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make(), **options).train()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
def test_two_processes_hold_the_same_weights(tmp_path):
    forked(ROOT / "tests/helpers/lc_run.py", tmp_path, processes=2)
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert one["whole"] == one["resumed"]
    assert one["levels"] <= 4


def test_the_rows_are_enough_for_the_steps_named_above():
    assert len(rows()) == 4 * STEPS
