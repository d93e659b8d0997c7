"""Groups: the forms agree bit for bit, codes and roundtrip agree, what is not finite is NaN and counted."""

import math

import pytest
import torch
from helpers.operators import agree, agree_in_triton, needs_compiler, needs_triton, run
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.ops.groups import codes_nbytes, dequantize_groups, quantize_groups, roundtrip_groups
from hf_actcompress.ops.ranges import feature_scales

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inner(shape):
    return shape[2] * shape[3] if len(shape) == 4 else 1


def both_ways(check, x, features, scale, cols, bits, key):
    """Quantize, dequantize and roundtrip of x by `check`, which agree."""
    codes, scales = check("quantize_groups", x, features, inner(x.shape), scale, cols, bits, key, "count")
    y = check("dequantize_groups", codes, scales if scale is None else scale, features, inner(x.shape), list(x.shape),
              x.dtype, cols, bits)  # fmt: skip
    z = check("roundtrip_groups", x, features, inner(x.shape), scale, cols, bits, key, "count")
    assert torch.equal(y.nan_to_num(), z.nan_to_num()) and torch.equal(y.isnan(), z.isnan())
    return y


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_same_bits(bits, dtype):
    torch.manual_seed(bits)
    for shape in [(7, 100), (2, 3, 128), (2, 48, 4, 5), (13,)]:
        x = (torch.randn(shape) * torch.rand(shape) * 3 - 1).to(dtype)
        x.view(-1)[:3] = torch.tensor([0.0, -0.0, 50.0])
        features = feature_scales(x) if len(shape) > 1 else None
        for cols, key in ((128, None), (48, 7), (16, -5), (256, None)):
            both_ways(agree, x, features, None, cols, bits, key)
        both_ways(agree, x, None, torch.tensor([-2.0, 5.0 / (2**bits - 1)]), 128, bits, 99)


@needs_compiler
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.sampled_from([16, 64, 128]), st.sampled_from(DTYPES), st.integers(0, 3), st.sampled_from([None, 0, -(2**31)]),
    st.floats(-30, 30),
)  # fmt: skip
def test_same_bits_for_any_tensor(shape, bits, cols, dtype, kind, key, exponent):
    torch.manual_seed(len(shape))
    x = (torch.randn(shape) * 2.0**exponent).to(dtype)
    if kind == 1:
        x = torch.full_like(x, float(x.view(-1)[0]))
    elif kind == 2:
        x = x.mT if x.dim() > 1 else x[::2] if x.numel() > 1 else x
    elif kind == 3:
        x.view(-1)[x.numel() // 2] = math.inf
    both_ways(agree, x, None, None, cols, bits, key)


@needs_compiler
@pytest.mark.parametrize("key", [None, 11])
def test_images_with_channels_last_keep_their_order(key):
    for shape in [(2, 32, 16, 8), (2, 32, 7, 7), (2, 8, 16, 8)]:
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        for scale in (None, torch.tensor([-3.0, 0.4])):
            y = agree("roundtrip_groups", x, None, 1, scale, 64, 4, key, "count")
            assert y.stride() == x.stride()
            assert torch.equal(y.contiguous(), roundtrip_groups(x.contiguous(), None, 1, scale, 64, 4, key, None))


@needs_triton
@pytest.mark.parametrize(
    "shape, dtype, cols, bits, key, scaled",
    [
        ((300, 24), torch.float32, 128, 4, None, True), ((2, 16, 8, 8), torch.float32, 16, 3, -7, True),
        ((5, 9, 70), torch.bfloat16, 128, 2, 5, False), ((3, 7, 5), torch.float16, 64, 7, None, False),
        ((2500,), torch.float32, 128, 8, 5, False), ((5,), torch.float32, 128, 1, None, False),
        ((40, 192), torch.float32, 192, 4, 11, True), ((31, 104), torch.bfloat16, 24, 3, None, False),
        ((9, 200), torch.float32, 200, 2, 5, False), ((7, 96), torch.float16, 96, 7, 3, True),
    ],
)  # fmt: skip
def test_triton(shape, dtype, cols, bits, key, scaled):
    x = torch.randn(shape).to(dtype)

    def check(*args):
        return agree_in_triton(*args)[0]

    both_ways(check, x, feature_scales(x) if scaled else None, None, cols, bits, key)
    both_ways(check, x, None, torch.tensor([-2.0, 5.0 / (2**bits - 1)]), cols, bits, key)
    x.view(-1)[-1] = math.nan
    both_ways(check, x, None, None, cols, bits, key)


@needs_triton
def test_triton_with_offsets_of_64_bits(monkeypatch):
    import hf_actcompress.ops.triton.groups as kernels  # imported by now, under the interpreter

    monkeypatch.setattr(kernels, "is_wide", lambda n: True)
    x = torch.randn(40, 130)
    both_ways(lambda *args: agree_in_triton(*args)[0], x, None, None, 128, 4, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_nan_in_its_group_alone(value):
    x = torch.randn(10, 128)
    x[3, 5] = x[7, 0] = value
    for name in ("roundtrip_groups", "quantize_groups"):
        found, count = run(name, "reference", x, None, 1, None, 128, 4, None, "count")
        assert count == 2
    codes, scales = found
    y = dequantize_groups(codes, scales, None, 1, list(x.shape), x.dtype, 128, 4)
    lost = torch.zeros(10, dtype=torch.bool)
    lost[[3, 7]] = True
    assert torch.equal(y.isnan().all(1), lost) and torch.equal(y.isnan().any(1), lost)


@pytest.mark.parametrize("form", ["reference", pytest.param("cpu", marks=needs_compiler)])
def test_large_values_are_coded_as_far_as_fp32_reaches(form):
    x = torch.tensor([[1.5e38, -1.5e38, 0.0, 1e38] * 4, [3e38, -3e38, 0.0, 1e38] * 4])
    y, count = run("roundtrip_groups", form, x, None, 1, None, 16, 4, None, "count")
    assert count == 1 and ((y[0] - x[0]).abs() <= 3e38 / 15).all() and y[1].isnan().all()


def test_bytes():
    for n, cols, bits in ((1000, 128, 4), (128, 128, 3), (5, 128, 1), (0, 128, 4)):
        codes, scales = quantize_groups(torch.randn(n), None, 1, None, cols, bits, None, None)
        assert codes.numel() == codes_nbytes(n, cols, bits) and scales.shape == (-(-n // cols), 2)
        assert codes.numel() == (n // cols * cols + -(-(n % cols) // 8) * 8) * bits // 8


def test_a_payload_that_is_too_short_is_refused():
    codes, scales = quantize_groups(torch.randn(4096), None, 1, None, 128, 4, None, None)
    for wrong in ((codes[:-1], scales), (codes, scales[:-2])):
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            dequantize_groups(*wrong, None, 1, [4096], torch.float32, 128, 4)
