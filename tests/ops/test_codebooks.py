"""Codebooks: the definition, which decides on the device, against the form that stops early."""

import importlib

import pytest
import torch
from helpers.operators import agree, agree_in_triton, interpreted, needs_triton

from hf_actcompress.ops import codebooks

FINITE = torch.tensor([0.0, 1.0])
KINDS = ["gauss", "few values", "constant", "two values", "half zeros", "outliers"]


def sample(kind, n=3000, seed=0):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    if kind == "few values":
        x = (2 * x).round()
    elif kind == "constant":
        x = torch.full((n,), 3.3)
    elif kind == "two values":
        x = (x > 1).float()
    elif kind == "half zeros":
        x = x.relu()
    elif kind == "outliers":
        x[:5] = 1e30
    return x.sort().values


@pytest.mark.parametrize("kind, bits", [*((kind, bits) for kind in KINDS for bits in (1, 4)), ("gauss", 7)])
def test_looking_at_values_changes_nothing(kind, bits):
    fresh = agree("fit_codebook", sample(kind), FINITE, None, bits, 8)
    assert (fresh[0].diff() >= 0).all() and fresh[0].shape == fresh[2].shape == (2**bits,)
    spread = torch.linspace(-1, 1, 2**bits)
    for last in (fresh[2], spread, torch.full_like(spread, torch.nan), spread + 90):
        agree("fit_codebook", sample(kind, seed=1), FINITE, last, bits, 8)


def test_what_is_not_finite_leaves_the_codebook_that_is_kept():
    bad = torch.full((2,), torch.nan)
    last = agree("fit_codebook", sample("gauss"), FINITE, None, 4, 8)[2]
    for values in (sample("gauss"), torch.cat([sample("gauss"), torch.tensor([torch.inf, torch.nan])])):
        table, edges, kept = agree("fit_codebook", values, bad, last, 4, 8)
        assert table.isnan().all() and edges.isnan().all() and torch.equal(kept, last)
        assert agree("fit_codebook", values, bad, None, 4, 8)[2].isnan().all()


@pytest.fixture
def few_iterations(monkeypatch):
    """The interpreter is slow."""
    monkeypatch.setattr(codebooks, "COLD", 2)
    with interpreted():
        monkeypatch.setattr(importlib.import_module("hf_actcompress.ops.triton.codebooks"), "COLD", 2)


@needs_triton
@pytest.mark.parametrize("kind, bits, n, warm", [
    ("gauss", 4, 1100, True), ("gauss", 1, 700, False), ("gauss", 7, 700, False), ("few values", 1, 300, True),
    ("constant", 1, 60, True), ("two values", 3, 300, False),
])  # fmt: skip
def test_the_kernel_finds_the_same_codebook(kind, bits, n, warm, few_iterations):
    """But for the last bit: it sums in another order."""
    last = torch.linspace(-1, 1, 2**bits) if warm else None
    args = sample(kind, n), FINITE, last, bits, 3
    for expected, found in zip(*agree_in_triton("fit_codebook", *args, exact=False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@needs_triton
def test_the_kernel_keeps_the_codebook_where_a_tensor_is_not_finite(few_iterations):
    bad, last = torch.full((2,), torch.nan), torch.linspace(-1, 1, 4)
    table, _, kept = agree_in_triton("fit_codebook", sample("gauss", 300), bad, last, 2, 3)[1]
    assert table.isnan().all() and torch.equal(kept, last)
