"""Two processes train, evaluate, save, go on, and end with one clear error each where something is wrong.

All cases run in one call of helpers/pipeline_pairs.py, which has a pair of processes for each.
"""

import json
import re

import pytest
import torch
from helpers import build
from helpers.pipeline_pairs import CASES, ROWS, collate, rows, without_dropout
from helpers.processes import ROOT, forked
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is built without gloo")
FAILING = [
    "killed", "hangs", "absent", "other codec", "other codec on resuming", "other model", "damaged", "nan", "shape",
    "other secret", "other settings", "nowhere",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    for library in ("datasets", "sklearn", "timm"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("pairs")
    forked(ROOT / "tests/helpers/pipeline_pairs.py", folder)
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


def log(folder, case):
    return json.loads((folder / case / "log.json").read_text())


def losses(folder, case):
    return [entry["loss"] for entry in log(folder, case)["history"]]


def errors(report, case):
    """The error of each rank, without a mark of who came first."""
    found = []
    for one in report[case]:
        lines = [line for line in (one[1] if one else "").splitlines() if line.startswith("error: ")]
        found.append(lines[-1] if lines else None)
        assert len(lines) <= 1, lines
    return found


@pytest.mark.parametrize("case", [name for name in CASES if name not in FAILING])
def test_what_is_right_ends_well(report, case):
    assert [one[0] for one in report[case]] == [0, 0], report[case]


def test_losses_are_those_of_one_process_also_for_a_smaller_last_batch(folder):
    model, expected = without_dropout(build("bert")).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    steps, data = 12, rows()
    for epoch in range(4):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch)).tolist()
        for start in range(0, ROWS, 8):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (steps - len(expected)) / steps
            batch = collate([data[i] for i in order[start : start + 8]])
            labels = batch.pop("labels")
            loss = cross_entropy(model(**batch).logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    assert losses(folder, "plain") == pytest.approx(expected, abs=1e-5)
    merged = torch.load(folder / "plain" / "merged.pt")
    assert all(torch.allclose(value, merged[name], atol=1e-5) for name, value in model.state_dict().items())
    batch = collate(data[:19])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    found = log(folder, "plain")["metrics"]
    assert found["loss"] == pytest.approx(float(cross_entropy(logits, labels)), abs=1e-5)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))


def test_time_and_bytes_are_accounted_for(folder):
    """A batch of 8 rows in 4 micro-batches, two links each way; the last of an epoch is half as large."""
    first, later = (log(folder, "whole")["history"][step] for step in (0, 9))
    codec_bytes = [sum(rank["forward"] for rank in entry["ranks"]) for entry in (first, later)]
    values, header = 2 * 12 * 16, 64
    scales = -(-values // 128) * 4
    assert codec_bytes[0] == 2 * 4 * (values + scales + header)  # the first epoch in full
    assert codec_bytes[1] == 2 * 4 * (values // 4 + scales + 8 + header)
    for entry in (first, later):
        for rank in entry["ranks"]:
            parts = [rank[name] for name in ("compute", "encode", "decode", "wait")]
            assert sum(parts) == pytest.approx(rank["total"]) and min(parts) >= 0


def test_the_last_checkpoint_resumes_to_the_same_losses(folder, report):
    assert losses(folder, "killed") == losses(folder, "whole") and len(losses(folder, "whole")) == 12
    one, other = (torch.load(folder / case / "merged.pt") for case in ("whole", "killed"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    kept = sorted(path.name for path in (folder / "whole/checkpoints").iterdir())
    assert kept == ["step-12", "step-8"]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder, report):
    """And nothing is lost: the steps since then are trained again, to the same weights."""
    assert "resuming from step 8, and not from step 12: step 12 of rank 1 is damaged" in report["torn"][0][1]
    one, other = (torch.load(folder / case / "merged.pt") for case in ("whole", "torn"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_step_that_overflows_is_skipped(folder):
    found = losses(folder, "overflow")
    assert log(folder, "overflow")["skipped"] == 1 and len(found) == 12
    expected = losses(folder, "plain")
    assert found[0] == pytest.approx(expected[0], abs=1e-2) and found[-1] < found[0]


@pytest.mark.parametrize("case", FAILING)
def test_what_is_wrong_ends_every_process_in_time(report, case):
    for rank, one in enumerate(report[case]):
        if one is None:
            assert (case, rank) == ("absent", 1)
        elif (case, rank) == ("killed", 1):
            assert one[0] == -9
        else:
            assert one[0] == 1, one


@pytest.mark.parametrize(("case", "messages"), {
    "killed": [r"Stage 0, step 7, micro-batch \d, \w+ \w+ stage 1: the connection to rank 1 has closed", None],
    "hangs": [r"Stage 0, step 3, micro-batch \d, backward from stage 1: rank 1 did not answer within 2 s",
              r"Stage 1, step 3, .* the connection to rank 0 has closed.*Reported before: rank 0: .*did not answer"],
    "absent": [r"Rank 0: not all 2 processes came within 2 s", None],
    "other codec": [r"Stage 0, before the first step: stage 1 does not fit. codec: 'block:bits=4' here, 'block:b",
                    r"Stage 1, before the first step: stage 0 does not fit. codec: 'block:bits=3' here, 'block:b"],
    "other model": [r"stage 1 does not fit. model: 'BertFor.* here, 'RobertaFor",
                    r"stage 0 does not fit. model: 'RobertaFor.* here, 'BertFor"],
    "other codec on resuming": [r"The checkpoint was written with the codecs", r"The checkpoint was written with"],
    "damaged": [r"Stage 0, step 2, micro-batch 0, backward from stage 1: the payload was damaged on its way",
                r"(Stage 1, step 2|Rank 1, norm).*Reported before: rank 0: .*damaged"],
    "nan": [r"Stage 0, step 3, micro-batch 0, backward from stage 1: on the sender's side the tensor holds NaN",
            r"Stage 1, step 3, micro-batch 0, backward to stage 0: the tensor holds NaN"],
    "other secret": [r"rank 0: rank 1 of this run has another --secret than this one", r"Rank 1: rank 0 of this run"],
    "other settings": [r"Stage 0, before the first step: stage 1 does not fit. batch_size: 8 here, 12 there. seed: 0",
                       r"Stage 1, before the first step: stage 0 does not fit. batch_size: 12 here, 8 there"],
    "nowhere": [r"Rank 0 cannot write to '/proc/nowhere.*Give another --output_dir", r"Rank 1 cannot write to"],
    "shape": [r"a tensor of shape \(3, 12, 16\).*set up for \(4, 12, 16\)",
              r"Stage 1, step 2.*(Reported before: .*shape|closed)"],
}.items())  # fmt: skip
def test_errors_name_stage_micro_batch_and_cause(report, case, messages):
    for rank, (found, expected) in enumerate(zip(errors(report, case), messages, strict=True)):
        if expected is None:
            assert found is None
        else:
            assert found and re.search(expected, found, re.IGNORECASE), (rank, found, report[case][rank])


def test_scripts_leave_a_model_that_loads_unsplit(folder):
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    for kind, auto in {"glue": AutoModelForSequenceClassification, "cifar": AutoModelForImageClassification}.items():
        record = json.loads((folder / kind / "results.json").read_text())
        assert record["steps"] == 6 and record["metrics"]["accuracy"] >= 0 and len(record["ranks"]) == 2
        assert all(rank["wait"] >= 0 and rank["forward"] + rank["backward"] > 0 for rank in record["ranks"])
        model = auto.from_pretrained(folder / kind)
        assert all(torch.isfinite(p).all() for p in model.parameters())
