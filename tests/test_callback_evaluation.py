"""What the Trainer reports when it evaluates, during and after training."""

import pytest
from helpers import build, hooks_on
from helpers.trainers import (
    COARSE,
    Watch,
    accuracy,
    callback,
    make_trainer,
    rows,
    same,
    trained,
    weights,
    without_dropout,
)
from transformers import Trainer, TrainerCallback


def merged(trainer):
    """The evaluation metrics of each epoch."""
    epochs = {}
    for entry in trainer.state.log_history:
        if any(name.startswith("eval_") for name in entry):
            epochs.setdefault(entry["epoch"], {}).update(entry)
    return list(epochs.values())


@pytest.mark.parametrize("mode", ["on", "off", "both"])
def test_what_evaluation_reports(tmp_path, mode):
    results = {}
    for codec in ("identity", COARSE):
        trainer = trained(
            tmp_path, callback(codec, grad_codec="identity", evaluate=mode), eval_strategy="epoch", learning_rate=0.0,
            compute_metrics=accuracy, num_train_epochs=1,
        )  # fmt: skip
        (results[codec],) = merged(trainer)
        assert ("eval_uncompressed_accuracy" in results[codec]) == (mode == "both")
        assert set(trainer.evaluate()) & {"eval_uncompressed_loss"} == set()
    plain, coarse = results["identity"], results[COARSE]
    # With a learning rate of zero the weights are the same, so only compression tells the two apart.
    assert (plain["eval_loss"] == coarse["eval_loss"]) == (mode == "off")
    if mode == "both":
        assert coarse["eval_uncompressed_loss"] == plain["eval_loss"] == plain["eval_uncompressed_loss"]


def test_both_with_several_evaluation_sets(tmp_path):
    trainer = make_trainer(
        tmp_path, callback(evaluate="both"), eval_strategy="epoch", num_train_epochs=1,
        eval_dataset={"a": rows(8), "b": rows(4)}, metric_for_best_model="eval_a_loss",
    )  # fmt: skip
    seen = []
    trainer.add_callback(see := Watch(None))
    see.on_step_end = lambda *a, **k: None
    see.on_evaluate = lambda *a, metrics, **k: seen.extend(name for name in metrics if name.endswith("loss"))
    trainer.train()
    assert sorted(seen) == ["eval_a_loss", "eval_b_loss", "eval_uncompressed_a_loss", "eval_uncompressed_b_loss"]


def test_the_best_model_is_chosen_by_either_metric(tmp_path):
    trainer = trained(
        tmp_path, callback(evaluate="both"), eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_uncompressed_loss",
    )  # fmt: skip
    best = min(entry["eval_uncompressed_loss"] for entry in merged(trainer))
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best)


def test_attached_evaluates_with_compression_after_training(tmp_path):
    compression = callback("kmeans:bits=1")
    trainer = trained(tmp_path, compression)
    plain = trainer.evaluate()["eval_loss"]
    with compression.attached(trainer.model):
        first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == second != plain
    assert trainer.evaluate()["eval_loss"] == plain
    assert not hooks_on(trainer.model)
    trainer.train()


def test_attached_before_any_training(tmp_path):
    model = build("bert")
    with callback(schedule={0: "float8", 2: "identity"}).attached(model) as handle:
        assert {row["codec"] for row in handle.stats()} == {"identity"}


def test_evaluation_does_not_change_training(tmp_path):
    def run(**options):
        model = without_dropout(build("bert"))  # evaluation draws from torch's generator, with or without compression
        return weights(trained(tmp_path, callback("ef+kmeans:bits=2"), model=model, num_train_epochs=1, **options))

    assert same(run(), run(eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4))


class Asking(Trainer):
    """A Trainer whose evaluate has arguments of its own, as for question answering and generation."""

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval", **more):
        self.seen.append((eval_examples, more.get("max_length"), metric_key_prefix))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


class Closed(Trainer):
    """A Trainer whose evaluate takes no prefix."""

    def evaluate(self, eval_dataset=None):
        self.seen.append(())
        return {"eval_answer": 42.0}


class EvaluateAt(TrainerCallback):
    def __init__(self, step, *args, **kwargs):
        self.step, self.args, self.kwargs, self.metrics = step, args, kwargs, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.metrics = self.trainer.evaluate(*self.args, **self.kwargs)


@pytest.mark.parametrize(("kind", "args", "kwargs", "seen", "keys"), [
    (Asking, (None, "examples"), {"max_length": 5}, [("examples", 5, "eval"), ("examples", 5, "eval_uncompressed")],
     {"eval_loss", "eval_uncompressed_loss"}),
    (Asking, (None, "examples", None, "test"), {},
     [("examples", None, "test"), ("examples", None, "test_uncompressed")], {"test_loss", "test_uncompressed_loss"}),
    (Closed, (), {}, [(), ()], {"eval_answer", "uncompressed_eval_answer"}),
])  # fmt: skip
def test_both_evaluations_get_the_arguments_that_the_user_gave(tmp_path, kind, args, kwargs, seen, keys):
    during = EvaluateAt(2, *args, **kwargs)
    trainer = make_trainer(tmp_path, callback(evaluate="both"), during, kind=kind, max_steps=3)
    trainer.seen, during.trainer = [], trainer
    trainer.train()
    assert trainer.seen == seen
    assert keys <= set(during.metrics)
    assert "evaluate" not in vars(trainer)


def test_a_method_that_somebody_else_replaced_is_there_again(tmp_path):
    trainer = make_trainer(tmp_path, callback(evaluate="both"), max_steps=1)
    theirs = trainer.evaluate = lambda *args, **kwargs: {}
    trainer.train()
    assert trainer.evaluate is theirs
    assert "_save_checkpoint" not in vars(trainer)
