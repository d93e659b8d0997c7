"""Trellis-coded quantization against plain searches, and its gain over single levels."""

import itertools

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops import trellis
from hf_actcompress.ops.gaussian import gauss_distortion
from hf_actcompress.ops.trellis import DISTORTION, STRETCH, dequantize, quantize, subset, trellis_levels


def encode(x, bits):
    return quantize(x, torch.full((len(x),), bits), bits, bits)


def decode(codes, bits):
    """By the levels as they are, not stretched to be right on average."""
    return dequantize(codes, bits) * (1 - DISTORTION[bits])


def walk(codes, bits):
    """What a row of codes decodes to: the register step by step."""
    state, values = 0, []
    for code in codes:
        path = code & 1
        values.append(trellis_levels(bits)[(code >> 1) * 4 + subset(state, path)])
        state = (state << 1 | path) & 7
    return values


def test_rows_of_different_bits_are_coded_each_by_its_own():
    x, bits = gauss(6, 40), torch.tensor([1, 3, 2, 3, 1, 2])
    codes = quantize(x, bits, 1, 3)
    for row, b in enumerate(bits.tolist()):
        assert torch.equal(codes[row : row + 1], encode(x[row : row + 1], b))


def gauss(rows, cols=128, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "cols"), [(1, 10), (2, 6), (3, 4)])
def test_no_path_has_less_error(bits, cols):
    """Against every row of codes there is."""
    x = 1.5 * gauss(21, cols)
    every = torch.tensor([walk(codes, bits) for codes in itertools.product(range(2**bits), repeat=cols)])
    best = torch.cdist(x.double(), every.double()).square().amin(1)
    found = torch.tensor([walk(row, bits) for row in encode(x, bits).tolist()])
    torch.testing.assert_close((x - found).double().square().sum(1), best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_decoder_walks_the_trellis(bits):
    codes = torch.randint(0, 2**bits, (5, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    expected = torch.tensor([walk(row, bits) for row in codes.tolist()])
    torch.testing.assert_close(decode(codes, bits), expected)


def test_every_subset_is_used_and_two_paths_differ():
    for state in range(8):
        assert {subset(state, 0) % 2, subset(state, 1) % 2} in ({0}, {1}), "the paths of a state share a coset"
        assert subset(state, 0) != subset(state, 1)
    assert {subset(s, p) for s in range(8) for p in (0, 1)} == {0, 1, 2, 3}


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_is_what_allocation_counts_on(bits):
    x = gauss(1500 if bits < 5 else 300)
    error = float((decode(encode(x, bits), bits) - x).square().mean())
    assert error == pytest.approx(DISTORTION[bits], rel=0.03)
    share = {1: 0.86, 2: 0.76}.get(bits, 0.72)
    assert DISTORTION[bits] < share * gauss_distortion(bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_stretch_is_near_its_best(bits, monkeypatch):
    x, errors = gauss(800), []
    for by in (0.94, 1.0, 1.06):
        monkeypatch.setitem(trellis.STRETCH, bits, STRETCH[bits] * by)
        for cached in (trellis.trellis_levels, trellis.tables):
            cached.cache_clear()
        errors.append(float((decode(encode(x, bits), bits) - x).square().mean()))
        monkeypatch.undo()
    for cached in (trellis.trellis_levels, trellis.tables):
        cached.cache_clear()
    assert errors[1] <= 1.005 * min(errors)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_less_error_at_the_same_bytes_and_right_on_average(bits):
    x = gauss(600, 256, 3)
    single, path = parse_codec(f"rotated:bits={bits}"), parse_codec(f"trellis:bits={bits},prototypes=0")
    assert single.encode(x).nbytes == path.encode(x).nbytes
    y = path.roundtrip(x)
    assert float((y - x).square().mean()) < 0.85 * float((single.roundtrip(x) - x).square().mean())
    assert float((x * y).sum() / (x * x).sum()) == pytest.approx(1, abs=0.015)
