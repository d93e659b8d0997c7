
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.ops.gaussian import gauss_distortion, gauss_levels
from hf_actcompress.ops.scales import ceil16, floor16


@pytest.mark.parametrize(
    "bits, positive, distortion",
    # J. Max, 1960, table I
    [(1, [0.7980], 0.3634), (2, [0.4528, 1.510], 0.1175), (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
     (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497)],
)  # fmt: skip
def test_the_published_table(bits, positive, distortion):
    levels = gauss_levels(bits)
    assert levels[2 ** (bits - 1) :] == pytest.approx(positive, rel=2e-3)
    assert levels == tuple(-v for v in reversed(levels))
    assert gauss_distortion(bits) == pytest.approx(distortion, rel=2e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_each_level_is_the_mean_of_its_cell_and_the_distortion_follows(bits):
    levels = torch.tensor(gauss_levels(bits), dtype=torch.float64)
    x = torch.linspace(-9, 9, 1_800_001, dtype=torch.float64)
    mass = torch.exp(-(x**2) / 2)
    mass /= mass.sum()
    cell = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
    total = torch.zeros_like(levels).scatter_add(0, cell, mass)
    mean = torch.zeros_like(levels).scatter_add(0, cell, mass * x) / total
    assert torch.allclose(mean, levels, rtol=0, atol=0.02 * float(torch.diff(levels).min()))
    error = float((mass * (x - levels[cell]) ** 2).sum())
    assert gauss_distortion(bits) == pytest.approx(error, rel=0.03)


@given(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127))
def test_16_bit_scales_are_the_nearest_on_their_side(value):
    x = torch.tensor([value])
    low, high = floor16(x), ceil16(x)
    for v in (low, high):
        assert torch.equal(v, v.bfloat16().float())
    assert low <= x <= high
    if x.bfloat16().float() == x:
        assert low == x == high
    else:  # neighbours
        between = torch.tensor([(low.double() + high.double()) / 2]).bfloat16().float()
        assert low < high and between in (low, high)
