"""The probe: it sees what the run's next step does, and the run does not see it."""

import copy

import pytest
import torch
from helpers import Block, batch_of, build, differing, hooks_on, loss_of, points, stack, train_steps
from helpers.trainers import STEPS, Stumble, make_trainer, same, weights
from torch import nn

from hf_actcompress import ActCompressCallback, ActCompressConfig, compress_model, remove_compression
from hf_actcompress.observe import COLUMNS, FILE_NAME, read_records
from hf_actcompress.observe.probe import Probe, identity_of

CODECS = ("block:bits=2,round=stochastic", "ef+kmeans:bits=2", "ef+lowrank:rank=2", "ef+topk:ratio=0.2")
NUMBERS = ("calls", "raw_bytes", "payload_bytes", "rel_error", "cosine", "nonfinite")


def config(codec="block:bits=2,round=stochastic", every=1, **options):
    return ActCompressConfig(codec, analysis=True, analysis_every=every, meter_every=1, **options)


def without(other):
    return ActCompressConfig.from_dict({**other.to_dict(), "analysis": False})


def traces(name, settings, steps=3, autocast=False):
    """Everything that training computes, with and without the probe, and the rows of the former."""
    result = []
    for each in (settings, without(settings)):
        model = build(name)
        with compress_model(model, each) as handle:
            batches = [batch_of(name, seed) for seed in range(steps)]
            trace = train_steps(model, batches, autocast=autocast)
            states = handle.state_dict()
        result.append((trace, [{k: r[k] for k in NUMBERS} for r in handle.stats()], states, handle))
    return result


# Nothing changes


@pytest.mark.parametrize("codec", CODECS)
def test_losses_gradients_weights_meters_and_states_stay_the_same(codec):
    (trace, stats, states, handle), (other, plain, others, _) = traces("bert", config(codec))
    assert differing(trace, other) == []
    assert stats == plain
    for key, entry in states.items():
        a, b = entry["state"], others[key]["state"]
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len({row["step"] for row in handle.probe.rows}) == 3


@pytest.mark.parametrize("name", ["mobilenetv2_100", "vit", "t5"])
def test_batch_norms_drop_path_and_stacks(name):
    size = {"first": 1, "last": 1}
    (trace, stats, _, handle), (other, plain, _, _) = traces(name, config(**size), steps=2)
    assert differing(trace, other) == [] and stats == plain and handle.probe.rows


def test_bf16_autocast():
    (trace, _, _, handle), (other, _, _, _) = traces("bert", config(), steps=2, autocast=True)
    assert differing(trace, other) == [] and handle.probe.rows


@pytest.mark.parametrize("saved", ["block:bits=4,round=stochastic", "auto:budget=0.2"])
def test_saved_tensors(saved, monkeypatch):
    monkeypatch.setattr("hf_actcompress.saved.kept.SMALLEST", 16)
    (trace, _, states, handle), (other, _, others, _) = traces("bert", config(saved=saved), steps=2)
    assert differing(trace, other) == []
    assert states["saved"] == others["saved"]
    rows = [row for row in handle.probe.rows if row["site"] == "saved"]
    assert len(rows) > 10 and all(row["rel_error"] > 0 and row["ratio"] > 1 for row in rows)


@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 2}, {"activation_checkpointing": True}, {"bf16": True},
    {"torch_compile_backend": "eager"},
])  # fmt: skip
def test_a_trainers_losses_and_weights_are_the_same(tmp_path, options):
    torch._dynamo.reset()
    runs = []
    for each in (config(every=2), without(config())):
        callback = ActCompressCallback(each)
        trainer = make_trainer(tmp_path / str(each.analysis), callback, **options)
        trainer.train()
        history = [(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
        runs.append((history, weights(trainer), [{k: r[k] for k in NUMBERS} for r in callback.stats]))
        assert not any(isinstance(h, Probe) for h in trainer.model._forward_pre_hooks.values())
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1]) and runs[0][2] == runs[1][2]
    steps = 2 * STEPS // options.get("gradient_accumulation_steps", 1)
    assert {row["step"] for row in read_records(tmp_path / "True")} == set(range(0, steps, 2))


# What is recorded is right


def test_the_gradients_compared_are_those_of_the_two_runs():
    """A twin by hand: one backward pass without compression, one with, from the same random numbers."""
    model, batch = build("bert").train(), batch_of("bert")
    settings = config("uniform:bits=2")
    sides = []
    for compressed in (False, True):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        with compress_model(twin, without(settings)) as handle:
            if not compressed:
                handle.remove()
            loss = loss_of(twin, batch)
            loss.backward()
        found = {n: p.grad.double() for n, p in twin.named_parameters() if p.grad is not None}
        sides.append((float(loss.detach()), found))
    with compress_model(model, settings) as handle:
        torch.manual_seed(1)
        loss_of(model, batch)
    rows = handle.probe.rows

    def cosine(prefix):
        a, b = (torch.cat([g.flatten() for n, g in side[1].items() if n.startswith(prefix)]) for side in sides)
        return float(a @ b / a.norm() / b.norm()), float((a - b).norm() / a.norm())

    whole = next(row for row in rows if row["site"] == "parameters" and row["layer"] is None)
    assert (whole["cosine"], whole["rel_error"]) == pytest.approx(cosine(""), rel=1e-4)
    assert all(row["grad_cosine"] == whole["cosine"] and row["grad_error"] == whole["rel_error"] for row in rows)
    assert (whole["plain_loss"], whole["loss"]) == pytest.approx((sides[0][0], sides[1][0]), rel=1e-5)
    middle = next(row for row in rows if row["site"] == "parameters" and row["name"] == "bert.encoder.layer.1")
    assert (middle["cosine"], middle["rel_error"]) == pytest.approx(cosine("bert.encoder.layer.1."), rel=1e-4)
    assert whole["cosine"] < 0.999
    numel = sum(row["numel"] for row in rows if row["site"] == "parameters" and row["layer"] is not None)
    assert numel == whole["numel"] == sum(p.numel() for p in model.parameters())


def test_tensors_are_those_that_the_run_compresses():
    """The meters measure all of a small tensor as well."""
    model = build("bert")
    with compress_model(model, config("ef+uniform:bits=2", every=2, grad_codec="uniform:bits=3")) as handle:
        trace, batches = [], [batch_of("bert", seed) for seed in range(4)]
        model.train()
        for step, batch in enumerate(batches):
            loss_of(model, batch).backward()
            if step % 2 == 0:
                trace.append({(r["boundary"], r["direction"]): r["rel_error"] * r["calls"] for r in handle.stats()})
            if step == 1:
                before = {(r["boundary"], r["direction"]): r["rel_error"] * r["calls"] for r in handle.stats()}
    for step, expected in ((0, trace[0]), (2, {key: trace[1][key] - before[key] for key in before})):
        rows = [row for row in handle.probe.rows if row["step"] == step and row["site"] == "boundary"]
        assert {(row["name"], row["direction"]): row["rel_error"] for row in rows} == pytest.approx(expected, rel=1e-3)
        assert {row["codec"] for row in rows} == {"ef+uniform:bits=2", "uniform:bits=3"}
        assert all(set(row) == set(COLUMNS) and row["ratio"] > 8 for row in rows)


def test_identity_is_exact():
    (_, _, _, handle), _ = traces("mobilenetv2_100", config("identity"), steps=1)
    for row in handle.probe.rows:
        assert (row["rel_error"], row["grad_error"], row["snr_db"]) == (0, 0, None)
        assert row["loss"] == row["plain_loss"] and row["cosine"] == pytest.approx(1)


def test_a_block_that_runs_several_times_has_a_row_for_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(8, 0.1) for _ in range(2))

        def forward(self, x):
            return self.blocks[1](self.blocks[0](self.blocks[0](x))).square().mean()

    model, settings = Twice(), config("uniform:bits=4", first=1, last=0)
    with compress_model(model, settings, example_inputs=torch.randn(4, 8)) as handle:
        model(torch.randn(4, 8))
    assert [row["call"] for row in handle.probe.rows if row["direction"] == "forward"] == [0, 1]


def test_nan_leaves_the_measures_out():
    model, batch = build("bert").train(), batch_of("bert")
    model.bert.encoder.layer[0].output.LayerNorm.bias.data[0] = float("nan")
    with compress_model(model, config()) as handle:
        loss_of(model, batch)
    assert all(row["rel_error"] is None and row["grad_cosine"] is None for row in handle.probe.rows)


# When, where and not


def test_only_training_passes_are_measured_and_every_nth_of_them():
    model, batch = build("bert"), batch_of("bert")
    with compress_model(model, config(every=2)) as handle:
        loss_of(model.eval(), batch)
        model.train()
        with torch.no_grad():
            loss_of(model, batch)
        assert handle.probe.rows == []
        for _ in range(3):
            loss_of(model, batch)
    assert {row["step"] for row in handle.probe.rows} == {0, 2}
    loss_of(model, batch)
    assert {row["step"] for row in handle.probe.rows} == {0, 2}


def test_a_copy_of_the_model_does_not_measure():
    model, batch = build("bert").train(), batch_of("bert")
    with compress_model(model, config()) as handle:
        twin = copy.deepcopy(model)
        loss_of(twin, batch)
        assert handle.probe.rows == []
        remove_compression(twin)
        assert not hooks_on(twin)


def test_reentrant_checkpointing_is_refused_with_a_remedy():
    model, x = stack(segments=1, reentrant=True), points()[0]
    with compress_model(model, config(), example_inputs=x), pytest.raises(ValueError, match="'use_reentrant': False"):
        model(x)


def test_models_are_told_apart():
    assert identity_of(build("bert")) == identity_of(build("bert"))
    assert len({identity_of(build(name)) for name in ("bert", "roberta", "distilbert")}) == 3


def test_log_lines_carry_the_gradients_measures(tmp_path):
    trainer = make_trainer(tmp_path, ActCompressCallback(config(every=3)))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    rows = read_records(tmp_path)
    assert [line["step"] - 1 for line in lines if "compress/grad_cosine" in line] == [0, 3, 6]
    assert lines[3]["compress/grad_error"] == next(row["grad_error"] for row in rows if row["step"] == 3)
    assert rows[-1]["epoch"] == 1.5


def test_a_resumed_run_has_the_records_of_the_unbroken_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    settings = config("ef+kmeans:bits=2")
    make_trainer(tmp_path / "a", ActCompressCallback(settings), **options).train()
    trainer = make_trainer(tmp_path / "b", ActCompressCallback(settings), Stumble(5), **options)
    with pytest.raises(RuntimeError, match="cable"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "a" / FILE_NAME).read_text() == (tmp_path / "b" / FILE_NAME).read_text()


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="analysis='yes' is neither True nor False"):
        ActCompressConfig(analysis="yes")
    for bad in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="analysis_every=.*whole number of 1 or more"):
            ActCompressConfig(analysis=True, analysis_every=bad)
