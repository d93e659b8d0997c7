"""Saved tensors in two processes on gloo: replicas, shards of parameters, and DTensors."""

import json

import pytest
import torch
from helpers.processes import ROOT, forked

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    forked(ROOT / "tests/helpers/saved_run.py", folder, processes=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_replicas(ranks):
    for found in ranks:
        assert not found["ddp changed identity"] and found["ddp changed block:bits=4"]
        assert found["ddp share identity"] > 0.6 and found["ddp share block:bits=4"] < 0.25
        assert found["ddp share auto:budget=0.2"] < 0.21
        assert all(found[f"ddp in step {codec}"] for codec in ("identity", "block:bits=4", "auto:budget=0.2"))
        assert found["ddp hooks"] == {}


def test_sharded_parameters(ranks):
    for found in ranks:
        losses = found["fsdp losses"]
        assert losses["identity"] == losses["none"] != losses["block:bits=4"]
        assert losses["block:bits=4"][0] == losses["none"][0]  # forward values stay exact
        assert losses["block:bits=4"] == pytest.approx(losses["none"], rel=0.1)
        assert found["fsdp share block:bits=4"] < 0.25
        assert "fully_shard" in found["fsdp auto"] and "block:bits=4" in found["fsdp auto"]


def test_distributed_tensors(ranks):
    for found in ranks:
        assert found["dtensor identity"] and 0 < found["dtensor error"] < 0.05
        assert found["dtensor share block:bits=8"] < 0.4
        assert found["dtensor kind"] == ["DTensor", [64, 32], "S(0)"]


def test_the_trainer_keeps_ranks_in_step_and_resumes(ranks):
    one, other = ranks
    assert one["trained"] == other["trained"] == one["resumed"] == other["resumed"]
