"""The map: each row against the same by hand, one codec at one boundary, and nothing left behind."""

import copy

import pytest
import torch
from helpers import batch_of, build, loss_of
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model, parse_codec
from hf_actcompress.observe.sensitivity import DIRECTIONS, batches_mean, sensitivity

CODECS = [parse_codec(spec) for spec in ("identity", "uniform:bits=3", "block:bits=2,round=stochastic")]
LAYERS = [f"bert.encoder.layer.{i}" for i in range(4)]


def gradient(model, batch):
    torch.manual_seed(1)
    loss = loss_of(model, batch)
    loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters()}
    model.zero_grad()
    return float(loss.detach()), found


def flat(gradients, prefix=""):
    return torch.cat([g.flatten() for name, g in gradients.items() if name.startswith(prefix)])


def measured(model, batch, codecs=None, **options):
    with compress_model(model, ActCompressConfig("identity", first=4, last=0)) as handle:
        torch.manual_seed(1)
        return sensitivity(handle, model, (), batch, codecs or dict.fromkeys(DIRECTIONS, CODECS), **options)


def test_every_row_is_a_run_with_that_codec_alone():
    model, batch, calls = build("bert").train(), batch_of("bert"), []
    rows = measured(model, batch, advance=lambda: calls.append(1))
    assert len(rows) == len(calls) == 2 * 4 * len(CODECS)
    plain_loss, plain = gradient(copy.deepcopy(model), batch)
    for row in rows:
        name, codec = row["name"], row["codec"]
        sides = {"codec": codec, "grad_codec": "identity"}
        if row["direction"] == "backward":
            sides = {"codec": "identity", "grad_codec": codec}
        twin = copy.deepcopy(model)
        with compress_model(twin, ActCompressConfig("identity", first=0, last=0, layers={name: sides})):
            loss, found = gradient(twin, batch)
        apart = (flat(found) - flat(plain)).norm() / flat(plain).norm()
        assert row["grad_error"] == pytest.approx(float(apart), rel=1e-3, abs=1e-6)
        first, head = ("bert.embeddings.", f"{LAYERS[0]}."), ("bert.pooler", "classifier")
        parts = [first, *(f"{layer}." for layer in LAYERS[1:]), head]
        per_layer = [float((flat(found, p) - flat(plain, p)).norm() / flat(plain, p).norm()) for p in parts]
        expected = (sum(e * e for e in per_layer) / len(per_layer)) ** 0.5
        assert row["layer_error"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        if row["direction"] == "forward":
            assert (row["plain_loss"], row["loss_change"]) == pytest.approx((plain_loss, loss - plain_loss), abs=1e-6)
            assert (row["logits_error"] > 0) == (codec != "identity")
        assert (row["grad_error"] > 0) == (codec != "identity")
        assert row["layer"] == int(name[-1]) and (row["ratio"] > 7) == (codec != "identity")


@pytest.mark.parametrize("name", ["mobilenetv2_100", "vit"])
def test_nothing_is_left_behind(name):
    model, batch = build(name).train(), batch_of(name)
    if not isinstance(batch, dict):
        model, batch = _Named(model), {"x": batch[0], "labels": batch[1]}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    example = {key: value for key, value in batch.items() if key != "labels"}
    config = ActCompressConfig("ef+kmeans:bits=2", first=2, last=1, saved="block:bits=4")
    with compress_model(model, config, example_inputs=example) as handle:
        torch.manual_seed(3)
        rows = sensitivity(handle, model, (), batch, {"forward": CODECS[:2], "backward": CODECS[1:]})
        drawn = torch.rand(1)
        assert all(row["calls"] == 0 for row in handle.stats())
        assert all(c.state.error is None for name in handle.boundaries for _, c in handle.channels(name))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1)) and len(rows) == 12
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    exact = [row for row in rows if row["codec"] == "identity"]
    assert exact and all(row["grad_error"] == 0 for row in exact)


class _Named(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, labels=None):
        logits = self.inner(x)
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_activation_checkpointing_gives_the_same():
    model, batch = build("bert").train(), batch_of("bert")
    plain = measured(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert measured(model, batch) == plain


def test_nan_gives_none():
    model, batch = build("bert").train(), batch_of("bert")
    model.bert.encoder.layer[0].output.LayerNorm.bias.data[0] = float("nan")
    assert all(row["grad_error"] is None and row["layer_error"] is None for row in measured(model, batch))


def test_the_mean_of_batches():
    one = {"layer": 3, "name": "a", "codec": "x", "grad_error": 3.0, "loss_change": 1.0, "bias": None}
    other = {**one, "grad_error": 4.0, "loss_change": -2.0}
    (mean,) = batches_mean([[one], [other]])
    assert mean == {**one, "grad_error": pytest.approx(12.5**0.5), "loss_change": -0.5}
    (mean,) = batches_mean([[one], [{**other, "grad_error": None, "bias": 2.0}]])
    assert (mean["grad_error"], mean["bias"]) == (3.0, 2.0)
