"""Patches as frequencies: an orthogonal transform, and less error for the same bits where pixels are alike."""

import math

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.codecs.transforms.patches import cosines, from_frequencies, patch_size, to_frequencies

CPU = torch.device("cpu")


@pytest.mark.parametrize(("shape", "size"), [
    ((2, 3, 8, 8), 2), ((2, 3, 9, 15), 3), ((1, 1, 7, 7), 7), ((1, 1, 11, 11), 1), ((2, 3, 8, 9), 1), ((4, 8), 1),
    ((0, 3, 8, 8), 1), ((2, 3, 1, 1), 1),
])  # fmt: skip
def test_patch_sizes(shape, size):
    assert patch_size(shape) == size


@pytest.mark.parametrize("k", range(2, 9))
def test_the_basis_is_orthogonal_and_ordered_by_frequency(k):
    basis = cosines(k, CPU).double()
    torch.testing.assert_close(basis @ basis.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(basis[0], torch.full((k,), 1 / math.sqrt(k), dtype=torch.float64))
    assert [int((row.sign().diff() != 0).sum()) for row in basis] == list(range(k))


def test_frequencies_are_what_the_definition_says():
    x = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(0))
    flat = to_frequencies(x, 3).view(3, 3, 3, 2, 2, 3)
    basis = cosines(3, CPU)
    for b, c, h, w in ((0, 0, 0, 0), (1, 2, 1, 2), (0, 1, 1, 1)):
        patch = x[b, c, 3 * h : 3 * h + 3, 3 * w : 3 * w + 3]
        torch.testing.assert_close(flat[c, :, :, b, h, w], basis @ patch @ basis.T)
    torch.testing.assert_close(from_frequencies(flat.reshape(-1), (2, 3, 6, 9), 3), x)


@pytest.mark.parametrize("bits", [2, 3])
def test_smooth_images_lose_less(bits):
    noise = torch.randn(8, 16, 24, 24, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    codec = parse_codec(f"rotated:bits={bits}")
    rough = noise * smooth.std()
    lost = {name: float((codec.roundtrip(x) - x).square().mean()) for name, x in {"s": smooth, "r": rough}.items()}
    assert lost["s"] < 0.5 * lost["r"]


@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (4, 64, 14, 14), (1, 3, 4, 4), (2, 5, 6, 9)])
@pytest.mark.parametrize("spec", ["rotated:bits=2", "rotated:bits=4", "trellis:bits=2"])
@pytest.mark.parametrize("value", [3.3, -1e-3, 2.0**40])
def test_constant_images_stay_constant(shape, spec, value):
    """Their lowest frequency is not left in a group with the others, which are all 0."""
    x = torch.full(shape, value)
    torch.testing.assert_close(parse_codec(spec).roundtrip(x), x, rtol=1e-5, atol=0)
