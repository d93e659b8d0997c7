import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.codecs import Uniform

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 2.0**-23}


def slack(x):
    """Room for the arithmetic in fp32 and for the output's dtype."""
    return 4 * EPS[x.dtype] * float(x.double().abs().max()) + 1e-37


def slow(x, bits):
    """Every value by itself, in Python floats."""
    values = x.double().reshape(-1).tolist()
    lo, hi = min(values), max(values)
    step = (hi - lo) / (2**bits - 1)
    return [lo + step * round((v - lo) / step) if step else lo for v in values], step


def sample(n, dtype, seed, scale=1.0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(dtype)


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 11, 16])
@pytest.mark.parametrize("n", [1, 2, 9, 1024, 1500])
def test_nearest_equals_the_slow_twin(dtype, bits, n):
    x = sample(n, dtype, n)
    y = Uniform(bits).roundtrip(x).double()
    want, step = slow(x, bits)
    room = slack(x)
    for value, got, expected in zip(x.double().tolist(), y.tolist(), want, strict=True):
        half_way = abs(abs(expected - value) - step / 2) <= room
        assert abs(got - expected) <= room or half_way
        assert abs(got - value) <= step / 2 + room


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.integers(1, 16),
    st.sampled_from(list(EPS)),
)
def test_the_error_is_at_most_half_a_step(values, bits, dtype):
    x = torch.tensor(values).to(dtype)
    y = Uniform(bits).roundtrip(x).double()
    step = float(x.double().max() - x.double().min()) / (2**bits - 1)
    assert float((y - x.double()).abs().max()) <= step / 2 + slack(x)


@pytest.mark.parametrize("bits", [1, 4, 16])
def test_the_payload_holds_minimum_and_step(bits):
    x = sample(1000, torch.float32, 0)
    payload = Uniform(bits).encode(x)
    lo, hi = x.min(), x.max()
    assert payload.tensors["scale"].dtype == torch.float32
    assert payload.tensors["scale"].tolist() == pytest.approx([float(lo), float(hi - lo) / (2**bits - 1)])
    assert payload.nbytes == 1000 * bits // 8 + 8
    y = Uniform(bits).decode(payload)
    assert y.min() == lo and float(y.max()) == pytest.approx(float(hi), rel=1e-6)
    assert len(y.unique()) <= 2**bits


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_stochastic_rounding_is_unbiased_and_errs_less_than_a_step(bits):
    codec, draws = Uniform(bits, round="stochastic"), 1000
    x = sample(96, torch.float32, 3)
    state = codec.init_state("s", seed=1)
    ys = torch.stack([codec.roundtrip(x, state).double() for _ in range(draws)])
    step = float(x.max() - x.min()) / (2**bits - 1)
    assert float((ys - x.double()).abs().max()) < step * (1 + 1e-5)
    part = (x.double() - float(x.min())) / step % 1
    error = step * (part * (1 - part) / draws).sqrt()  # a Bernoulli draw for each value
    assert ((ys.mean(0) - x.double()).abs() <= 4 * error + 1e-6).all()
    assert abs(float((ys.mean(0) - x.double()).sum())) <= 4 * float((error**2).sum().sqrt()) + 1e-5
    variance = ys.var(0)
    inside = (part > 0.05) & (part < 0.95)
    assert torch.allclose(variance[inside], (step**2 * part * (1 - part))[inside], rtol=0.35)


def test_noise_is_fresh_at_each_step_and_site_and_comes_from_nothing_else():
    codec = Uniform(2, round="stochastic")
    x = sample(500, torch.float32, 4)

    def run(site, seed, steps=3):
        state = codec.init_state(site, seed)
        return [codec.decode(codec.encode(x, state)) for _ in range(steps)]

    torch.manual_seed(0)
    first = run("a", 0)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, run("a", 0), strict=True))
    others = [*first, *run("b", 0), *run("a", 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])
    assert torch.equal(codec.roundtrip(x), codec.roundtrip(x)), "without state the noise is always the same"
    before = torch.get_rng_state()
    run("a", 0)
    assert torch.equal(before, torch.get_rng_state())


def test_values_on_a_step_stay():
    """The minimum, and in a tensor of equal values all of them, in both kinds of rounding."""
    x = torch.arange(16.0).repeat(100)
    for codec in (Uniform(4), Uniform(4, round="stochastic")):
        assert torch.equal(codec.roundtrip(x), x)
        assert torch.equal(codec.roundtrip(torch.full((33,), -math.pi)), torch.full((33,), -math.pi))
