"""The Trainer with the callback: training, metrics, and nothing left behind."""

import json
import math
import re

import pytest
import torch
from helpers import build, hooks_on
from helpers.trainers import (
    COARSE,
    FIRST,
    STEPS,
    Stumble,
    callback,
    calls,
    make_trainer,
    same,
    trained,
    weights,
    without_dropout,
)
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_actcompress import ActCompressCallback, ActCompressConfig, CompressionArguments, compress_model

# Plain training


def test_training_with_identity_is_training_without_the_callback(tmp_path):
    plain = trained(tmp_path)
    for codec, equal in (("identity", True), (COARSE, False)):
        compression = callback(codec)
        trainer = trained(tmp_path, compression)
        assert same(weights(plain), weights(trainer)) == equal
        assert calls(compression) == {"forward": 2 * STEPS, "backward": 2 * STEPS}
        assert not hooks_on(trainer.model)
        losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, trainer)]
        assert (losses[0] == losses[1]) == equal


def test_the_trainer_does_what_a_plain_loop_does(tmp_path):
    """A twin by hand: the same batches, the same codec, no Trainer."""
    model, twin = without_dropout(build("bert")), without_dropout(build("bert"))
    batches = []

    def collate(samples):
        batches.append({key: torch.stack([s[key] for s in samples]) for key in samples[0]})
        return batches[-1]

    config = ActCompressConfig("block:bits=2,round=stochastic", seed=3)
    trainer = make_trainer(
        tmp_path, ActCompressCallback(config), model=model, optim="sgd", lr_scheduler_type="constant",
        max_grad_norm=0.0, num_train_epochs=1, seed=1,
    )  # fmt: skip
    trainer.data_collator = collate
    trainer.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=1e-2)
    with compress_model(twin.train(), config):
        for batch in batches:
            twin(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(batches) == STEPS
    assert same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("options", [
    {"codec": "delta+block:bits=2"}, {"codec": "block", "layers": {"*.1": "delta+block:bits=2"}},
    {"codec": "block", "schedule": {3: "delta+block:bits=2"}},
])  # fmt: skip
def test_a_codec_that_needs_sample_ids_is_refused_before_training(options):
    name = re.escape({"layers": "layers['*.1']", "schedule": "schedule[3]"}.get(list(options)[-1], "codec"))
    with pytest.raises(ValueError, match=rf"^{name}='delta\+block:bits=2' has to know .*Trainer.*sample_ids\(ids\)"):
        callback(**options)
    callback("block", grad_codec="delta+block:bits=2")  # gradients are compressed by the inner codec


def test_the_callback_may_be_a_class_or_be_added_later(tmp_path):
    trainer = make_trainer(tmp_path, ActCompressCallback, num_train_epochs=1)
    trainer.train()
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    compression = callback()
    trainer.add_callback(compression)
    trainer.train()
    assert "compress/forward_ratio" in trainer.state.log_history[0]
    assert calls(compression)["forward"] == STEPS


@pytest.mark.parametrize(("steps", "bf16"), [(2, False), (3, True)])
def test_gradient_accumulation_and_bf16(tmp_path, steps, bf16):
    options = {"gradient_accumulation_steps": steps, "bf16": bf16}
    plain = trained(tmp_path, **options)
    compression = callback("identity")
    trainer = trained(tmp_path, compression, **options)
    assert same(weights(plain), weights(trainer))
    # Every micro-batch is a call, whether or not a step follows.
    assert calls(compression) == {"forward": 2 * STEPS, "backward": 2 * STEPS}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(tmp_path, reentrant):
    plain = trained(tmp_path, callback("kmeans:bits=2"))
    trainer = trained(
        tmp_path, callback("kmeans:bits=2"), activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    assert same(weights(plain), weights(trainer))


def test_torch_compile_twice_and_evaluation_after_it(tmp_path):
    torch._dynamo.reset()
    compression = callback("kmeans:bits=2")
    plain = make_trainer(tmp_path, callback("kmeans:bits=2"), num_train_epochs=1)
    graph = make_trainer(tmp_path, compression, num_train_epochs=1, torch_compile_backend="eager")
    for _ in range(2):
        for trainer in (plain, graph):
            set_seed(1)
            trainer.train()
        assert same(weights(plain), weights(graph))
        assert calls(compression) == {"forward": STEPS, "backward": STEPS}
    uncompressed = graph.evaluate()["eval_loss"]
    with compression.attached(graph.model) as handle:
        assert graph.evaluate()["eval_loss"] != uncompressed
        assert handle.stats()[0]["calls"] == 1
    assert graph.evaluate()["eval_loss"] == uncompressed


def test_model_init(tmp_path):
    """The model of the constructor is not the one that is trained."""
    compression = callback("identity")
    trainer = trained(tmp_path, compression, model_init=lambda: build("bert"))
    assert calls(compression)["forward"] == 2 * STEPS
    assert not hooks_on(trainer.model)
    assert same(weights(trainer), weights(trained(tmp_path, model_init=lambda: build("bert"))))


def test_a_model_that_cannot_be_compressed_stops_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="first=9 is out of range"):
        trained(tmp_path, callback(first=9))


def test_nonfinite_raise_stops_training_with_the_layers_name(tmp_path):
    trainer = make_trainer(tmp_path, callback(nonfinite="raise"))
    trainer.model.bert.encoder.layer[0].output.LayerNorm.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match=FIRST):
        trainer.train()


def test_nonfinite_values_are_counted_in_the_log(tmp_path):
    trainer = make_trainer(tmp_path, callback(), max_steps=1)
    trainer.model.bert.encoder.layer[0].output.LayerNorm.bias.data[0] = math.inf
    trainer.train()
    assert trainer.state.log_history[0]["compress/nonfinite"] >= 1


# Metrics


def test_metrics_reach_the_history_and_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trained(tmp_path, callback("uniform:bits=4", meter_every=1), report_to=["tensorboard"], logging_steps=2)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == STEPS
    expected = {f"compress/{way}_{what}" for way in ("forward", "backward") for what in ("ratio", "error")}
    expected |= {"compress/saved_mb", "compress/worst_error"}
    for entry in entries:
        assert {key for key in entry if key.startswith("compress/")} == expected
        assert 6 < entry["compress/forward_ratio"] < 8  # 4 bits of 32 and 8 bytes
        assert 0 < entry["compress/forward_error"] <= entry["compress/worst_error"] < 0.5
    (events,) = {path.parent for path in tmp_path.rglob("events.out*")}
    reader = tensorboard.EventAccumulator(str(events)).Reload()
    tags = {tag.removeprefix("train/"): tag for tag in reader.Tags()["scalars"]}
    assert expected <= set(tags)
    for name in expected:
        shown = [event.value for event in reader.Scalars(tags[name])]
        assert shown == pytest.approx([entry[name] for entry in entries])


def test_each_log_line_covers_its_own_interval(tmp_path):
    trainer = trained(
        tmp_path, callback("identity", schedule={1: "uniform:bits=8"}, meter_every=1), logging_steps=STEPS
    )
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    ratio, saved = "compress/forward_ratio", "compress/saved_mb"
    assert (first[ratio], first[saved], first["compress/forward_error"]) == (1, 0, 0)
    assert second[ratio] > 3.5
    assert second[saved] > 0
    json.dumps(trainer.state.log_history)


def test_evaluation_lines_carry_no_compression_metrics(tmp_path):
    trainer = trained(tmp_path, callback(), eval_strategy="epoch")
    lines = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(lines) == 2
    assert not any(key.startswith("compress/") for line in lines for key in line)


# Again


def test_train_twice(tmp_path):
    compression = callback()
    trainer = make_trainer(tmp_path, compression)
    for _ in range(2):
        trainer.train()
        assert calls(compression) == {"forward": 2 * STEPS, "backward": 2 * STEPS}
        assert not hooks_on(trainer.model)


def test_training_again_after_an_exception(tmp_path):
    compression = callback(evaluate="both")
    trainer = make_trainer(tmp_path, compression, Stumble(3), eval_strategy="epoch")
    with pytest.raises(RuntimeError, match="cable"):
        trainer.train()
    trainer.train()
    # Each of two evaluations saw one batch with compression.
    assert calls(compression) == {"forward": 2 * STEPS + 2, "backward": 2 * STEPS}
    assert not hooks_on(trainer.model)
    assert len([entry for entry in trainer.state.log_history if "eval_uncompressed_loss" in entry]) == 2
    assert set(trainer.evaluate()) & {"eval_uncompressed_loss"} == set()


# The command line


def test_a_recipe_takes_the_options_beside_those_of_the_trainer(tmp_path):
    parser = HfArgumentParser([TrainingArguments, CompressionArguments])
    argv = ["--output_dir", str(tmp_path), "--codec", "sort:bits=8", "--last", "2", "--evaluate", "off", "--use_cpu"]
    args, compression = parser.parse_args_into_dataclasses(argv)
    compression = ActCompressCallback(compression.to_config())
    trained(tmp_path, compression, max_steps=1)
    assert [row["layer"] for row in compression.stats] == [0, 0, 2, 2, 3, 3]
    assert args.use_cpu


def test_a_log_line_has_at_most_eight_numbers(tmp_path):
    """However deep the model and whatever is attached."""
    compression = callback(first=2, last=2, meter_every=1, saved="block:bits=4", analysis=True, analysis_every=1)
    trainer = trained(tmp_path, compression, max_steps=2)
    line = trainer.state.log_history[0]
    found = {key.removeprefix("compress/") for key in line if key.startswith("compress/")}
    assert len(found) == 8
    assert {"worst_error", "grad_error", "saved/held_mb", "forward_ratio"} <= found
    assert len(compression.stats) > 8  # by layer
