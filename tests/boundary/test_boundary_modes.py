"""A boundary without gradients, in evaluation, with NaN and Inf."""

import copy

import pytest
import torch
from helpers import batch_of, build, loss_of, points, stack
from helpers.boundaries import STATEFUL, attach, meter, values
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.codecs import parse_codec

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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", ["identity", "uniform:bits=3", "block:bits=4,group=16", "float8"])
def test_nan_and_inf_come_out_as_nan_and_are_counted(bad, spec):
    layer = nn.Identity().train()
    boundary = attach(layer, spec, spec)
    x, g = values(4, 16), values(4, 16, seed=1)
    x[1, 2], g[3, 1] = bad, bad
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(g)
    rows = 1 if spec.startswith("block") else 4  # a group is a row
    for found, given, row in ((y.detach(), x, 1), (leaf.grad, g, 3)):
        if spec == "identity":
            assert torch.equal(found.nan_to_num(nan=7), given.nan_to_num(nan=7))
        else:
            assert found[row].isnan().all() and found.isnan().all(1).sum() == rows and found.isnan().sum() == 16 * rows
    for channel in (boundary.forward, boundary.backward):
        counts = meter(channel).counts()
        assert (counts.nonfinite, counts.calls, counts.samples) == (1, 1, 0)
        assert counts.payload_bytes == channel.codec.payload_nbytes((4, 16), torch.float32)
    assert not boundary.forward(values(4, 16, seed=2)).isnan().any()
    assert meter(boundary.forward).counts().nonfinite == 1


def test_what_a_measurement_finds_is_not_counted():
    layer = nn.Identity().train()
    boundary, bad = attach(layer, "block:bits=4", nonfinite="raise"), values(4, 16) * float("nan")
    with boundary.isolated():
        layer(bad)
    assert meter(boundary.forward).counts().nonfinite == 0
    layer(values(4, 16))


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
