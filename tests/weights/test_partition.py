"""Optimal one-dimensional codebooks against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.weights import partition as module
from hf_actcompress.weights.partition import assign, codebook, partition


def error(x, table, weights=None):
    return np.average((x - table[assign(x, table)]) ** 2, weights=weights)


def brute_force(values, weights, k):
    """The least error over all ways to cut the sorted values into k runs."""
    n, best = len(values), np.inf
    for cuts in itertools.combinations(range(1, n), min(k, n) - 1):
        total = 0.0
        for a, b in itertools.pairwise([0, *cuts, n]):
            mean = np.average(values[a:b], weights=weights[a:b])
            total += (weights[a:b] * (values[a:b] - mean) ** 2).sum()
        best = min(best, total)
    return best / weights.sum()


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=11, unique=True), st.integers(1, 6), st.data())
def test_no_other_codebook_is_better(values, k, data):
    values = np.sort(np.array(values, dtype=np.float64))
    weights = np.array(data.draw(st.lists(st.integers(1, 9), min_size=len(values), max_size=len(values))), float)
    table = partition(values, weights, k)
    assert len(table) == min(k, len(values)) and (np.diff(table) >= 0).all()
    assert error(values, table, weights) == pytest.approx(brute_force(values, weights, k), rel=1e-6, abs=1e-9)


def quadratic(values, k):
    """The same programme with all cuts tried for all ends."""
    n = len(values)
    s, q = np.append(0, values.cumsum()), np.append(0, (values**2).cumsum())
    i, j = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
    cost = np.where(j > i, q[j] - q[i] - (s[j] - s[i]) ** 2 / np.maximum(j - i, 1), np.inf)
    best = cost[0]
    for _ in range(k - 1):
        best = (best[:, None] + cost).min(0)
    return best[n] / n


@pytest.mark.parametrize("k", [2, 3, 5, 16, 64])
@pytest.mark.parametrize("n", [65, 400, 511])
def test_halving_finds_what_trying_all_cuts_finds(k, n):
    values = np.sort(np.random.default_rng(n).standard_normal(n) ** 3)
    assert error(values, partition(values, np.ones(n), k)) == pytest.approx(quadratic(values, k), rel=1e-9)


@pytest.mark.parametrize("k", [3, 4, 16])
def test_a_histogram_costs_almost_nothing(monkeypatch, k):
    x = np.random.default_rng(0).standard_normal(20_000)
    x[:20] *= 30  # outliers
    monkeypatch.setattr(module, "EXACT", 1 << 40)
    fine = codebook(x, k)
    monkeypatch.setattr(module, "EXACT", 0)
    coarse = codebook(x, k)
    assert not np.array_equal(coarse, fine)
    assert error(x, coarse) <= 1.001 * error(x, fine)


def test_two_values_are_exact_however_many_there_are():
    x = np.random.default_rng(1).standard_normal(200_001)
    x.sort()
    s, n = x.cumsum(), np.arange(1, len(x) + 1)
    gain = s[:-1] ** 2 / n[:-1] + (s[-1] - s[:-1]) ** 2 / (len(x) - n[:-1])
    cut = gain.argmax() + 1
    np.testing.assert_allclose(codebook(x, 2), [x[:cut].mean(), x[cut:].mean()], rtol=1e-9)


def test_few_distinct_values_and_none():
    np.testing.assert_array_equal(codebook(np.array([3.0, 1, 3, 1]), 4), [1, 3])
    assert codebook(np.zeros(0), 4).tolist() == [0]
    np.testing.assert_allclose(codebook(np.full(9, 0.1), 2), [0.1])


def test_a_large_mean_does_not_hide_the_spread():
    x = 1e6 + np.repeat([0.0, 1, 5, 6], 50) + np.tile(np.linspace(0, 1e-3, 50), 4)
    np.testing.assert_allclose(codebook(x, 4) - 1e6, [5e-4, 1 + 5e-4, 5 + 5e-4, 6 + 5e-4], atol=1e-5)
