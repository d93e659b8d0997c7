"""Rotated groups: the scales, the levels, the distortion of the theory, and values that are right on average."""

import pytest
import torch

from hf_actcompress.codecs import Block, Rotated
from hf_actcompress.ops.gaussian import gauss_distortion, gauss_levels
from hf_actcompress.ops.hadamard import signs


def sample(shape, seed=0, offset=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset


def test_a_group_by_hand():
    """Mean and deviation in bf16; the rotated values go to the nearest level, stretched to be right on average."""
    codec, x = Rotated(3, group=32), sample((1, 32), offset=0.3)  # one group: nothing to allocate
    payload = codec.encode(x)
    (center, spread), = payload.tensors["scales"].double().tolist()
    assert center == float(x.mean().bfloat16())
    exact = float((x.double() - center).pow(2).mean().sqrt())
    assert exact * (1 - 1e-6) <= spread <= exact * (1 + 2.0**-7)
    sign = torch.tensor([[(-1.0) ** (i & j).bit_count() for i in range(32)] for j in range(32)]).double()
    matrix = sign * signs(32, torch.device("cpu")).double()
    levels = torch.tensor(gauss_levels(3)).double() * spread
    turned = matrix @ (x[0].double() - center)
    nearest = levels[(turned[:, None] - levels).abs().argmin(1)] / (1 - gauss_distortion(3))
    torch.testing.assert_close(codec.decode(payload)[0].double(), matrix.T @ nearest + center, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_distortion_of_the_theory(bits):
    x = sample((1000, 512))
    least = gauss_distortion(bits)
    error = float((Rotated(bits, group=512).roundtrip(x) - x).pow(2).mean())
    assert error == pytest.approx(least / (1 - least), rel=0.05)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_nothing_shrinks(bits):
    """The decoded tensor's product with the original is the original's square; least squares would lose the error."""
    x = sample((200, 128))
    y = Rotated(bits).roundtrip(x).double()
    assert float((x.double() * y).sum() / x.double().square().sum()) == pytest.approx(1, rel=1e-2)


def test_rotation_helps_where_there_are_outliers():
    x = sample((64, 128))
    x[:, 7] *= 60
    plain, rotated = (float((c.roundtrip(x) - x).pow(2).mean()) for c in (Block(4), Rotated(4)))
    assert rotated < plain / 3
