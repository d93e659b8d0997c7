"""Numbers of a tensor: one scale, scales of features, whether all is finite."""

import math

import pytest
import torch
from helpers.operators import agree, agree_in_triton, interpreted, needs_compiler, needs_triton, run

from hf_actcompress.ops.library import FORMS
from hf_actcompress.ops.ranges import feature_scales

SHAPES = [(5,), (3, 7, 5), (300, 24), (2, 16, 8, 8), (2100, 5), (8, 33, 12, 12)]


def example(shape, value=None, dtype=torch.float32):
    x = torch.randn(shape).to(dtype)
    if value is not None:
        x.view(-1)[-1] = value
    return x


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [None, math.nan, -math.inf, 0.0])
def test_one_scale_in_cpp(value, dtype):
    for shape in SHAPES:
        x = example(shape, value, dtype)
        for symmetric in (False, True):
            scale = agree("tensor_scale", x, 255.0, symmetric, "count")
            assert scale.isnan().all() == (value is not None and not math.isfinite(value))
        agree("tensor_scale", torch.full_like(x, 0.5), 15.0, False, "count")
        if x.dim() == 4:
            agree("tensor_scale", x.contiguous(memory_format=torch.channels_last), 15.0, False, "count")


def test_one_scale_by_hand():
    x = torch.tensor([-1.0, 4.0, 2.0])
    assert run("tensor_scale", "reference", x, 5.0, False, None)[0].tolist() == [-1.0, 1.0]
    assert run("tensor_scale", "reference", x, 8.0, True, None)[0].tolist() == [0.0, 0.5]
    for largest, fits in ((1.5e38, True), (3e38, False)):  # a range beyond fp32 cannot be told apart
        scale, count = run("tensor_scale", "reference", torch.tensor([-largest, largest]), 255.0, False, "count")
        assert scale.isfinite().all() == fits and count == (not fits)


@needs_triton
@pytest.mark.parametrize("value", [None, math.nan])
def test_in_triton(value):
    for shape in SHAPES:
        x = example(shape, value)
        for symmetric in (False, True):
            agree_in_triton("tensor_scale", x, 255.0, symmetric, "count")
        if x.dim() > 1:
            expected, found = agree_in_triton("feature_scales", x, exact=False)
            near = (expected.float() - found.float()).abs() <= 0.01 * expected.float().abs() + 1e-3
            assert near.all()


@pytest.mark.parametrize("form", ["reference", pytest.param("cpu", marks=needs_compiler),
                                  pytest.param("triton", marks=needs_triton)])  # fmt: skip
def test_tensors_that_are_not_finite_are_counted(form):
    for x, expected in ((example((40, 50)), 0), (example((40, 50), math.inf), 1), (example((4000,), math.nan), 1)):
        counter = torch.zeros(1, dtype=torch.int64)
        with interpreted():
            FORMS["count_nonfinite"][form](x, counter)
        assert bool(counter) == expected


def test_features_in_any_memory_order():
    x = torch.randn(16, 24, 9, 9) * torch.rand(24, 1, 1) * 5 + torch.randn(24, 1, 1)
    scales = feature_scales(x)
    assert scales.shape == (2, 24) and scales.dtype == torch.bfloat16
    assert torch.equal(scales, feature_scales(x.contiguous(memory_format=torch.channels_last)))
    mean, root = scales.float()
    assert torch.allclose(mean, x.mean((0, 2, 3)), atol=0.3) and torch.allclose(root**2, x.std((0, 2, 3)), rtol=0.3)


def test_a_value_that_is_not_finite_spoils_no_feature():
    x = torch.randn(400, 8)
    x[0, 3] = math.inf
    assert feature_scales(x).isfinite().all()
