"""Bits given by energy: the average is kept, the squared error is the least that whole bits allow."""

import itertools

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.codecs.transforms.allocation import MOST, TOP, Regions
from hf_actcompress.codecs.transforms.allocation import allocate as allocate_by
from hf_actcompress.codecs.transforms.levels import gauss_distortion

SPEC = "rotated:bits={}"


def allocate(spread, bits):
    return allocate_by(spread, bits, gauss_distortion)


def distortion(bits):
    return gauss_distortion(bits) if bits else 1.0


def error(spread, given):
    return sum(float(s) ** 2 * distortion(int(b)) for s, b in zip(spread, given, strict=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("groups", [0, 1, 2, 3, 50, 1001])
def test_the_average_is_kept(bits, groups):
    spread = torch.rand(groups, generator=torch.Generator().manual_seed(0)) ** 4
    given = allocate(spread, bits)
    assert int(given.sum()) == bits * groups
    assert all(max(0, bits - MOST) <= b <= min(TOP, bits + MOST) for b in given.tolist())
    order = given[torch.argsort(spread, stable=True)]
    assert (order.diff() >= 0).all()
    assert error(spread, given) <= error(spread, torch.full((groups,), bits)) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_best_symmetric_choice(bits, seed):
    """Against all ways to take bits from the smallest and to give them to the largest."""
    spread = torch.rand(6, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3
    order = torch.argsort(spread, descending=True)
    best = float("inf")
    for moved in itertools.product(range(MOST + 1), repeat=3):
        given = torch.full((6,), bits)
        for pair, by in enumerate(moved):
            by = min(by, bits)
            given[order[pair]] += by
            given[order[5 - pair]] -= by
        best = min(best, error(spread, given))
    assert error(spread, allocate(spread, bits)) == pytest.approx(best, rel=1e-6)


def test_equal_groups_share_alike_and_empty_ones_give():
    assert allocate(torch.ones(9), 2).tolist() == [2] * 9
    assert allocate(torch.tensor([0.0, 1.0, 0.0, 1.0]), 2).tolist() == [0, 4, 0, 4]
    assert allocate(torch.zeros(4), 3).tolist() == [3] * 4
    # squares of these leave the range of fp32
    assert allocate(torch.tensor([1e-30, 1e30, 1e25, 1e30]), 2).tolist() == [0, 4, 0, 4]


def test_regions_cover_the_payload_once():
    given = torch.tensor([1, 4, 0, 1, 3, 3, 4, 0], dtype=torch.int32)
    regions = Regions(given, 16)
    assert regions.nbytes == int(given.sum()) * 2
    seen, groups = [], []
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        for bits, rows, at in regions.parts(start, stop):
            assert at.stop - at.start == rows.numel() * 2 * bits
            seen += range(at.start, at.stop)
            groups += (rows + start).tolist()
    assert sorted(seen) == list(range(regions.nbytes))
    assert sorted(groups) == [0, 1, 3, 4, 5, 6]


@pytest.mark.parametrize("bits", [2, 3])
def test_sentences_with_padding_lose_much_less(bits):
    """Half of the tokens nearly alike: the rest gets their bits; the payload does not grow."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(16, 32, 128, generator=generator)
    words[:, 16:] *= 0.1
    codec = parse_codec(SPEC.format(bits))
    assert codec.encode(words).nbytes == codec.payload_nbytes(words.shape, words.dtype)
    lost = float((codec.roundtrip(words) - words)[:, :16].square().mean())
    alone = float((codec.roundtrip(words[:, :16]) - words[:, :16]).square().mean())  # nothing else gives bits
    assert lost < 0.4 * alone


def test_values_are_right_on_average():
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(0)) * torch.rand(400, 1) ** 2
    y = parse_codec(SPEC.format(2)).roundtrip(x)
    assert float((x * y).sum() / (x * x).sum()) == pytest.approx(1, abs=0.01)
