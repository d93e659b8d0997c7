"""Gradients of data-parallel processes: means of what was decoded, in DDP, FSDP2 and a Trainer."""

import json
import logging

import pytest
import torch
from helpers import build, text_batch
from helpers.processes import ROOT, forked

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.reduce import PowerSGD, parse_reduce

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
CODECS = ["identity", "ef+block:bits=4", "block:bits=8,round=stochastic", "ef+topk:ratio=0.1", "block:bits=4"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = {}
    for size in (2, 3):
        folder = tmp_path_factory.mktemp("reduce")
        forked(ROOT / "tests/helpers/reduce_run.py", folder, processes=size)
        found[size] = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
    return found


@needs_gloo
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("spec", CODECS)
def test_all_ranks_get_the_same_mean(ranks, size, spec):
    found = [rank[f"exchange {spec}"] for rank in ranks[size]]
    assert len({one["sum"] for one in found}) == 1 and all(one["unchanged"] for one in found)
    if spec == "identity":
        assert found[0]["first"] < 1e-6
    else:
        assert 0.005 < found[0]["first"] < 0.9


@needs_gloo
@pytest.mark.parametrize("size", [2, 3])
def test_error_feedback_makes_up_for_what_was_lost_in_both_directions(ranks, size):
    """The mean over 20 steps of one tensor: without feedback it stays as wrong as the first."""
    found = ranks[size][0]
    assert found["exchange ef+block:bits=4"]["last"] < 0.1 * found["exchange ef+block:bits=4"]["first"]
    assert found["exchange block:bits=4"]["last"] > 0.99 * found["exchange block:bits=4"]["first"]
    assert found["exchange ef+topk:ratio=0.1"]["last"] < 0.5 * found["exchange ef+topk:ratio=0.1"]["first"]


@needs_gloo
def test_bytes_are_those_of_payloads_both_ways(ranks):
    """10,000 values are two chunks of 5,120, each twice on the way: codes, and a scale and a minimum per 128."""
    whole, payload = 10_000 * 4, 2 * (5120 * 4 // 8 + 5120 // 128 * 4)
    assert ranks[2][0]["exchange ef+block:bits=4"]["ratio"] == pytest.approx(whole / payload)


@needs_gloo
def test_nan_comes_out_where_it_went_in_and_goes_again(ranks):
    for rank in ranks[2]:
        assert rank["nan"] == [128, True] and rank["small"] < 1e-6


@needs_gloo
@pytest.mark.parametrize("spec", [*CODECS, "powersgd:rank=2,start=2"])
def test_ddp(ranks, spec):
    limits = {"identity": 1e-6, "ef+block:bits=4": 0.3, "block:bits=8,round=stochastic": 0.1, "block:bits=4": 0.6}
    found = [rank[f"ddp {spec}"] for rank in ranks[2]]
    assert len({one["sum"] for one in found}) == 1
    for one in found:
        assert one["error"] < limits.get(spec, 0.2) and one["direction"] == "reduce" and one["calls"] >= 6
        assert one["off"] and one["after"]  # disabled() and remove() leave plain means
    assert found[0]["ratio"] == pytest.approx(1, abs=0.05) if spec == "identity" else found[0]["ratio"] > 1.5


@needs_gloo
def test_powersgd_is_torchs_own(ranks):
    assert all(rank["powersgd as torch's"] == 0 for rank in ranks[2])


@needs_gloo
def test_a_second_hook_is_refused(ranks):
    assert "this DistributedDataParallel has a communication hook already" in ranks[2][0]["second hook"]


@needs_gloo
@pytest.mark.parametrize("spec", ["ef+block:bits=2,round=stochastic", "powersgd:rank=2,start=2"])
def test_state_goes_on_where_it_was(ranks, spec):
    assert all(rank[f"resumed {spec}"] == [[], 0.0] for rank in ranks[2])


@needs_gloo
def test_fsdp(ranks):
    for rank in ranks[2]:
        assert rank["sharded identity"] == 0 and 0 < rank["sharded ef+block:bits=8"] < 0.05
        assert rank["sharded ratio ef+block:bits=8"] == pytest.approx(4 / (1 + 4 / 128), rel=0.05)
        assert rank["sharded after ef+block:bits=8"] and rank["sharded calls identity"] > 1


@needs_gloo
def test_a_trainer_resumes_to_the_same_weights(ranks):
    for rank in ranks[2]:
        assert rank["trainer calls"] >= rank["steps"] == 8
        assert rank["whole"] == rank["resumed"] == ranks[2][0]["whole"]


def test_one_process_says_that_nothing_is_reduced(caplog):
    model = build("bert").train()
    with caplog.at_level(logging.WARNING), compress_model(model, ActCompressConfig(reduce="ef+block:bits=4")):
        for _ in range(4):
            model(**text_batch()).loss.backward()
    said = "reduce='ef+block:bits=4' has nothing to do: BertForSequenceClassification is trained by one process"
    assert caplog.text.count(said) == 1
    assert not model._forward_pre_hooks


def test_a_model_is_attached_to_once():
    model = build("bert")
    handle = compress_model(model, ActCompressConfig(reduce="ef+block:bits=4"))
    with pytest.raises(ValueError, match="compressed already"):
        compress_model(model, ActCompressConfig(reduce="block:bits=4"))
    handle.remove()
    compress_model(model, ActCompressConfig(reduce="block:bits=4")).remove()


@pytest.mark.parametrize(("spec", "message"), {
    "powersgd:rank=0": "rank=0 is not a whole number of 1 or more", "powersgd:rank=x": "'rank=x' is no whole number",
    "powersgd:start=1": "start=1 is not a whole number of 2", "powersgd:bits=2": "has the options rank and start",
    "delta+block:bits=4": "remembers samples", "nothing": "nothing",
}.items())  # fmt: skip
def test_wrong_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_reduce(spec)
    with pytest.raises(ValueError, match=f"reduce: .*{message}"):
        ActCompressConfig(reduce=spec)


def test_configuration():
    config = ActCompressConfig(reduce="ef+block:bits=4")
    assert not config.boundaries and config.first == 0 and config.saved is None
    assert ActCompressConfig.from_dict(config.to_dict()) == config
    assert ActCompressConfig(reduce="powersgd").reduce == "powersgd:rank=4"
    assert parse_reduce("powersgd:rank=2,start=5") == PowerSGD(2, 5)
    assert ActCompressConfig("block:bits=4", reduce="ef+block:bits=4", saved="block:bits=4").boundaries
    with pytest.raises(ValueError, match="first=2 belongs to layer boundaries, and with reduce='ef.block:bits=4'"):
        ActCompressConfig(reduce="ef+block:bits=4", first=2)
