"""Gradients with compressed saved tensors: exact where they must be, near elsewhere."""

import copy
import math

import pytest
import torch
from helpers import TEXT_MODELS, batch_of, build, differing, hooks_on, train_steps
from helpers.saved import backward_of, gradients, only
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_actcompress import compress_model

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


@pytest.mark.parametrize("saves", [F.relu, lambda x: F.relu(x + 0, inplace=True), lambda x: x.relu()])
def test_functional_rectifiers_are_rectifiers(saves):
    """The operation decides, whatever called it."""
    x = torch.randn(40, 64)
    y, grad, record = backward_of(saves, x, "block:bits=8")
    assert torch.equal(y, F.relu(x)) and torch.equal(grad, (x > 0).float()) and record.payload_bytes == 40 * 64 // 8


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
    assert record.payload_bytes == x.numel() // 4 * width  # of the input only the shape is needed


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
    with compress_model(layers, only(f"block:bits={bits},round=stochastic")):
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

    with compress_model(model, only("block:bits=2,round=stochastic")) as handle:
        first, second = grad(handle), grad(handle)
        state = handle.state_dict()
        third = grad(handle)
    assert not torch.equal(first, second)
    with compress_model(model, only("block:bits=2,round=stochastic")) as handle:
        assert not handle.load_state_dict(copy.deepcopy(state))
        assert torch.equal(grad(handle), third)
    with compress_model(model, only("block:bits=3,round=stochastic")) as handle:
        assert handle.load_state_dict(state) == ["saved"]


@pytest.mark.parametrize("make", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, nn.Mish, lambda: ACT2FN["gelu"]])
def test_what_an_activation_makes_of_a_kept_input_is_made_again(make):
    """Its input in codes serves its slope and its output, which the layer after it needs."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), make(), nn.Linear(64, 64)), torch.randn(64, 64)
    model(x).square().sum().backward()
    expected, errors = gradients(model), {}
    for bits in (2, 4, 8):
        with compress_model(model, only(f"block:bits={bits}")) as handle:
            model.zero_grad()
            model(x).square().sum().backward()
            held = {row["kept"]: row["held_bytes"] for row in handle.report() if row["operation"] == "Addmm"}
        errors[bits] = float((gradients(model) - expected).norm() / expected.norm())
        assert held["made again"] == 0
    assert errors[8] < 0.01 and errors[4] < 0.2 and errors[8] < errors[4] < errors[2] < 1
