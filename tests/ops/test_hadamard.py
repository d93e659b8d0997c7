import pytest
import torch

from hf_actcompress.ops.hadamard import butterflies, rotate, signs, sum_of_halves


def random_sign(i):
    h = (i + 1) * 0x9E3779B9 & 0xFFFFFFFF
    h = (h ^ (h >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    h = (h ^ (h >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return 1.0 if (h >> 16) & 1 else -1.0


def slow(rows):
    """Signs, then the butterfly level by level, in fp64."""
    n, h = rows.shape[1], 1
    x = rows.double() * torch.tensor([random_sign(i) for i in range(n)]).double()
    while h < n:
        for start in range(0, n, 2 * h):
            a, b = x[:, start : start + h].clone(), x[:, start + h : start + 2 * h].clone()
            x[:, start : start + h], x[:, start + h : start + 2 * h] = a + b, a - b
        h *= 2
    return x / n**0.5


@pytest.mark.parametrize("n", [1, 2, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_equals_signs_and_butterfly(n):
    rows = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(rotate(rows).double(), slow(rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", [2, 16, 32, 128, 256, 1024, 2048, 8192])
def test_is_orthogonal_and_inverted(n):
    rows = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    turned = rotate(rows)
    assert turned.shape == rows.shape and turned.dtype == torch.float32
    torch.testing.assert_close(butterflies(turned) * signs(n, turned.device), rows, rtol=0, atol=2e-5)
    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1))


def test_a_large_group_needs_no_square_matrix():
    rows = torch.zeros(1, 2**17)
    rows[0, 5] = 1
    assert torch.allclose(rotate(rows).abs(), torch.full_like(rows, 2.0**-8.5))


def test_signs_are_those_of_the_hash_whatever_the_default_dtype():
    signs.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        found = signs(64, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and (8 * found).tolist() == [random_sign(i) for i in range(64)]


def test_sums_add_the_second_half_to_the_first():
    """In this order 1 survives next to 2**25."""
    assert sum_of_halves(torch.tensor([[2.0**25, 1, -(2.0**25), 0]])).item() == 1
    assert sum_of_halves(torch.tensor([[2.0**25, -(2.0**25), 1, 0]])).item() == 0


def test_smooth_rows_are_spread_too():
    """Without signs the transform gathers a ramp in few coefficients."""
    ramp = torch.linspace(-1, 1, 128)[None]
    turned = rotate(ramp)
    assert turned.abs().max() / turned.pow(2).mean().sqrt() < 4
