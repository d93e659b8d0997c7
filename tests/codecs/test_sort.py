import pytest
import torch

from hf_actcompress.codecs import Sort


def slow(x, bits, splits):
    """Sort everything, cut in 2**splits parts of equal count, quantize each between its own extremes.

    A value that stands on several sides of a cut belongs to the last of the groups that begin with it.
    """
    values = sorted(x.double().reshape(-1).tolist())
    count, top = 2**splits, 2 ** (bits - splits) - 1
    firsts = [values[g * len(values) // count] for g in range(count)]
    where = [max(g for g in range(count) if g == 0 or firsts[g] <= v) for v in values]
    out = {}
    for g in set(where):
        members = [v for v, h in zip(values, where, strict=True) if h == g]
        lo, step = firsts[g], (max(members) - firsts[g]) / top
        for v in members:
            out[v] = (lo + step * round((v - lo) / step) if step else lo), step
    return out


def data(kind, n, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if kind == "heavy":
        return x / torch.randn(n, generator=torch.Generator().manual_seed(seed + 1)).abs().clamp_min(0.05)
    if kind == "ties":
        return (2 * x).round()
    if kind == "half zeros":
        return x.clamp_min(0)
    if kind == "constant":
        return torch.full((n,), 0.3)
    return x


@pytest.mark.parametrize("bits, splits", [(2, 1), (4, 1), (4, 3), (6, 2), (8, 2), (8, 7), (12, 3)])
@pytest.mark.parametrize("kind", ["gauss", "heavy", "ties", "half zeros", "constant"])
@pytest.mark.parametrize("n", [1, 3, 64, 500, 1025])
def test_exact_quantiles_equal_the_full_sort(bits, splits, kind, n):
    x = data(kind, n)
    codec = Sort(bits, splits, quantiles="exact")
    y = codec.roundtrip(x.view(-1, 1)).view(-1).double()
    assert (codec.encode(x).tensors["scales"][:, 1] >= 0).all()
    expected = slow(x, bits, splits)
    room = 1e-6 * float(x.abs().max()) + 1e-30
    for value, got in zip(x.double().tolist(), y.tolist(), strict=True):
        want, step = expected[value]
        assert abs(got - value) <= step / 2 + room
        half_way = abs(abs(want - value) - step / 2) <= room
        assert abs(got - want) <= room or half_way


@pytest.mark.parametrize("kind", ["gauss", "heavy", "half zeros"])
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_sampled_quantiles_cost_little(kind, bits):
    x = data(kind, 200_000)
    errors = [float((Sort(bits, quantiles=q).roundtrip(x) - x).double().pow(2).mean()) for q in ("sample", "exact")]
    assert errors[0] <= 1.3 * errors[1]
    assert errors[0] != errors[1], "the sample held every value: this test would show nothing"


@pytest.mark.parametrize("kind", ["gauss", "heavy", "ties", "half zeros"])
@pytest.mark.parametrize("bits, splits", [(4, 1), (8, 2), (6, 5)])
def test_sampled_groups_reach_from_threshold_to_threshold(kind, bits, splits):
    x = data(kind, 100_003)
    codec = Sort(bits, splits)
    payload = codec.encode(x)
    y = codec.decode(payload)
    top = 2 ** (bits - splits) - 1
    lo, step = payload.tensors["scales"].double().T
    assert lo[0] == x.min() and float(lo[-1] + top * step[-1]) == pytest.approx(float(x.max()), rel=1e-5)
    assert torch.allclose(lo[:-1] + top * step[:-1], lo[1:], rtol=0, atol=1e-6 * float(x.abs().max()))
    group = torch.bucketize(x.double(), lo[1:].contiguous(), right=True)
    assert ((y - x).double().abs() <= step[group] / 2 + 1e-6 * x.abs().max()).all()
    share = torch.bincount(group, minlength=2**splits) / len(x)
    if kind in ("gauss", "heavy"):
        assert torch.allclose(share, torch.full_like(share, 2.0**-splits), atol=0.02)


def test_a_period_in_memory_does_not_spoil_the_sample():
    """Features of very different size, 64 to a row: an even stride would see only some of them."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 64)
    errors = [float((Sort(8, quantiles=q).roundtrip(x) - x).pow(2).mean()) for q in ("sample", "exact")]
    assert errors[0] <= 1.3 * errors[1]


@pytest.mark.parametrize("bits, splits", [(2, 1), (4, 1), (8, 2), (12, 3), (16, 4)])
def test_default_splits_of_the_reference_tables(bits, splits):
    assert Sort(bits).splits == splits and Sort(bits) == Sort(bits, splits)
    assert Sort(bits).payload_nbytes((1024,), torch.float32) == 128 * bits + 8 * 2**splits


def test_sorting_beats_equal_steps_on_a_tensor_with_outliers():
    from hf_actcompress.codecs import Uniform

    x = data("heavy", 20_000)
    inner = x.abs() < 1
    errors = [float((c.roundtrip(x) - x)[inner].pow(2).mean()) for c in (Sort(8), Uniform(8))]
    assert errors[0] < errors[1] / 4
