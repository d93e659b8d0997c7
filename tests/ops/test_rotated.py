"""Rotated groups: C++ gives the bits of the definition, and what becomes of values that are not finite."""

import pytest
import torch
from helpers.operators import agree, agree_in_triton, needs_compiler, needs_triton

from hf_actcompress.ops import allocation
from hf_actcompress.ops.ranges import feature_scales
from hf_actcompress.ops.rotated import codes_nbytes, dequantize_rotated, quantize_rotated

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def data(shape=(150, 40), dtype=torch.float32, strange=True):
    """Rows of different size; a constant one, one of zeros and a tiny one; NaN and Inf."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, shape[0])[:, None]
    x[10], x[11] = 0, 5
    x[12] *= 1e-40
    if strange:
        x[20, 3], x[30, 1] = torch.nan, torch.inf
    return x.to(dtype)


def check(x, features, cols, bits, paths):
    inner = x.shape[2] * x.shape[3] if x.dim() == 4 else 1
    codes, scales = agree("quantize_rotated", x, features, inner, cols, bits, paths, "count")
    assert codes.numel() == codes_nbytes(x.numel(), cols, bits)
    y = agree("dequantize_rotated", codes, scales, features, inner, list(x.shape), x.dtype, cols, bits, paths)
    assert torch.equal(y.isnan(), agree("roundtrip_rotated", x, features, inner, cols, bits, paths, "count").isnan())
    return y


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paths, cols, bits", [
    (False, 128, 1), (False, 128, 2), (False, 16, 3), (False, 256, 4), (False, 1024, 6), (False, 32, 8),
    (True, 16, 1), (True, 32, 2), (True, 16, 4), (True, 16, 8),
])  # fmt: skip
def test_forms_agree(dtype, paths, cols, bits):
    x = data(dtype=dtype)
    for features in (None, feature_scales(x)):
        check(x, features, cols, bits, paths)


@needs_compiler
def test_views_images_and_several_windows():
    x = data((1100, 40))
    check(x.T, None, 32, 2, False)
    check(x[:, ::3], None, 32, 2, False)
    check(x, None, 16, 2, True)
    image = torch.randn(4, 6, 30, 10, generator=torch.Generator().manual_seed(1))
    check(image.to(memory_format=torch.channels_last), feature_scales(image), 128, 2, False)
    for n in (1, 7, 16, 17, 129):
        check(torch.linspace(-1, 2, n), None, 16, 3, n == 129)


@needs_compiler
@pytest.mark.parametrize("unit", [2.0**-120, 2.0**-60, 2.0**60, 2.0**124])
def test_the_error_does_not_depend_on_the_unit(unit):
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    found, expected = check(x * unit, None, 128, 4, False) / unit, check(x, None, 128, 4, False)
    # Of the smallest ones bf16 holds the mean less exactly.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-3 if unit < 1e-30 else 1e-5)


@pytest.mark.parametrize("paths", [False, True])
def test_only_groups_with_nan_or_inf_are_lost_and_counted(paths):
    x, count = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(1, dtype=torch.int64)
    x[3, 5], x[7, 0], x[7, 9] = torch.nan, torch.inf, -torch.inf
    codes, scales = quantize_rotated(x, None, 1, 64, 2, paths, count)
    y = dequantize_rotated(codes, scales, None, 1, [40, 64], torch.float32, 64, 2, paths)
    lost = y.isnan()
    assert int(count) == 2 and lost[[3, 7]].all() and int(lost.sum()) == 128 and torch.isfinite(y[~lost]).all()


def test_scales_of_another_tensor_read_nothing_beyond_the_codes():
    """A payload may be damaged: whatever the scales are, the bits of all groups are those of the codes."""
    codes = torch.zeros(codes_nbytes(5000, 32, 2), dtype=torch.uint8)
    for scales in (torch.randn(157, 2), torch.full((157, 2), -torch.inf), torch.randn(157, 2) * 1e38):
        agree("dequantize_rotated", codes, scales.bfloat16(), None, 1, [5000], torch.float32, 32, 2, False)


@needs_triton
@pytest.mark.parametrize("dtype, cols, bits, features, shape", [
    (torch.float32, 32, 2, False, (40, 40)), (torch.float32, 16, 3, True, (40, 33)),
    (torch.bfloat16, 128, 4, True, (35, 40)), (torch.float16, 8, 1, False, (33, 9)),
    (torch.float32, 64, 8, False, (1, 30)),
])  # fmt: skip
def test_the_kernel_agrees(dtype, cols, bits, features, shape, monkeypatch):
    monkeypatch.setattr(allocation, "WINDOW", 16)  # the interpreter is slow
    x = data(shape, dtype) if shape[0] > 30 else torch.linspace(-1, 2, 30, dtype=dtype).view(shape)
    scales = feature_scales(x) if features else None
    (codes, own), _ = agree_in_triton("quantize_rotated", x, scales, 1, cols, bits, False, "count")
    agree_in_triton("dequantize_rotated", codes, own, scales, 1, list(shape), dtype, cols, bits, False)
    agree_in_triton("roundtrip_rotated", x, scales, 1, cols, bits, False, "count")
