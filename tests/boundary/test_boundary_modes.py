"""A boundary without gradients, in evaluation, with NaN and Inf, and its meter."""


import copy

import pytest
import torch
from helpers import batch_of, build, loss_of, points, stack
from helpers.boundaries import SPECS, STATEFUL, attach, meter, metered, values
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.codecs import parse_codec
from hf_actcompress.observe.meter import Meter

# What has no gradient


@pytest.mark.parametrize("spec", ["block:bits=4", "kmeans:bits=2"])
def test_frozen_parameters_and_inputs_without_gradient(spec):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train()
    model[0].requires_grad_(False)
    boundary = attach(model[0], spec, spec)
    model(values(4, 8)).sum().backward()
    assert model[1].weight.grad is not None
    assert meter(boundary.forward).calls == 1
    assert meter(boundary.backward).calls == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_without_gradients(mode):
    layer = nn.Identity().eval()
    attach(layer, "uniform:bits=1")
    with mode():
        assert layer(values(4, 8)).unique().numel() == 2


def test_evaluate_off_leaves_evaluation_alone():
    layer = nn.Identity().eval()
    attach(layer, "uniform:bits=1", evaluate=False)
    x = values(4, 8)
    assert layer(x) is x
    assert layer.train()(x).unique().numel() == 2


def test_a_boundary_that_is_switched_off_does_nothing():
    layer = nn.Identity().train()
    boundary = attach(layer, "uniform:bits=1")
    boundary.enabled = False
    x = values(4, 8)
    assert layer(x) is x
    assert meter(boundary.forward).calls == 0


@pytest.mark.parametrize("spec", STATEFUL)
def test_evaluation_does_not_change_training(spec):
    """However often a run is evaluated, it must train in the same way."""

    def train(evaluations):
        layer, outputs = nn.Identity(), []
        attach(layer, spec, spec)
        for step in range(3):
            x = values(6, 16, seed=step).requires_grad_()
            y = layer.train()(x)
            y.backward(values(6, 16, seed=10 + step))
            outputs += [y.detach(), x.grad]
            with torch.no_grad():
                for i in range(evaluations):
                    layer.eval()(values(6, 16, seed=100 + i))
        return outputs

    assert all(torch.equal(a, b) for a, b in zip(train(0), train(2), strict=True))


def test_error_feedback_of_a_training_batch_is_not_added_to_evaluation_data():
    layer, codec = nn.Identity(), parse_codec("topk:ratio=0.1")
    attach(layer, "ef+topk:ratio=0.1")
    layer.train()(values(6, 16).requires_grad_())
    x = values(6, 16, seed=1)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), codec.roundtrip(x))


def test_a_layer_kept_in_eval_mode_still_learns_its_state():
    """Batch norms are often frozen so, inside a model that trains."""
    layer = nn.Identity().eval()
    boundary = attach(layer, "kmeans:bits=2")
    layer(values(6, 16).requires_grad_())
    assert boundary.forward.state.centroids is not None


# NaN and Inf


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38 * 2])
@pytest.mark.parametrize("spec", SPECS)
def test_nonfinite_values_pass_uncompressed_and_are_counted(bad, spec):
    layer = nn.Identity().train()
    boundary = attach(layer, spec, spec)
    twin = attach(nn.Identity(), spec, spec)
    x, g = values(4, 16), values(4, 16, seed=1)
    x[1, 2], g[3, 1] = bad, bad
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(g)
    assert torch.equal(y.detach().nan_to_num(nan=7), x.nan_to_num(nan=7))
    assert torch.equal(leaf.grad.nan_to_num(nan=7), g.nan_to_num(nan=7))
    for channel in (boundary.forward, boundary.backward):
        assert (meter(channel).nonfinite, meter(channel).calls) == (1, 1)
        assert meter(channel).raw_bytes == meter(channel).payload_bytes == 256
        assert meter(channel).samples == 0
    # The state has not seen it: the next value is that of a fresh boundary.
    x = values(4, 16, seed=2)
    assert torch.equal(boundary.forward(x), twin.forward(x))
    assert meter(boundary.forward).nonfinite == 1


def test_nonfinite_raise_names_the_layer_and_the_direction():
    layer = nn.Identity().train()
    attach(layer, "block:bits=4", nonfinite="raise")
    x = values(4, 16)
    layer(x)
    bad = x.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"the\.layer/forward: NaN, Inf .* shape \(4, 16\).*nonfinite='pass'"):
        layer(bad)
    y = layer(x.requires_grad_())
    with pytest.raises(FloatingPointError, match="the.layer/backward"):
        y.backward(bad)


# Metering


def test_bytes_and_errors_by_hand():
    codec = parse_codec("block:bits=4,group=16")
    layer = nn.Identity().train()
    boundary = attach(layer, str(codec), meter_every=2)
    xs = [values(4, 16, seed=s) for s in range(3)]
    ys = [layer(x) for x in xs]
    record = meter(boundary.forward).record()
    assert (record["calls"], record["raw_bytes"]) == (3, 3 * 64 * 4)
    assert record["payload_bytes"] == 3 * codec.encode(xs[0]).nbytes == 3 * (64 // 2 + 4 * 4)
    assert record["ratio"] == pytest.approx(256 / 48)
    sampled = [((y - x).norm() / x.norm()).item() for x, y in ((xs[0], ys[0]), (xs[2], ys[2]))]
    assert record["rel_error"] == pytest.approx(sum(sampled) / 2, rel=1e-5)
    cosines = [torch.cosine_similarity(xs[i].flatten(), ys[i].flatten(), dim=0).item() for i in (0, 2)]
    assert record["cosine"] == pytest.approx(sum(cosines) / 2, rel=1e-5)
    assert meter(boundary.backward).record() == Meter().record()


def make_layouts():
    base = values(40, 64, 24)
    return {
        "contiguous": base,
        "transposed": base.transpose(0, 2),
        "channels_last": values(8, 16, 20, 20).to(memory_format=torch.channels_last),
        "sliced": values(40, 64, 50)[:, :, ::2],
        "sliced and transposed": values(40, 64, 50)[:, :, ::2].transpose(1, 2),
        "expanded": values(40, 1, 24).expand(40, 64, 24),
        "expanded from one value": torch.tensor(2.0).expand(40, 64, 24),
    }


@pytest.mark.parametrize("layout", make_layouts())
def test_the_error_compares_the_same_places_in_any_layout(layout):
    """The gradient of a sum over tokens is an expanded tensor, with strides of zero."""
    x = make_layouts()[layout]
    assert x.numel() > 1 << 14
    channel = metered("identity")
    assert torch.equal(channel(x), x)
    assert meter(channel).record()["rel_error"] == 0
    channel = metered("uniform:bits=3")
    y = channel(x)
    exact = ((y - x).double().norm() / x.double().norm()).item()
    assert meter(channel).record()["rel_error"] == pytest.approx(exact, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("spec", STATEFUL)
def test_metering_changes_no_value(spec):
    def run(every):
        layer = nn.Identity().train()
        boundary = attach(layer, spec, spec, meter_every=every)
        outputs = []
        for step in range(3):
            x = values(6, 16, seed=step).requires_grad_()
            y = layer(x)
            y.backward(x.detach())
            outputs += [y.detach(), x.grad]
        return outputs, meter(boundary.forward)

    (never, silent), (always, loud) = run(0), run(1)
    assert (silent.samples, loud.samples) == (0, 3)
    assert silent.payload_bytes == loud.payload_bytes
    assert all(torch.equal(a, b) for a, b in zip(never, always, strict=True))


# What is training


def states(handle):
    return {name: entry["state"] for name, entry in handle.state_dict().items()}


def generated(model, ids):
    torch.manual_seed(0)
    return model.generate(ids, max_new_tokens=4, do_sample=True, pad_token_id=0)


def test_generate_in_train_mode_is_evaluation():
    """With evaluate="off" it is exact, and it never changes the codecs' states; training goes on compressed."""
    model, batch = build("t5").train(), batch_of("t5")
    plain = generated(model, batch["input_ids"])
    for evaluate in ("off", "on"):
        config = ActCompressConfig("ef+uniform:bits=1", last=0, evaluate=evaluate)
        with compress_model(model, config) as handle:
            loss_of(model, batch).backward()
            trained = copy.deepcopy(states(handle))
            found = generated(model, batch["input_ids"])
            assert torch.equal(found, plain) == (evaluate == "off")
            torch.testing.assert_close(states(handle), trained, rtol=0, atol=0)
            calls = {row["calls"] for row in handle.stats() if row["direction"] == "forward"}
            assert (calls == {1}) == (evaluate == "off")


@pytest.mark.parametrize("segments", [1, 2])
def test_reentrant_checkpointing_is_training(segments):
    """Its forward pass runs without gradients, and several layers at once."""
    model, (x, y) = stack(segments=segments, reentrant=True, dropout=0.0).train(), points()
    config = ActCompressConfig("uniform:bits=1", first=4, last=0, evaluate="off")
    losses = []
    for _ in range(2):
        with compress_model(model, config, example_inputs=x) as handle:
            losses.append(nn.functional.cross_entropy(model(x), y))
            losses[-1].backward()
            assert all(row["calls"] == 1 for row in handle.stats())
        model.segments = 0
    assert torch.equal(*losses)


class Convert(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize("make", [
    lambda x: x.to(torch.complex64), lambda x: x.to(torch.float8_e4m3fn), lambda x: x.to_sparse(),
    lambda x: torch.nested.nested_tensor([x, x[:2]]),
    lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged),
])  # fmt: skip
def test_what_no_codec_takes_is_refused_with_its_name_and_passes_where_evaluation_is_off(make):
    layer = Convert(make).train()
    attach(layer, "block:bits=4", evaluate=False)
    with pytest.raises(ValueError, match=r"the\.layer: the output is a .*Choose other layers.*evaluate='off'"):
        layer(values(4, 8))
    layer.eval()(values(4, 8))


# Measurements


@pytest.mark.parametrize("spec", STATEFUL)
def test_isolated_works_on_copies_and_tells_other_listeners(spec):
    def run(measure):
        layer, outputs, seen = nn.Identity().train(), [], []
        boundary = attach(layer, spec, spec)
        for step in range(3):
            x = values(6, 16, seed=step).requires_grad_()
            if measure:
                with boundary.isolated(seen.append):
                    layer(values(6, 16, seed=step).requires_grad_()).backward(x.detach())
            y = layer(x)
            y.backward(x.detach())
            outputs += [y.detach(), x.grad]
        return outputs, meter(boundary.forward), seen

    (plain, counted, _), (measured, other, events) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
    assert counted.calls == other.calls == 3 and counted.error == other.error
    assert [(e.site, e.name, e.direction) for e in events[:2]] == [
        ("boundary", "the.layer", "forward"), ("boundary", "the.layer", "backward"),
    ]  # fmt: skip
    assert torch.equal(events[0].decode(), plain[0]) and events[0].raw_bytes == 6 * 16 * 4 > events[0].payload_bytes


def test_candidates_replace_the_codecs_for_a_while():
    layer = nn.Identity().train()
    boundary, seen = attach(layer, "uniform:bits=1", "uniform:bits=1"), []
    boundary.enabled = False
    with boundary.candidates(seen.append) as channels:
        x = values(6, 16).requires_grad_()
        layer(x).backward(x.detach())
        assert torch.equal(x.grad, x) and not seen
        channels["backward"].codec = parse_codec("kmeans:bits=1")
        first, second = (torch.autograd.grad(layer(x), x, values(6, 16, seed=1))[0] for _ in range(2))
        assert torch.equal(first, second) and first.unique().numel() == 2
        assert [event.direction for event in seen] == ["backward", "backward"]
    assert not boundary.enabled and str(boundary.backward.codec) == "uniform:bits=1"
    assert meter(boundary.backward).calls == 0
