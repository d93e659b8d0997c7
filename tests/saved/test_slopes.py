"""Slopes of activation functions in few bits, against autograd."""

import pytest
import torch
from torch.nn import functional as F

from hf_actcompress.codecs.rounding import RoundingState
from hf_actcompress.saved.slopes import SLOPES, decode_slopes, encode_slopes, extreme, places

FUNCTIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}


def slope(name, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[name](x).sum(), x)[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_formulas_are_those_of_torch(name):
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    expected = torch.tensor([SLOPES[name](float(v)) for v in x], dtype=torch.float64)
    assert torch.allclose(expected, slope(name, x), atol=1e-6)
    assert float(slope(name, x).amax()) <= SLOPES[name](extreme(name)) + 1e-9


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_levels_are_equally_spaced_and_cover_every_slope(name, bits):
    found = slope(name, torch.tensor(places(name, bits), dtype=torch.float64))
    steps = found.diff()
    assert len(found) == 2**bits and torch.allclose(steps, steps.mean().expand_as(steps), atol=1e-6)
    everywhere = slope(name, torch.linspace(-9, 9, 10_001, dtype=torch.float64))
    assert found[0] <= everywhere.amin() + 1e-6 and found[-1] >= everywhere.amax() - 1e-6


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_a_slope_comes_back_as_a_neighbouring_level_and_on_average_as_itself(name, dtype, bits):
    torch.manual_seed(0)
    x, state = (torch.randn(5, 77) * 2).to(dtype), RoundingState("here")
    exact, total = slope(name, x.double()), 0
    levels = slope(name, torch.tensor(places(name, bits), dtype=torch.float64))
    width = float(levels[1] - levels[0])
    for _ in range(400):
        codes = encode_slopes(x, name, bits, state)
        assert codes.dtype == torch.uint8 and codes.numel() == -(-x.numel() // 8) * bits
        y = decode_slopes(codes, tuple(x.shape), dtype, name, bits)
        assert y.dtype == dtype
        found = slope(name, y.double())
        tolerance = 0.01 if dtype == torch.bfloat16 else 1e-4
        assert ((found - exact).abs() <= width + tolerance).all()
        total = total + found
    assert ((total / 400 - exact).abs() < 4.5 * width / 2 / 20 + tolerance).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernels_and_plain_torch_differ_in_hardly_a_code(name, monkeypatch):
    """Libraries of functions differ in their last bits, and a slope may lie at the edge of two codes."""
    x, found = torch.randn(300, 1000) * 2, []
    for policy in ("0", "1"):
        monkeypatch.setenv("HF_ACTCOMPRESS_KERNELS", policy)
        found.append(encode_slopes(x, name, 8, RoundingState("here")))
    assert (found[0] != found[1]).float().mean() < 1e-3
