"""Models that people train, on two and three stages: tied weights, frozen stages, loss scaling."""

import json

import pytest
import torch
from helpers.processes import ROOT, forked

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
CASES = {
    2: ["gpt2/line", "bert/line", "gpt2/v", "deberta-v2/v", "frozen/line", "frozen/v", "gpt2/line/scaled"],
    3: ["gpt2/line", "llama/line", "bert/line", "deberta-v2/line", "frozen/line"],
}
OVERFLOW = 5
LINES = [(size, case) for size, cases in CASES.items() for case in cases]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = {}
    for size, cases in CASES.items():
        folder = tmp_path_factory.mktemp("models")
        forked(ROOT / "tests/helpers/pipeline_models.py", folder, *cases, processes=size)
        found[size] = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(size)]
    return found


@pytest.mark.parametrize(("size", "case"), [line for line in LINES if "scaled" not in line[1]])
def test_losses_and_weights_are_those_of_one_process(ranks, size, case):
    found = [rank[case] for rank in ranks[size]]
    losses = next(one["losses"] for one in found if one["losses"])
    assert losses == pytest.approx(found[0]["alone"], abs=1e-5) and len(losses) == 20
    assert all(one["weights"] < 1e-5 for one in found)


@pytest.mark.parametrize(("size", "case"), LINES)
def test_copies_of_tied_parameters_stay_equal(ranks, size, case):
    found = [rank[case] for rank in ranks[size]]
    tied = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight",
            "bert": "bert.embeddings.word_embeddings.weight", "deberta-v2": "deberta.encoder.rel_embeddings.weight"}
    name = tied.get(case.split("/")[0])
    if name is None:
        assert found[0]["shared"] == {} and all("shared" not in one or not one.get("shared") for one in found)
        return
    stages = found[0]["shared"][name]
    owners = [found[k if "line" in case else min(k, 2 * size - 1 - k)] for k in stages]
    assert len({one["copies"][name] for one in owners}) == 1
    # The V's first and last stage are on one rank: nothing has to be sent.
    sent = sum(one.get("shared", 0) for rank in found for one in rank["bytes"])
    assert (sent == 0) == (case == "gpt2/v")


def test_no_gradient_is_sent_where_nothing_before_learns(ranks):
    """Two stages of two layers: the first is frozen, and so is half of the second; a rank of three has nothing."""
    for size in (2, 3):
        found = [rank["frozen/line"] for rank in ranks[size]]
        assert [one["trained"] > 0 for one in found] == [False] * (size - 1) + [True]
        assert all(one["bytes"][0].get("backward", 0) == 0 for one in found)
        assert found[0]["bytes"][0]["forward"] > 0
    assert all(one["frozen/v"]["bytes"][0].get("backward", 0) == 0 for one in ranks[2])


def test_a_step_that_overflows_is_skipped_by_all_stages(ranks):
    found = [rank["gpt2/line/scaled"] for rank in ranks[2]]
    losses = next(one["losses"] for one in found if one["losses"])
    for one in found:
        assert one["moved"] == [step != OVERFLOW for step in range(20)] and one["finite"]
        assert one["scales"][: OVERFLOW + 1] == [1024.0] * (OVERFLOW + 1)
        assert one["scales"][OVERFLOW + 1 :] == [512.0] * (19 - OVERFLOW)
    assert losses[:OVERFLOW] == pytest.approx(found[0]["alone"][:OVERFLOW], abs=1e-4)
    assert losses[-1] == pytest.approx(found[0]["alone"][-1], abs=0.05)
