"""Measures against the same written out value by value."""

import math

import pytest
import torch

from hf_actcompress import parse_codec
from hf_actcompress.observe import measures
from hf_actcompress.observe.measures import MEASURES, Sums, compare, rms_error, sums_of


def by_hand(xs, ys):
    n = len(xs)
    errors = [y - x for x, y in zip(xs, ys, strict=True)]
    mean, drift = sum(xs) / n, sum(errors) / n
    variance = sum((x - mean) ** 2 for x in xs) / n
    noise = sum(e * e for e in errors)
    power = sum(x * x for x in xs)
    least, most = min(ys), max(ys)
    deviation = math.sqrt(sum((e - drift) ** 2 for e in errors) / n)
    return {
        "rel_error": math.sqrt(noise) / math.sqrt(power),
        "snr_db": 20 * math.log10(math.sqrt(power) / math.sqrt(noise)),
        "cosine": sum(x * y for x, y in zip(xs, ys, strict=True)) / math.sqrt(power * sum(y * y for y in ys)),
        "bias": drift / (deviation / math.sqrt(n)),
        "zeroed": sum(x != 0 and y == 0 for x, y in zip(xs, ys, strict=True)) / n,
        "saturated": sum(not least <= x <= most for x in xs) / n,
        "outlier": max(abs(x - mean) for x in xs) / math.sqrt(variance),
        "kurtosis": sum((x - mean) ** 4 for x in xs) / n / variance**2,
        "effective_bits": math.log2(math.sqrt(variance) / math.sqrt(noise / n)),
    }


@pytest.mark.parametrize("spec", ["uniform:bits=2", "topk:ratio=0.3", "rotated:bits=2"])
@pytest.mark.parametrize("layout", ["plain", "transposed", "bf16"])
def test_measures_are_what_they_say(spec, layout):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) + 0.3
    x[3, 3] = 9.0
    x = x.t() if layout == "transposed" else x.bfloat16() if layout == "bf16" else x
    y = torch.empty_like(x).copy_(parse_codec(spec).roundtrip(x))
    found, expected = compare(x, y), by_hand(x.flatten().double().tolist(), y.flatten().double().tolist())
    assert tuple(found) == MEASURES
    assert found == pytest.approx(expected, rel=1e-6)
    assert (found["zeroed"] > 0.5) == spec.startswith("topk")
    assert (found["saturated"] > 0) == ("gauss" in spec)


def test_a_sample_stands_for_a_large_tensor_but_not_for_its_extremes(monkeypatch):
    monkeypatch.setattr(measures, "SAMPLE", 1000)
    x = torch.randn(400, 500)
    x[200, 250] = 50.0
    whole, part = by_hand(x.flatten().tolist(), (y := x.mul(8).round().div(8)).flatten().tolist()), compare(x, y)
    assert part["outlier"] == pytest.approx(whole["outlier"], rel=0.1)
    assert part["outlier"] > 40
    assert part["rel_error"] == pytest.approx(whole["rel_error"], rel=0.2)


def test_where_nothing_can_be_said():
    nothing = dict.fromkeys(MEASURES)
    assert compare(torch.empty(0), torch.empty(0)) == nothing
    bad = torch.tensor([1.0, math.nan])
    assert compare(bad, bad) == nothing
    same = compare(torch.arange(5.0), torch.arange(5.0))
    assert (same["rel_error"], same["cosine"], same["bias"]) == (0, pytest.approx(1), 0)
    assert same["snr_db"] is None and same["effective_bits"] is None
    constant = compare(torch.ones(4), torch.ones(4) * 2)
    assert [constant[key] for key in ("rel_error", "bias", "outlier", "kurtosis")] == [1, None, None, None]
    zero = compare(torch.zeros(4), torch.zeros(4))
    assert (zero["rel_error"], zero["cosine"]) == (0, 1)
    assert compare(torch.zeros(4), torch.ones(4))["rel_error"] is None
    assert compare(torch.tensor(2.0), torch.tensor(1.0))["rel_error"] == 0.5


def test_unbiased_rounding_shows_no_bias_and_a_shift_does():
    x = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    codec = parse_codec("uniform:bits=4,round=stochastic")
    assert abs(compare(x, codec.roundtrip(x, codec.init_state("x", 0)))["bias"]) < 4
    assert compare(x, x.mul(8).floor().div(8))["bias"] < -50


def test_gradients_in_parts_are_one_long_vector():
    torch.manual_seed(0)
    parts = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2).bfloat16()]
    other = [p + 0.1 * torch.randn_like(p) for p in parts]
    a, b = (torch.cat([p.double().flatten() for p in side]) for side in (parts, other))
    found = sum(sums_of([*parts, None], [*other, None]), Sums()).measures()
    assert found["rel_error"] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-5)
    assert found["cosine"] == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-5)
    assert found["snr_db"] == pytest.approx(-20 * math.log10(found["rel_error"]), rel=1e-9)
    assert sum(sums_of([parts[0], None], [None, parts[1]]), Sums()).measures()["cosine"] == 0
    assert set(sums_of([torch.tensor([math.inf])], [torch.ones(1)])[0].measures().values()) == {None}


def test_the_mean_error_of_layers_counts_each_alike():
    large, small = torch.tensor([300.0, 400.0]), torch.tensor([0.003, 0.004])
    parts = sums_of([large, small, torch.zeros(2)], [large * 1.1, small * 1.4, torch.zeros(2)])
    assert rms_error(parts) == pytest.approx(math.sqrt((0.1**2 + 0.4**2) / 2), rel=1e-5)
    assert sum(parts, Sums()).measures()["rel_error"] == pytest.approx(0.1, rel=1e-4)
    assert rms_error(sums_of([large], [large * math.nan])) is None and rms_error([]) == 0
