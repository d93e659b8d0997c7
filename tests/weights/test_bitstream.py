"""Fields of few bits and gaps between positions: nothing is lost, and nothing is stored that was not counted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.weights import bitstream
from hf_actcompress.weights.bitstream import from_gaps, gap_width, nbytes, pack, to_gaps, unpack, width_of


@given(st.integers(0, 20), st.data())
def test_codes_come_back(width, data):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40)), dtype=np.int64)
    packed = pack(codes, width)
    assert packed.nbytes == nbytes(len(codes), width)
    np.testing.assert_array_equal(unpack(packed, len(codes), width), codes)


def test_long_runs(monkeypatch):
    monkeypatch.setattr(bitstream, "RUN", 64)
    codes = np.random.default_rng(0).integers(0, 8, 1001)
    np.testing.assert_array_equal(unpack(pack(codes, 3), 1001, 3), codes)


@given(st.sets(st.integers(0, 3000), max_size=60))
def test_positions_come_back_in_the_best_width(positions):
    positions = np.array(sorted(positions), dtype=np.int64)
    width, fields = gap_width(positions)
    np.testing.assert_array_equal(from_gaps(to_gaps(positions, width), width), positions)
    assert len(to_gaps(positions, width)) == fields
    for other in range(1, 13):
        assert width * fields <= other * len(to_gaps(positions, other))
        np.testing.assert_array_equal(from_gaps(to_gaps(positions, other), other), positions)


@pytest.mark.parametrize(("k", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (65, 7)])
def test_bits_of_k_things(k, bits):
    assert width_of(k) == bits


def test_positions_without_gaps_take_no_bits():
    assert gap_width(np.arange(50)) == (0, 50)
    np.testing.assert_array_equal(from_gaps(np.zeros(50, np.int64), 0), np.arange(50))
