"""Groups with sorted limits, in every form."""

from itertools import product

import pytest
import torch
from helpers.operators import FORM_TESTS, agree, agree_in_triton, needs_triton

from hf_actcompress.ops.groups import codes_nbytes
from hf_actcompress.ops.tables import dequantize_sorted, quantile_scales, quantize_sorted, sorted_sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def data(n, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    x[::50] *= 30
    x[1::70] = 0
    x[2::90] *= 1e-42
    return x


def limits(splits, bits, sample):
    """Edges that some values hit, and scales."""
    lo = sample.float().sort().values[torch.arange(2**splits) * sample.numel() // 2**splits]
    step = torch.rand(2**splits, generator=torch.Generator().manual_seed(1)) / 2 ** (bits - splits) + 1e-6
    return lo[1:].contiguous(), torch.stack([lo, step], 1)


@pytest.mark.parametrize("compare", FORM_TESTS)
@pytest.mark.parametrize("bits, splits", [(2, 1), (4, 1), (4, 3), (5, 2), (8, 2), (8, 7), (9, 2), (12, 3), (16, 4),
                                          (1, 1), (3, 3), (4, 4), (8, 8)])  # fmt: skip
def test_forms_agree(compare, bits, splits):
    for dtype, n in product(DTYPES, (3, 141, 5003)) if compare is agree else zip(DTYPES, (3, 141, 5003), strict=True):
        x = data(n).to(dtype)
        edges, scales = limits(splits, bits, x)
        scales = scales[:, 0].contiguous() if splits == bits else scales
        codes = compare("quantize_sorted", x, edges, scales, bits, splits)
        assert codes.numel() == codes_nbytes(n, 128, bits)
        y = compare("dequantize_sorted", codes, scales, [n], dtype, bits, splits)
        assert torch.equal(compare("roundtrip_sorted", x, edges, scales, bits, splits), y)


@needs_triton
def test_the_scales_of_quantiles_in_triton():
    for dtype in DTYPES:
        sample = data(700).to(dtype).sort().values
        for scale in torch.tensor([[-100.0, 50.0], [torch.nan, torch.nan], [-3e38, 1.5e38]]):
            for bits, splits in ((8, 2), (16, 9), (4, 3)):
                agree_in_triton("quantile_scales", sample, scale, bits, splits)


@pytest.mark.parametrize("compare", FORM_TESTS)
def test_views_and_scales_that_are_not_finite(compare):
    x = data(6000)
    edges, scales = limits(2, 8, x)
    for view in (x.view(60, 100).T, x.view(2, 10, 10, 30).permute(0, 3, 1, 2), x[::2]):
        compare("quantize_sorted", view, edges, scales, 8, 2)
        y = compare("roundtrip_sorted", view, edges, scales, 8, 2)
        assert y.stride() == torch.empty_like(view).stride()
    for bad in (scales * torch.nan, scales.index_fill(0, torch.tensor([0]), torch.nan)):
        codes = compare("quantize_sorted", x, edges, bad, 8, 2)
        assert not codes.any()
        assert compare("roundtrip_sorted", x, edges, bad, 8, 2).isnan().all()
        assert compare("dequantize_sorted", codes, bad, [6000], torch.float32, 8, 2).isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_sorted_sample(dtype):
    x = data(9000).to(dtype)
    x[7], x[21] = torch.nan, torch.inf
    for view in (x, x.view(90, 100).T, x[:50]):
        for size in (100, 9000):
            found = agree("sorted_sample", view, size)
            stride = 1 if view.numel() // size <= 1 else view.numel() // size | 1
            expected = view.reshape(-1)[::stride].sort().values
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_quantiles_of_values_that_use_all_of_fp32():
    x = torch.linspace(-1, 1, 1001) * 3e38
    edges, scales = quantile_scales(sorted_sample(x, 1001), torch.stack([x.min(), x.max() / 4 - x.min() / 4]), 8, 2)
    y = dequantize_sorted(quantize_sorted(x, edges, scales, 8, 2), scales, [1001], torch.float32, 8, 2)
    assert torch.allclose(y, x, rtol=0, atol=3e38 / 250)
