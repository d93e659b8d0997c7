"""The automatic choice: the best combination there is, the same every time, kept in config and checkpoints."""

import copy
import itertools
import json
import math

import pytest
import torch
from helpers import batch_of, build, differing, loss_of, train_steps
from helpers.trainers import Stumble, make_trainer, same, weights

from hf_actcompress import ActCompressCallback, ActCompressConfig, compress_model
from hf_actcompress.codecs import parse_codec
from hf_actcompress.observe import allocation, auto
from hf_actcompress.observe.allocation import Option, best_combination
from hf_actcompress.observe.sensitivity import sensitivity
from hf_actcompress.observe.target import Target

FEW = ("identity", "block:bits=8", "block:bits=4", "rotated:bits=2", "topk:ratio=0.1|block:bits=8")


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(auto, "CANDIDATES", FEW)


def made_up(seed, places=4):
    generator = torch.Generator().manual_seed(seed)

    def place():
        raw = int(torch.randint(100, 2000, (1,), generator=generator))
        shares = torch.rand(5, generator=generator).tolist()
        errors = torch.rand(5, generator=generator).tolist()
        return [Option(str(i), raw, int(raw * shares[i]) + 1, errors[i]) for i in range(5)]

    return [place() for _ in range(places)]


def brute_force(places, target):
    best = None
    for choice in itertools.product(*(range(len(p)) for p in places)):
        taken = [p[i] for p, i in zip(places, choice, strict=True)]
        nbytes, error = sum(o.nbytes for o in taken), sum(o.error for o in taken)
        if target.ratio is not None:
            fits, score = nbytes * target.ratio <= sum(o.raw for o in taken), error
        else:
            fits, score = math.sqrt(error) <= target.error, nbytes
        if fits and (best is None or score < best):
            best = score
    return best


@pytest.mark.parametrize("target", [Target(ratio=1.5), Target(ratio=2.0), Target(ratio=3.0), Target(error=0.7),
                                    Target(error=1.2)])  # fmt: skip
@pytest.mark.parametrize("seed", range(6))
def test_no_other_combination_is_better(seed, target):
    places = made_up(seed)
    found, best = best_combination(places, target), brute_force(places, target)
    if best is None:
        assert found is None
        return
    taken = [p[i] for p, i in zip(places, found, strict=True)]
    nbytes, error = sum(o.nbytes for o in taken), sum(o.error for o in taken)
    assert (error if target.ratio else nbytes) == pytest.approx(best)
    assert nbytes * target.ratio <= sum(o.raw for o in taken) if target.ratio else math.sqrt(error) <= target.error


def test_many_places_are_thinned_out_and_nearly_as_good(monkeypatch):
    places, target = made_up(0, places=12), Target(ratio=2.0)
    exact = sum(p[i].error for p, i in zip(places, best_combination(places, target), strict=True))
    monkeypatch.setattr(allocation, "WIDEST", 200)
    found = best_combination(places, target)
    assert sum(p[i].nbytes for p, i in zip(places, found, strict=True)) * 2 <= sum(p[0].raw for p in places)
    assert exact <= sum(p[i].error for p, i in zip(places, found, strict=True)) <= 1.1 * exact


def test_what_gave_nan_is_never_chosen():
    places = [[Option("a", 100, 10, math.inf), Option("b", 100, 50, 0.1)]]
    assert best_combination(places, Target(ratio=1.5)) == [1]
    assert best_combination(places, Target(ratio=3.0)) is None


@pytest.mark.parametrize("bad", ["auto", "auto:", "auto:ratio=1", "auto:ratio=x", "auto:error=0", "auto:error=99",
                                 "auto:bits=4", "auto:ratio=8,error=0.1", "auto:ratio=nan"])  # fmt: skip
def test_wrong_targets_are_refused(bad):
    with pytest.raises(ValueError, match="codec='auto:ratio=8', or a relative error.*codec='auto:error=0.1'"):
        ActCompressConfig(bad)


def test_what_does_not_go_with_auto():
    with pytest.raises(ValueError, match="give it as codec= alone"):
        ActCompressConfig("block", grad_codec="auto:ratio=8")
    with pytest.raises(ValueError, match="leave schedule= out"):
        ActCompressConfig("auto:ratio=8", schedule={0: "block"})
    with pytest.raises(ValueError, match="resolved= belongs to codec='auto"):
        ActCompressConfig("block", resolved={"a": {"forward": "block"}})
    with pytest.raises(ValueError, match=r"resolved\['a'\]\['forward'\].*Unknown codec"):
        ActCompressConfig("auto:ratio=8", resolved={"a": {"forward": "blok", "backward": "block"}})
    with pytest.raises(ValueError, match="smallest candidates reach a ratio of .* Ask for less"):
        model = build("bert").train()
        with compress_model(model, ActCompressConfig("auto:ratio=900")):
            loss_of(model, batch_of("bert"))


@pytest.mark.parametrize("name", ["bert", "mobilenetv2_100"])
def test_the_ratio_is_kept_and_differs_by_place(name):
    model, batch = build(name).train(), batch_of(name)
    with compress_model(model, ActCompressConfig("auto:ratio=6", meter_every=0)) as handle:
        loss_of(model, batch).backward()
        rows = handle.stats()
    assert sum(r["raw_bytes"] for r in rows) / sum(r["payload_bytes"] for r in rows) >= 6
    assert len({row["codec"] for row in rows}) > 1


def test_the_choice_is_that_of_the_map_by_hand():
    """The twin: the sensitivity of every candidate, then all combinations."""
    model, batch = build("bert").train(), batch_of("bert")
    with compress_model(model, ActCompressConfig("auto:ratio=6")) as handle:
        codecs = [parse_codec(spec) for spec in FEW]
        torch.manual_seed(1)
        rows = sensitivity(handle, model, (), batch, {"forward": codecs, "backward": codecs})
        torch.manual_seed(1)
        loss_of(model, batch)
        chosen = handle.auto.chosen
    keys = list(dict.fromkeys((r["name"], r["direction"]) for r in rows))
    places = [[r for r in rows if (r["name"], r["direction"]) == key] for key in keys]
    best = min(
        (combination for combination in itertools.product(*places)
         if sum(r["payload_bytes"] for r in combination) * 6 <= sum(r["raw_bytes"] for r in combination)),
        key=lambda combination: sum(r["layer_error"] ** 2 for r in combination),
    )  # fmt: skip
    assert {(name, d): spec for name, codecs in chosen.items() for d, spec in codecs.items()} == {
        (r["name"], r["direction"]): r["codec"] for r in best
    }


def test_an_error_is_kept_to():
    model, batch = build("bert").train(), batch_of("bert")
    with compress_model(model, ActCompressConfig("auto:error=0.2")) as handle:
        loss_of(model, batch)
        chosen, table = handle.auto.chosen, handle.auto.table
    error = sum(r["layer_error"] ** 2 for r in table if chosen[r["name"]][r["direction"]] == r["codec"])
    assert 0.05 < math.sqrt(error) <= 0.2


def test_a_gradients_codec_of_its_own_and_named_layers_are_left_alone():
    settings = ActCompressConfig(
        "auto:ratio=4", grad_codec="uniform:bits=8", layers={"encoder.layer.0": {"codec": "sort:bits=8"}}
    )
    model = build("bert").train()
    with compress_model(model, settings) as handle:
        loss_of(model, batch_of("bert")).backward()
        assert handle.auto.names == ["bert.encoder.layer.3"]
        rows = {(r["layer"], r["direction"]): r["codec"] for r in handle.stats()}
    assert rows[0, "forward"] == "sort:bits=8,splits=2"
    assert rows[0, "backward"] == rows[3, "backward"] == "uniform:bits=8"
    assert set(handle.auto.chosen["bert.encoder.layer.3"]) == {"forward"}


def test_measuring_changes_nothing_but_the_codecs():
    """A run with the chosen codecs from the start computes the same."""
    traces = []
    for name in ("mobilenetv2_100", "bert"):
        batches = [batch_of(name, seed) for seed in range(2)]
        model = build(name)
        with compress_model(model, ActCompressConfig("auto:ratio=6")) as handle:
            traces.append(train_steps(model, batches))
            chosen = handle.auto.chosen
        named = {key: {"codec": c["forward"], "grad_codec": c["backward"]} for key, c in chosen.items()}
        model = build(name)
        with compress_model(model, ActCompressConfig("identity", layers=named)):
            assert differing(traces[-1], train_steps(model, batches)) == []


def test_it_is_measured_anew_and_kept_unless_clearly_beaten(monkeypatch):
    monkeypatch.setattr(auto.AutoCodec, "early", (2,))
    monkeypatch.setattr(auto.AutoCodec, "every", 4)
    seen, plain = [], auto.sensitivity
    monkeypatch.setattr(auto, "sensitivity", lambda *args, **kw: seen.append(1) or plain(*args, **kw))
    model = build("bert").train()
    with compress_model(model, ActCompressConfig("auto:ratio=6")) as handle:
        counts = []
        for seed in range(9):
            loss_of(model, batch_of("bert", seed))
            counts.append(len(seen) // len(handle.boundaries))  # one call for each
        assert counts == [1, 1, 2, 2, 3, 3, 3, 3, 4]
        monkeypatch.setattr(auto, "BETTER", 0.0)
        now = copy.deepcopy(handle.auto.chosen)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        handle.auto.passes = 4
        loss_of(model, batch_of("bert", 99))
        assert len(seen) == 5 * len(handle.boundaries) and handle.auto.chosen == now


def test_what_was_far_from_the_best_is_not_measured_again(monkeypatch):
    monkeypatch.setattr(auto.AutoCodec, "early", (1,))
    model = build("bert").train()
    with compress_model(model, ActCompressConfig("auto:ratio=6")) as handle:
        loss_of(model, batch_of("bert", 0))
        first = handle.auto.table
        loss_of(model, batch_of("bert", 1))
        second = handle.auto.table
    assert len(second) < len(first) == 2 * len(handle.boundaries) * len(FEW)
    for name in handle.boundaries:
        for direction in ("forward", "backward"):
            options = [auto._option(row) for row in first if (row["name"], row["direction"]) == (name, direction)]
            left = [row["codec"] for row in second if (row["name"], row["direction"]) == (name, direction)]
            front = [o for o in options if not any(p.nbytes <= o.nbytes and p.error < o.error for p in options)]
            assert "identity" in left and {o.spec for o in front} <= set(left)
            for gone in (o for o in options if o.spec not in left):
                assert any(o.nbytes <= gone.nbytes and math.sqrt(o.error) * 1.5 < math.sqrt(gone.error) for o in front)


def test_few_rows_of_a_gradient_would_flatter_a_rotation():
    """Why a whole batch is measured: the gradients of two rows lie in a space that two dimensions span."""
    model, batch = build("bert").train(), batch_of("bert")
    errors = []
    for rows in (1, 4):
        few = {key: value[:rows] for key, value in batch.items()}
        with compress_model(model, ActCompressConfig("identity")) as handle:
            found = sensitivity(handle, model, (), few, {"backward": [parse_codec("rotated:bits=2")]})
        errors.append(max(row["layer_error"] for row in found))
    assert errors[0] < errors[1]


def test_nan_is_measured_later():
    model, batch = build("bert").train(), batch_of("bert")
    bias = model.bert.encoder.layer[0].output.LayerNorm.bias
    with compress_model(model, ActCompressConfig("auto:ratio=6")) as handle:
        with torch.no_grad():
            bias[0] = math.nan
        loss_of(model, batch)
        assert handle.auto.chosen == {}
        with torch.no_grad():
            bias[0] = 0.0
        loss_of(model, batch)
        assert handle.auto.chosen


def test_evaluation_is_not_measured_and_copies_keep_their_codecs():
    model, batch = build("bert").train(), batch_of("bert")
    with compress_model(model, ActCompressConfig("auto:ratio=6")) as handle:
        with torch.no_grad():
            loss_of(model, batch)
        loss_of(model.eval(), batch)
        assert handle.auto.chosen == {}
        loss_of(model.train(), batch)
        twin = copy.deepcopy(model)
        assert torch.equal(loss_of(twin.eval(), batch), loss_of(model.eval(), batch))


def test_runs_repeat_resume_and_write_what_was_chosen(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    settings, runs = ActCompressConfig("auto:ratio=6", analysis=True), []
    for folder in ("a", "b"):
        callback = ActCompressCallback(settings)
        trainer = make_trainer(tmp_path / folder, callback, **options)
        trainer.train()
        runs.append((weights(trainer), callback))
    assert same(runs[0][0], runs[1][0])
    saved = ActCompressConfig.from_pretrained(tmp_path / "a" / "checkpoint-3")
    assert saved.codec == "auto:ratio=6" and set(saved.resolved) == {"bert.encoder.layer.0", "bert.encoder.layer.3"}
    assert saved.resolved == runs[0][1].config.resolved and settings.resolved is None
    json.dumps(saved.to_dict())
    callback = ActCompressCallback(settings)
    trainer = make_trainer(tmp_path / "c", callback, Stumble(5), **options)
    with pytest.raises(RuntimeError, match="cable"):
        trainer.train()
    trainer.train(resume_from_checkpoint=True)
    assert same(runs[0][0], weights(trainer)) and callback.config.resolved == saved.resolved
    keys = ("codec", "calls", "raw_bytes", "payload_bytes")
    assert [[r[k] for k in keys] for r in callback.stats] == [[r[k] for k in keys] for r in runs[0][1].stats]
    model = build("bert")
    with compress_model(model, saved) as handle:  # what was trained is what is evaluated
        used = {row["boundary"]: row["codec"] for row in handle.stats() if row["direction"] == "forward"}
    assert used == {name: codecs["forward"] for name, codecs in saved.resolved.items()}
    with callback.attached(trainer.model) as handle:
        assert {row["codec"] for row in handle.stats()} == {row["codec"] for row in callback.stats}
