"""What is made again in backward: the values of the first run, up to the codes that they are made from."""

import pytest
import torch
from helpers.saved import only
from torch import nn
from torch.nn import functional as F

from hf_actcompress import compress_model
from hf_actcompress.saved.again import MAKERS

from .test_rules import FUNCTIONS, image

pytestmark = pytest.mark.usefixtures("small_tensors")

WEIGHT, BIAS = torch.randn(64), torch.randn(64)
MORE = {
    "FusedRmsNormBackward0": lambda x: F.rms_norm(3 * x, (64,), WEIGHT),
    "ToCopyBackward0": lambda x: (x * x.flip(0)).to(torch.bfloat16),
    "NativeDropoutBackward0": lambda x: torch.native_dropout(F.gelu(x), 0.4, True)[0],
    "ViewBackward0": lambda x: F.gelu(x).view(32, 128).to(torch.bfloat16),
    "ReshapeAliasBackward0": lambda x: torch.ops.aten._reshape_alias(F.gelu(x), (32, 128), (128, 1)),
    "CloneBackward0": lambda x: F.gelu(x).clone(),
    "UnsafeViewBackward0": lambda x: torch.ops.aten._unsafe_view(F.gelu(x), (32, 128)),
    "NativeLayerNormBackward0": lambda x: F.layer_norm(5 * x + 100, (64,), WEIGHT, BIAS),
}
# Their parameters have to be known: see the tests of norms.
CHANNELS = {"NativeBatchNormBackward0", "NativeGroupNormBackward0"}
MADE = sorted(name for name in MAKERS if name in {*FUNCTIONS, *MORE} - CHANNELS)


class Then(nn.Module):
    """A function of x, and a linear layer that takes its result."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.modules_, self.weight = function, nn.ModuleList(modules), None

    def forward(self, x):
        y = self.function(x * 1.0, *self.modules_).contiguous()
        if self.weight is None:
            self.weight = nn.Parameter(torch.randn(y.shape[-1], 8, dtype=y.dtype))
        return y.reshape(-1, y.shape[-1]) @ self.weight  # the gradient of the weight needs y


def both(model, x, spec="block:bits=8", leave=True):
    """Gradients of x and the weights, exactly and coded; and the report."""
    found, report = [], None
    for codec in (None, spec):
        torch.manual_seed(1)
        x = x.detach().clone().requires_grad_()
        model.zero_grad()

        def run(x=x):
            y = model(x)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
            return torch.cat([p.grad.flatten() for p in (x, *model.parameters()) if p.grad is not None])

        if codec is None:
            found.append(run())
        else:
            with compress_model(model, only(codec)) as handle:
                found.append(run())
                report = handle.report()
    return *found, report


def assert_made_again(model, x, made=True, limit=0.02):
    exact, found, report = both(model, x)
    assert bool([row for row in report if row["kept"] == "made again"]) == made, report
    assert (found - exact).norm() < limit * exact.norm()


def test_every_operation_that_a_cpu_has_is_tried():
    here = {name for name in MAKERS if not any(word in name for word in ("Cudnn", "Miopen", "Legit"))}
    here -= {f"ScaledDotProduct{kind}AttentionBackward0" for kind in ("Flash", "Efficient")}
    assert here - CHANNELS == set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_results_are_made_again(name):
    torch.manual_seed(0)
    function = MORE.get(name) or FUNCTIONS[name]
    if any(word in name for word in ("Relu", "Hardtanh", "Hardsigmoid")):  # these keep sides of a bound
        assert_made_again(Then(function), torch.randn(64, 64), made=False)
        assert_made_again(Then(lambda x: function(F.gelu(x))), torch.randn(64, 64))
    else:
        assert_made_again(Then(function), torch.randn(64, 64), limit=0.05)


@pytest.mark.parametrize("dim", [-1, -2, 0, 1])
def test_dimensions_that_count_from_the_end(dim):
    torch.manual_seed(0)
    assert_made_again(Then(lambda x: F.glu(x, dim)), torch.randn(64, 64))


@pytest.mark.parametrize("change", [
    lambda x: x.t().mul_(x.flip(0)).t(), lambda x: F.gelu(x.t()).t(), lambda x: x.t().contiguous().mul_(x).t(),
    lambda x: image(x).to(memory_format=torch.channels_last).mul_(image(x)).reshape(64, 64),
    lambda x: F.gelu(image(x)).to(torch.bfloat16, memory_format=torch.channels_last).permute(0, 2, 3, 1),
    lambda x: F.silu(image(x).to(memory_format=torch.channels_last)).permute(0, 2, 3, 1).reshape(-1, 8),
])  # fmt: skip
def test_other_strides(change):
    torch.manual_seed(0)
    exact, found, _ = both(Then(change), torch.randn(64, 64))
    assert (found - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8)])
@pytest.mark.parametrize("frozen", [(), ("bias",), ("weight",), ("weight", "bias")])
def test_norms_with_frozen_parts(norm, frozen):
    torch.manual_seed(0)
    for name, p in norm.named_parameters():
        p.data.normal_()
        p.requires_grad_(name not in frozen)
    model = Then(lambda x, norm: F.conv2d(norm(image(x)), FILTER), norm.train())
    assert_made_again(model, torch.randn(64, 64), made="bias" not in frozen)


FILTER = torch.randn(4, 8, 3, 3, requires_grad=True)


def test_backward_under_autocast():
    """What is made again is not cast once more."""
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert_made_again(Then(lambda x: F.layer_norm(F.gelu(x), (64,), WEIGHT, BIAS)), torch.randn(64, 64))


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish, nn.ReLU, nn.ReLU6])
def test_an_activation_in_place_holds_no_more(activation):
    """It saves a clone of its input, which is made again as the input is."""
    torch.manual_seed(0)
    held = []
    for inplace in (False, True):
        model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), activation(inplace=inplace), nn.Conv2d(8, 8, 1))
        x = torch.randn(4, 8, 16, 16)
        exact, found, report = both(model, x)
        assert (found - exact).norm() < 0.05 * exact.norm()
        held.append(sum(row["held_bytes"] for row in report))
    assert held[1] <= held[0]
