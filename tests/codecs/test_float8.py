import pytest
import torch

from hf_actcompress.codecs import Float8

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = [("e4m3", torch.float8_e4m3fn, 448.0, 2.0**-4), ("e5m2", torch.float8_e5m2, 57344.0, 2.0**-3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, kind, top, relative", FORMATS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, -1.0, 3e4])
def test_equals_a_direct_cast(dtype, name, kind, top, relative, scale):
    x = torch.randn(7, 143, generator=torch.Generator().manual_seed(0)).clamp(-2, 1.5).mul(scale).to(dtype)
    payload = Float8(name).encode(x)
    factor = x.float().abs().max() / top
    assert torch.equal(payload.tensors["scale"], factor.view(1))
    expected = ((x.float() / factor).to(kind).float() * factor).to(dtype)
    assert torch.equal(Float8(name).decode(payload), expected)
    assert payload.nbytes == x.numel() + 4
    normal = x.abs() > x.abs().max() * 2.0**-13
    error = ((expected - x).double() / x.double()).abs()[normal]
    assert float(error.max()) <= relative + 2.0**-8 and float(error.max()) > relative / 2
    largest = x.abs().argmax()
    assert float(expected.view(-1)[largest]) == pytest.approx(float(x.view(-1)[largest]), rel=2.0**-8)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_zeros_and_what_is_too_small_for_a_scale(name):
    assert torch.equal(Float8(name).roundtrip(torch.zeros(9)), torch.zeros(9))
    tiny = torch.full((9,), 1e-37)
    y = Float8(name).roundtrip(tiny)
    assert torch.isfinite(y).all() and float((y - tiny).abs().max()) <= 1e-37
