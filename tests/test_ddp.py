"""Two processes on gloo: transparent under DistributedDataParallel, with a state of each rank's own."""

import json

import pytest
import torch
from helpers.processes import ROOT, forked

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    forked(ROOT / "tests/helpers/ddp_run.py", folder, processes=2)
    return folder, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_identity_changes_nothing_and_a_lossy_codec_does(ranks):
    for found in ranks[1]:
        assert found["calls identity"] == found["calls uniform:bits=2"] == [3] * 8
        assert found["changed identity"] == []
        assert "loss" in found["changed uniform:bits=2"]
        assert found["hooks identity"] == {}


def test_the_trainer_compresses_on_every_rank_and_keeps_them_in_step(ranks):
    one, other = ranks[1]
    assert one["steps"] == one["expected steps"]
    assert one["calls"] == other["calls"] == [one["steps"]]
    assert one["whole"] == other["whole"]
    assert {"eval_loss", "eval_uncompressed_loss"} <= set(one["metrics"])
    assert one["hooks"] == {}


def test_a_resumed_and_analysed_run_is_the_unbroken_run(ranks):
    folder, (one, other) = ranks
    assert one["resumed"] == other["resumed"] == one["whole"]
    assert one["analysed"] == other["analysed"] == [4, 6]
    states = sorted(path.name for path in (folder / "run" / "checkpoint-3").glob("actcompress_state*"))
    assert states == ["actcompress_state_rank0.safetensors", "actcompress_state_rank1.safetensors"]
    first, second = ((folder / "run" / "checkpoint-3" / name).read_bytes() for name in states)
    assert first != second
