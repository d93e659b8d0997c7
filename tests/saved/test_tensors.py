"""Gradients with compressed saved tensors: exact where they must be, right on average elsewhere."""

import copy
import math

import pytest
import torch
from helpers import TEXT_MODELS, batch_of, build, differing, hooks_on, train_steps
from helpers.saved import backward_of, gradients, only
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_actcompress import compress_model, parse_codec

pytestmark = pytest.mark.usefixtures("small_tensors")


# Exactness


@pytest.mark.parametrize("name", [*TEXT_MODELS, "vit", "t5", "mobilenetv2_100", "resnet18", "convnext_atto"])
def test_identity_changes_no_bit(name):
    model, batches = build(name), [batch_of(name, seed) for seed in range(2)]
    plain = train_steps(copy.deepcopy(model), batches)
    with compress_model(model, only("identity")) as handle:
        assert not differing(plain, train_steps(model, batches))
        assert handle.meters["saved"].calls == 2 and handle.meters["saved"].raw_bytes > 0
    assert not hooks_on(model)


def test_forward_values_stay_and_gradients_do_not():
    """Else the test above could pass with hooks that never run."""
    model, batches = build("bert"), [batch_of("bert")]
    plain = train_steps(copy.deepcopy(model), batches, "SGD")
    with compress_model(model, only("block:bits=4")):
        changed = differing(plain, train_steps(model, batches, "SGD"))
    assert "loss" not in changed and "bert.encoder.layer.0.attention.self.query.weight" in changed


@pytest.mark.parametrize("saves", [F.relu, lambda x: F.relu(x + 0, inplace=True)])
def test_functional_rectifiers_are_values_like_others(saves):
    """Only a module says that its saved tensor is asked for its sign alone."""
    x = torch.randn(40, 64)
    y, grad, _ = backward_of(saves, x, "block:bits=8")
    assert torch.equal(y, F.relu(x)) and grad.unique().tolist() == [0, 1]


@pytest.mark.parametrize("module", [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.25)
])  # fmt: skip
def test_masks_of_rectifiers_are_exact_and_take_one_bit(module):
    x = 4 * torch.randn(40, 64)

    def plain(x):
        return module(x * 1.0)

    expected = x.clone().requires_grad_()
    plain(expected).sum().backward()
    model = nn.Sequential(module)
    x = x.requires_grad_()
    with compress_model(model, only("block:bits=2")) as handle:
        model(x * 1.0).sum().backward()
        assert handle.meters["saved"].payload_bytes == 40 * 64 // 8
    assert torch.equal(x.grad, expected.grad)


def test_rectifiers_of_one_tensor_keep_their_own_masks():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide, self.relu = nn.Hardtanh(-0.1, 0.1), nn.Hardtanh(-1.0, 1.0), nn.ReLU()

        def forward(self, x):
            y = x * 1.0
            return self.narrow(y) + self.wide(y) + self.relu(y)

    x = torch.randn(40, 64)
    x[0, 0] = math.nan
    expected, found = x.clone().requires_grad_(), x.clone().requires_grad_()
    model = Both()
    model(expected).sum().backward()
    with compress_model(model, only("block:bits=2")):
        model(found).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0, equal_nan=True)


def test_a_tensor_that_the_codec_cannot_take_is_kept():
    x = torch.randn(64, 16)
    _, grad, record = backward_of(lambda x: x.square(), x, "lowrank:rank=20")
    assert torch.equal(grad, 2 * x) and record.payload_bytes == record.raw_bytes == 64 * 16 * 4


def test_error_feedback_is_refused():
    with pytest.raises(ValueError, match="saved='ef.topk:ratio=0.1': error feedback would add.*Use 'topk:ratio=0.1'"):
        only("ef+topk:ratio=0.1")


def test_a_rectifier_between_layers_masks_exactly_though_its_values_are_coded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).double()
    x = torch.randn(64, 32, dtype=torch.float64)
    model(x).sum().backward()
    expected = model[0].bias.grad.clone()  # depends on the mask alone
    model.zero_grad()
    with compress_model(model, only("block:bits=1")):
        model(x).sum().backward()
    assert torch.equal(model[0].bias.grad, expected)


def test_dropout_is_exact():
    x, p = torch.randn(64, 64), 0.3
    y, grad, record = backward_of(lambda x: F.dropout(x, p, True), x)
    assert torch.equal(grad, torch.where(y != 0, torch.tensor(1 / (1 - p)), torch.tensor(0.0)))
    assert record.payload_bytes == 64 * 64 // 8


@pytest.mark.parametrize(("size", "width"), [(8, 1), (32, 2)])
def test_indices_of_pooling_take_the_fewest_bytes(size, width):
    x = torch.randn(4, 8, size, size)
    expected = x.clone().requires_grad_()
    F.max_pool2d(expected, 2).sum().backward()
    _, grad, record = backward_of(lambda x: F.max_pool2d(x, 2), x, "identity")
    assert torch.equal(grad, expected.grad)
    assert record.payload_bytes == x.numel() * 4 + x.numel() // 4 * width


def test_bool_masks():
    x, mask = torch.randn(32, 32), torch.rand(32, 32) > 0.5
    _, grad, record = backward_of(lambda x: x.masked_fill(mask, 0.0), x)
    assert torch.equal(grad, (~mask).float()) and record.payload_bytes == 128


# Averages


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradients_that_are_linear_in_what_was_saved_are_right_on_average(bits):
    """200 draws, within three standard errors; the multiple of the standard error is itself checked in the mean."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(6, 3, 8, 8)
    layers(x).square().sum().backward()
    expected = gradients(layers)
    draws = []
    with compress_model(layers, only(f"block:bits={bits}")):
        for _ in range(200):
            layers.zero_grad()
            layers(x).square().sum().backward()
            draws.append(gradients(layers))
    draws = torch.stack(draws).double()
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(200) + 1e-6 * expected.abs().max())
    assert draws.std(0).max() > 0
    assert error.square().mean() < 1.35  # 1 for a mean that is right
    assert (error.abs() < 3).double().mean() > 0.99


def test_every_pass_draws_fresh_noise_and_the_state_goes_on():
    torch.manual_seed(0)
    model, x = nn.Linear(32, 32), torch.randn(64, 32)

    def grad(handle):
        model.zero_grad()
        model(x).square().sum().backward()
        return gradients(model)

    with compress_model(model, only("block:bits=2")) as handle:
        first, second = grad(handle), grad(handle)
        state = handle.state_dict()
        third = grad(handle)
    assert not torch.equal(first, second)
    with compress_model(model, only("block:bits=2")) as handle:
        assert not handle.load_state_dict(copy.deepcopy(state))
        assert torch.equal(grad(handle), third)
    with compress_model(model, only("block:bits=3")) as handle:
        assert handle.load_state_dict(state) == ["saved"]


def test_rounding_is_stochastic_unless_another_is_named():
    for spec, found in {
        "block:bits=4": "block:bits=4,round=stochastic,equalize=none",
        "block:bits=4,group=64": "block:bits=4,group=64,round=stochastic,equalize=none",
        "block:bits=4,equalize=feature": "block:bits=4,round=stochastic,equalize=feature",
        "block:bits=4,round=nearest": "block:bits=4,round=nearest,equalize=none",
        "uniform:bits=4": "uniform:bits=4,round=stochastic",
    }.items():
        assert str(parse_codec(spec).for_saved()) == found
    for spec in ("rotated:bits=2", "kmeans:bits=4", "uniform:bits=4,round=nearest"):
        assert parse_codec(spec).for_saved() == parse_codec(spec)


@pytest.mark.parametrize(("module", "name"), [
    (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu"), (ACT2FN["gelu"], "gelu"),
    (ACT2FN["silu"], "silu"), (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"), (nn.ReLU(), None), (None, None),
    (ACT2FN["gelu_python"], None), (ACT2FN["gelu_new"], None),
])  # fmt: skip
def test_which_modules_ask_for_slopes(module, name):
    assert slopes_of(module) == name


@pytest.mark.parametrize("make", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, lambda: ACT2FN["gelu"]])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_through_smooth_activations_are_right_on_average(make, bits):
    """Which values in few bits, whose slopes would be taken, cannot be: that would be biased."""
    torch.manual_seed(0)
    x, model = torch.randn(8, 512) * 2, nn.Sequential(make())
    y = x.clone().requires_grad_()
    make()(y).sum().backward()
    draws = []
    with compress_model(model, only(f"block:bits={bits}")) as handle:
        for _ in range(200):
            z = x.clone().requires_grad_()
            model(z).sum().backward()
            draws.append(z.grad)
        record = handle.meters["saved"]
    assert record.payload_bytes * 8 == 200 * x.numel() * (3 if bits == 4 else bits)
    draws, name = torch.stack(draws).double(), slopes_of(make())
    least = SLOPES[name](-extreme(name))
    width = (SLOPES[name](extreme(name)) - least) / (2 ** (3 if bits == 4 else bits) - 1)
    # Not what was drawn: a slope very near a level may have been rounded to it 200 times out of 200.
    part = ((y.grad.double() - least) / width) % 1
    error = (draws.mean(0) - y.grad) / (width * (part * (1 - part) / 200).sqrt() + 1e-5)
    assert draws.std(0).max() > 0.05
    assert 0.8 < error.square().mean() < 1.25
    assert (error.abs() < 3).double().mean() > 0.98
