"""The Trainer with the callback: metrics, checkpoints, resumption, evaluation, and nothing left behind."""

import json
import logging
import math

import pytest
import torch
from helpers import build, hooks_on
from helpers.trainers import STEPS, Stream, Stumble, Watch, accuracy, make_trainer, rows, same, weights
from transformers import HfArgumentParser, TrainingArguments, set_seed

from hf_actcompress import ActCompressCallback, ActCompressConfig, CompressionArguments, compress_model

COARSE = "uniform:bits=1"
FIRST, LAST = "bert.encoder.layer.0", "bert.encoder.layer.3"
REMEMBERING = ("block:bits=3,round=stochastic", "kmeans:bits=2", "lowrank:rank=2", "ef+topk:ratio=0.2")


def callback(codec=COARSE, **options):
    return ActCompressCallback(ActCompressConfig(codec, **options))


def trained(folder, *callbacks, resume=None, **options):
    trainer = make_trainer(folder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def calls(compression):
    return {row["direction"]: row["calls"] for row in compression.stats}


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


def test_the_callback_may_be_a_class_or_be_added_later(tmp_path):
    trainer = make_trainer(tmp_path, ActCompressCallback, num_train_epochs=1)
    trainer.train()
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    compression = callback()
    trainer.add_callback(compression)
    trainer.train()
    assert f"compress/{FIRST}/forward_ratio" in trainer.state.log_history[0]
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
    assert trainer.state.log_history[0][f"compress/{FIRST}/forward_nonfinite"] == 1


# Metrics


def test_metrics_reach_the_history_and_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trained(tmp_path, callback("uniform:bits=4", meter_every=1), report_to=["tensorboard"], logging_steps=2)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == STEPS
    expected = {
        f"compress/{layer}/{direction}_{what}"
        for layer in (FIRST, LAST) for direction in ("forward", "backward") for what in ("ratio", "error", "cosine")
    } | {f"compress/{layer}/saved_mb" for layer in (FIRST, LAST)}  # fmt: skip
    for entry in entries:
        assert {key for key in entry if key.startswith("compress/")} == expected
        assert 6 < entry[f"compress/{FIRST}/forward_ratio"] < 8  # 4 bits of 32 and 8 bytes
        assert 0 < entry[f"compress/{FIRST}/forward_error"] < 0.5
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
    ratio, saved = f"compress/{FIRST}/forward_ratio", f"compress/{FIRST}/saved_mb"
    assert (first[ratio], first[saved], first[f"compress/{FIRST}/forward_error"]) == (1, 0, 0)
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


# Resumption

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
    assert f"no saved state for {FIRST}/forward, {FIRST}/backward" in caplog.text
    assert {row["codec"] for row in compression.stats} == {"kmeans:bits=3"}


def test_a_state_file_cut_short_by_a_crash_is_named_and_left_out(tmp_path, caplog):
    trained(tmp_path, callback("kmeans:bits=2"), **CHECKPOINTS)
    path = tmp_path / "checkpoint-3" / "actcompress_state_rank0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with caplog.at_level(logging.WARNING, "hf_actcompress"):
        trained(tmp_path, callback("kmeans:bits=2"), resume=str(tmp_path / "checkpoint-3"), **CHECKPOINTS)
    assert "actcompress_state_rank0.safetensors cannot be read" in caplog.text
    assert not list(tmp_path.rglob("*.tmp"))


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


# Evaluation


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


# The command line


def test_a_recipe_takes_the_options_beside_those_of_the_trainer(tmp_path):
    parser = HfArgumentParser([TrainingArguments, CompressionArguments])
    argv = ["--output_dir", str(tmp_path), "--codec", "sort:bits=8", "--last", "2", "--evaluate", "off", "--use_cpu"]
    args, compression = parser.parse_args_into_dataclasses(argv)
    compression = ActCompressCallback(compression.to_config())
    trained(tmp_path, compression, max_steps=1)
    assert [row["layer"] for row in compression.stats] == [0, 0, 2, 2, 3, 3]
    assert args.use_cpu


def test_saved_tensors_are_coded_and_logged(tmp_path, monkeypatch):
    from hf_actcompress.saved import tensors as saved

    monkeypatch.setattr(saved, "SMALLEST", 16)
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
    from hf_actcompress.saved import tensors as saved

    monkeypatch.setattr(saved, "SMALLEST", 16)
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
    from hf_actcompress.saved import tensors as saved

    monkeypatch.setattr(saved, "SMALLEST", 16)

    def callback():
        return ActCompressCallback(ActCompressConfig(first=0, last=0, saved=codec))

    options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restore}
    whole = make_trainer(tmp_path, callback(), **options)
    whole.train()
    resumed = make_trainer(tmp_path, callback(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(resumed))


def test_saved_is_refused_under_torch_compile(tmp_path):
    config = ActCompressConfig(first=0, last=0, saved="block:bits=4")
    trainer = make_trainer(tmp_path, ActCompressCallback(config), torch_compile=True)
    with pytest.raises(ValueError, match="saved= does not work inside torch.compile"):
        trainer.train()
