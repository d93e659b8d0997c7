"""Bits given by energy: the average is kept, the squared error is the least that whole bits allow."""

import itertools

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops.allocation import MOST, TOP, WINDOW, Windows, moves, thresholds
from hf_actcompress.ops.allocation import allocate as allocate_by
from hf_actcompress.ops.gaussian import distortions, gauss_distortion
from hf_actcompress.ops.trellis import DISTORTION

SPEC = "rotated:bits={}"
CPU = torch.device("cpu")


def allocate(spread, bits):
    return allocate_by(spread.bfloat16(), bits, moves(bits, False))[0]


def distortion(bits):
    return gauss_distortion(bits) if bits else 1.0


def error(spread, given):
    return sum(float(s) ** 2 * distortion(int(b)) for s, b in zip(spread, given, strict=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("groups", [1, 2, 3, 50, 512])
def test_the_average_is_kept(bits, groups):
    spread = (torch.rand(groups, generator=torch.Generator().manual_seed(0)) ** 4).bfloat16()
    given = allocate(spread, bits)
    assert int(given.sum()) == bits * groups
    assert all(max(0, bits - MOST) <= b <= min(TOP, bits + MOST) for b in given.tolist())
    order = given[torch.argsort(spread, descending=True, stable=True)]
    assert (order.diff() <= 0).all()
    assert error(spread, given) <= error(spread, torch.full((groups,), bits)) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_best_symmetric_choice(bits, seed):
    """Against all ways to take bits from the smallest and to give them to the largest."""
    spread = (torch.rand(6, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3).bfloat16()
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


@pytest.mark.parametrize("groups", [1, 2, WINDOW, WINDOW + 1, 3 * WINDOW - 1, 3 * WINDOW, 5003])
def test_every_group_is_in_one_window_and_its_planes_are_its_own(groups):
    windows = Windows.of(groups)
    index = windows.groups(CPU)
    assert index.shape == (windows.count, windows.members) and windows.members <= WINDOW
    assert index[index < groups].sort().values.tolist() == list(range(groups))
    assert ((index < groups).sum(1) == windows.members - (torch.arange(windows.count) >= windows.full).long()).all()
    spread = torch.rand(groups, generator=torch.Generator().manual_seed(0)).bfloat16()
    given, before = allocate_by(spread, 3, moves(3, False))
    order = before.sort(stable=True).indices
    at = [int(b) for b, g in zip(before[order], given[order], strict=True) for b in range(int(b), int(b) + int(g))]
    assert at == list(range(3 * groups))


def test_a_window_is_a_sample_of_the_whole_tensor():
    """Groups that alternate, in runs of any length, are in every window in about their share."""
    groups = 40 * WINDOW
    index = Windows.of(groups).groups(CPU)
    for length in (1, 2, 20, 40, 64, 512, 1000):
        share = (index // length % 2).double().mean(1)
        assert (share - 0.5).abs().max() < 0.1, length


def test_windows_lose_little():
    """Than all groups sorted together, whose pairs are not the best either."""
    spread = (torch.rand(20 * WINDOW, generator=torch.Generator().manual_seed(0)) ** 3).bfloat16()
    lost, (_, order) = error(spread, allocate(spread, 2)), spread.sort(descending=True, stable=True)
    given = torch.full(spread.shape, 2)
    for a, b in thresholds(2, distortions()):
        high, low = order[: len(order) // 2], order.flip(0)[: len(order) // 2]
        moved = spread[high].float() * a > spread[low].float() * b
        given[high] += moved.long()
        given[low] -= moved.long()
    assert lost == pytest.approx(error(spread, given), rel=0.02)


def test_not_a_number_counts_as_nothing():
    spread = torch.tensor([1.0, torch.nan, 1.0, torch.inf])
    assert allocate(spread, 2).tolist() == [4, 0, 4, 0]


def test_the_thresholds_follow_the_errors():
    for bits in range(1, 9):
        for errors in (distortions(), DISTORTION):
            for step, (a, b) in enumerate(thresholds(bits, errors), 1):
                assert a * a == pytest.approx(errors[bits + step - 1] - errors[bits + step])
                assert b * b == pytest.approx(errors[bits - step] - errors[bits - step + 1])


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
