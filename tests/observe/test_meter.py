"""Counters, samples and distances against arithmetic by hand."""

import math

import pytest
import torch

from hf_actcompress.observe.events import Event
from hf_actcompress.observe.measures import FEW, distance, pick
from hf_actcompress.observe.meter import Meter
from hf_actcompress.observe.nonfinite import Nonfinite


def test_a_meter_without_calls_has_no_ratio_and_no_error():
    record = Meter().record()
    assert record == {
        "calls": 0, "ratio": None, "rel_error": None, "cosine": None, "raw_bytes": 0, "payload_bytes": 0,
        "bytes_saved": 0, "nonfinite": 0, "seconds": 0.0,
    }  # fmt: skip


def test_counts_add_up():
    meter = Meter()
    meter.count(100, 25, 0.5)
    meter.count(60, 15, 0.25)
    record = meter.record()
    assert (record["calls"], record["raw_bytes"], record["payload_bytes"], record["bytes_saved"]) == (2, 160, 40, 120)
    assert (record["ratio"], record["seconds"]) == (4.0, 0.75)


@pytest.mark.parametrize(("every", "sampled"), [(0, []), (1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (10, [0])])
def test_which_calls_are_sampled(every, sampled):
    meter, due = Meter(every=every), []
    for call in range(5):
        if meter.due():
            due.append(call)
        meter.count(1, 1, 0.0)
    assert due == sampled


def test_errors_are_means_over_the_samples():
    meter = Meter()
    x = torch.tensor([3.0, 4.0])
    meter.sample(x, x + torch.tensor([0.0, 1.0]))  # error 1 / 5
    meter.sample(x, torch.tensor([4.0, -3.0]))  # orthogonal: error sqrt(1 + 49) / 5, cosine 0
    cosine = (9 + 20) / (5 * math.sqrt(9 + 25))
    assert meter.record()["rel_error"] == pytest.approx((0.2 + math.sqrt(50) / 5) / 2)
    assert meter.record()["cosine"] == pytest.approx(cosine / 2)


def test_nan_is_counted_and_not_sampled():
    found = Nonfinite()
    meter = Meter()
    for x in (torch.tensor([3.0, 4.0]), torch.tensor([math.nan, 4.0])):
        for y in (x, torch.tensor([math.inf, 1.0])):
            meter.sample(x, y)
    found.on(torch.device("cpu")).add_(2)
    meter(Event("boundary", "x", "forward", nonfinite=found))
    counts = meter.counts()
    assert (counts.samples, counts.error, counts.cosine, counts.nonfinite) == (1, 0, 1, 2)


def test_differences_are_those_of_the_interval():
    meter, found = Meter(every=3), Nonfinite()
    meter.count(10, 5, 1.0)
    meter.sample(torch.ones(2), torch.zeros(2))
    earlier = meter.counts()
    meter(Event("boundary", "x", "forward", 20, 4, seconds=0.5, nonfinite=found))
    found.on(torch.device("cpu")).add_(1)
    meter.sample(torch.ones(2), torch.ones(2))
    between = meter.counts() - earlier
    assert (between.calls, between.raw_bytes, between.payload_bytes, between.seconds) == (1, 20, 4, 0.5)
    assert (between.nonfinite, between.samples) == (1, 1)
    assert between.record()["rel_error"] == 0
    assert between.record()["ratio"] == 5


def test_a_meter_goes_on_from_the_counts_of_a_checkpoint():
    meter, other = Meter(), Meter()
    meter.count(10, 5, 1.0)
    meter.sample(torch.ones(2), torch.zeros(2))
    other.load_state_dict({**meter.state_dict(), "every": 7, "nonfinite": 3})  # version 0.1 wrote `every`
    assert other.every == 10 and other.state_dict() == {**meter.state_dict(), "nonfinite": 3}
    other.count(1, 1, 1.0)
    other.sample(torch.ones(2), torch.ones(2))
    assert (other.record()["calls"], other.record()["rel_error"]) == (2, 0.5)


@pytest.mark.parametrize(("x", "y", "error", "cosine"), [
    ([0.0, 0.0], [0.0, 0.0], 0.0, 1.0),
    ([0.0, 0.0], [1.0, 0.0], math.inf, 0.0),
    ([2.0, 0.0], [0.0, 0.0], 1.0, 0.0),
    ([2.0, 0.0], [-2.0, 0.0], 2.0, -1.0),
    ([2e-30, 0.0], [1e-30, 0.0], 0.5, 1.0),  # squares that fp32 could not hold
    ([2e30, 0.0], [1e30, 0.0], 0.5, 1.0),
])  # fmt: skip
def test_distance(x, y, error, cosine):
    assert distance(torch.tensor(x), torch.tensor(y)) == pytest.approx((error, cosine))


def test_pick_takes_all_of_a_small_tensor_and_an_even_sample_of_a_large_one():
    x = torch.arange(12.0, dtype=torch.bfloat16).view(3, 4)
    assert torch.equal(pick(x), torch.arange(12.0))
    assert pick(x).dtype == torch.float32
    big = torch.arange(10.0 * FEW)
    sample = pick(big)
    assert FEW * 0.8 <= sample.numel() <= FEW
    steps = sample.diff().unique()
    # An odd step does not fall in with a power of two of features.
    assert steps.numel() == 1
    assert steps.item() % 2 == 1
    assert sample[0] == 0


def test_pick_reads_a_permuted_tensor_in_memory_order_without_copying_it():
    base = torch.arange(4.0 * FEW).view(4, 128, FEW // 128)
    assert torch.equal(pick(base.permute(2, 0, 1)), pick(base))


def test_pick_of_a_scalar_and_of_nothing():
    assert torch.equal(pick(torch.tensor(3.0)), torch.tensor([3.0]))
    assert pick(torch.empty(0, 4)).numel() == 0
