"""Two processes on gloo train as one does, linear and client-server, and what they send are payloads."""

import json

import pytest
import torch
from helpers.processes import ROOT, forked

from hf_actcompress.pipeline.wire import HEADER

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
KINDS = ("linear", "client-server")
STEPS, CHUNKS, VALUES = 20, 4, 2 * 12 * 16  # values of one micro-batch on the link


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    forked(ROOT / "tests/helpers/pipeline_run.py", folder, processes=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_with_identity_two_processes_are_one(ranks, kind):
    found = [rank[f"{kind} identity"] for rank in ranks]
    losses = found[0]["losses"] or found[1]["losses"]
    assert losses == pytest.approx(ranks[0]["alone"], abs=1e-5) and len(losses) == STEPS
    assert all(one["weights"] == 0 for one in found)
    assert sorted(found[0]["names"] + found[1]["names"]) == ranks[0]["all names"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lossy_codec_trains_nearly_alike(ranks, kind):
    for codec in ("block:bits=4", "ef+topk:ratio=0.3"):
        found = [rank[f"{kind} {codec}"] for rank in ranks]
        losses = found[0]["losses"] or found[1]["losses"]
        assert losses != ranks[0]["alone"]
        assert losses == pytest.approx(ranks[0]["alone"], abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_payloads_are_what_is_sent(ranks, kind):
    for rank in ranks:
        for sent, raw in zip(rank[f"{kind} identity"]["bytes"], rank[f"{kind} identity"]["raw"], strict=True):
            directions = 1 if raw == STEPS * CHUNKS * VALUES * 4 else 2
            assert raw == directions * STEPS * CHUNKS * VALUES * 4
            assert sent == raw + directions * STEPS * CHUNKS * HEADER
        assert sum(rank[f"{kind} block:bits=4"]["bytes"]) < 0.35 * sum(rank[f"{kind} identity"]["bytes"])


def test_a_state_is_kept_for_each_link_direction_and_micro_batch(ranks):
    # Stochastic gradients from the last stage on; error feedback in both directions.
    assert [rank["linear block:bits=4"]["codec_state"] for rank in ranks] == [0, CHUNKS]
    assert [rank["linear ef+topk:ratio=0.3"]["codec_state"] for rank in ranks] == [CHUNKS, CHUNKS]
