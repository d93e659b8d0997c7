import pytest
import torch

from hf_actcompress.codecs.hadamard import hadamard


def slow(rows):
    """The butterfly, level by level, in fp64."""
    x, h, n = rows.double().clone(), 1, rows.shape[1]
    while h < n:
        for start in range(0, n, 2 * h):
            a, b = x[:, start : start + h].clone(), x[:, start + h : start + 2 * h].clone()
            x[:, start : start + h], x[:, start + h : start + 2 * h] = a + b, a - b
        h *= 2
    return x / n**0.5


@pytest.mark.parametrize("n", [1, 2, 8, 128, 1024, 2048, 8192])
def test_equals_the_butterfly_and_is_its_own_inverse(n):
    rows = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    turned = hadamard(rows)
    assert turned.shape == rows.shape and turned.dtype == torch.float32
    torch.testing.assert_close(turned.double(), slow(rows), rtol=0, atol=2e-5)
    torch.testing.assert_close(hadamard(turned), rows, rtol=0, atol=2e-5)
    torch.testing.assert_close(turned.norm(dim=1), rows.norm(dim=1))


def test_a_large_group_needs_no_square_matrix():
    rows = torch.zeros(1, 2**17)
    rows[0, 5] = 1
    assert torch.allclose(hadamard(rows).abs(), torch.full_like(rows, 2.0**-8.5))
