"""Bits under a budget: the allotment is the best there is, and measuring disturbs nothing."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers import batch_of, build, loss_of
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.observe.gradients import ExactPass
from hf_actcompress.observe.target import SavedTarget
from hf_actcompress.saved import budget, kept, sensitivity
from hf_actcompress.saved.budget import CHOICES, Budget, allot
from hf_actcompress.saved.sensitivity import REFERENCE, Slot, Trial


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiny models have tiny tensors."""
    monkeypatch.setattr(kept, "SMALLEST", 16)


def auto(share, **options):
    return ActCompressConfig(first=0, last=0, saved=f"auto:budget={share}", **options)


def trial_of(errors, numel=800, fixed=0):
    trial = Trial(1.0, None)
    for i, error in enumerate(errors):
        trial.slots[f"layer.{i}#0"] = Slot(f"layer.{i}#0", 4 * numel, numel, 0, error)
    trial.fixed["masks"] = fixed
    trial.raw = 4 * numel * len(errors) + fixed
    return trial


def harm(errors, bits):
    return sum(e * ((2**REFERENCE - 1) / (2**b - 1)) ** 2 for e, b in zip(errors, bits, strict=True))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.15, 0.2])
def test_no_other_choice_within_the_budget_is_better(share):
    errors = [1e-4, 3e-2, 1.0, 2e-3]
    trial = trial_of(errors)
    slots, found = trial.slots.values(), list(allot(trial, SavedTarget(share)).values())
    allowed = share * 4 * 800 * 4
    assert sum(slot.nbytes(b) for slot, b in zip(slots, found, strict=True)) <= allowed
    # Greedy steps are optimal up to one step that no longer fits: no choice of a step's bytes less is better.
    for bits in itertools.product(CHOICES, repeat=4):
        if sum(800 * b // 8 for b in bits) <= allowed - 2 * 800 // 8:
            assert harm(errors, found) <= harm(errors, bits) * (1 + 1e-9)
    assert found[2] >= found[1] >= found[3] >= found[0]


def test_no_tensor_gets_less_than_the_least():
    assert min(allot(trial_of([1e-9, 1.0, 1.0]), SavedTarget(0.1), 2).values()) == 2
    assert allot(trial_of([1e-9, 1.0, 1.0]), SavedTarget(0.06), 2) is None


def test_all_bits_where_the_budget_has_no_limit():
    assert set(allot(trial_of([1.0, 0.0]), SavedTarget(0.9)).values()) == {8}


def test_a_budget_that_cannot_be_met_names_what_fills_it():
    with pytest.raises(ValueError, match=r"budget=0.05 cannot be met.*share of 0\.[0-9]+.*masks 0.00 MB.*larger one"):
        allot(trial_of([1.0, 1.0], fixed=2000), SavedTarget(0.05))


@pytest.mark.parametrize("bad", ["auto", "auto:budget=0", "auto:budget=1", "auto:budget=x", "auto:bits=4", "auto:"])
def test_wrong_budgets_are_refused(bad):
    with pytest.raises(ValueError, match="budget between 0 and 1"):
        ActCompressConfig(saved=bad)


@pytest.mark.parametrize("bad", ["auto:memory=0GB", "auto:memory=8", "auto:memory=x", "auto:memory=1GB,budget=0.1"])
def test_wrong_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="is no size; write it as 8GB|either budget or memory"):
        ActCompressConfig(saved=bad)


def test_the_bytes_that_are_held_are_those_that_are_allowed():
    model, batch = build("bert").train(), batch_of("bert")
    with compress_model(model, ActCompressConfig(saved="auto:memory=0.025mb")) as handle:
        loss_of(model, batch).backward()
        record = handle.meters["saved"].record()
        raw, held = record["raw_bytes"], record["payload_bytes"]
        assert str(handle.budget) == "auto:memory=0.025MB"
    assert 1.7e4 < held <= 2.6e4 < raw, (held, raw)
    with compress_model(model, ActCompressConfig(saved="auto:memory=1KiB")):
        with pytest.raises(ValueError, match="memory=1KiB cannot be met"):
            loss_of(model, batch)


@pytest.mark.parametrize("name", ["bert", "mobilenetv2_100", "vit"])
def test_the_share_that_is_held_is_the_budget(name):
    model, batch = build(name).train(), batch_of(name)
    share = 0.1 if name == "mobilenetv2_100" else 0.08
    with compress_model(model, auto(share)) as handle:
        loss_of(model, batch).backward()
        record, table = handle.meters["saved"], handle.budget.table()
    assert 0.7 * share < record.payload_bytes / record.raw_bytes <= share + 0.01
    assert len({row["bits"] for row in table}) > 1 and all(row["error"] is not None for row in table)


def test_measuring_changes_nothing_but_bits():
    """Gradients, buffers, random numbers, boundaries and counters are as without."""
    model, batch = build("mobilenetv2_100").train(), batch_of("mobilenetv2_100")
    model.dropout = nn.Dropout(0.5)
    twin = copy.deepcopy(model)
    config = ActCompressConfig(codec="block:bits=4,round=stochastic", saved="auto:budget=0.2")
    with compress_model(model, config) as handle:
        torch.manual_seed(1)
        loss_of(model, batch).backward()
        calls = {row["calls"] for row in handle.stats()}
    assert calls == {1} and all(p.grad is not None for p in model.parameters())
    with compress_model(twin, ActCompressConfig(codec="block:bits=4,round=stochastic")):
        torch.manual_seed(1)
        loss_of(twin, batch).backward()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_errors_are_those_of_the_gradients():
    """One linear layer whose input is rounded: the squared error of its weights' gradient, against a direct sum."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 8, bias=False)), torch.randn(64, 32)
    with compress_model(model, auto(0.2)) as handle:
        model(x)
        slot, = handle.budget.slots.values()
    rows = x[: sensitivity.ROWS]
    step = (rows.amax() - rows.amin()) / 15
    expected = float(step**2 / 12 / rows.square().mean())  # a twelfth of a squared step
    assert expected / 3 < slot.error < expected * 3


def test_sensitive_tensors_get_more_bits():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.quiet = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x, y):
            return (self.loud(x) + 1e-3 * self.quiet(y)).square().sum()

    model = Two()
    with compress_model(model, auto(0.125)) as handle:
        model(torch.randn(64, 64), torch.randn(64, 64)).backward()
        slots = handle.budget.slots
    assert slots["loud#0"].bits > slots["quiet#0"].bits


def test_it_is_measured_now_and_then_and_goes_on_from_a_checkpoint(monkeypatch):
    monkeypatch.setattr(Budget, "every", 3)
    model, x, seen = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)), torch.randn(64, 32), []
    plain = budget.measure
    monkeypatch.setattr(budget, "measure", lambda *args: seen.append(1) or plain(*args))
    with compress_model(model, auto(0.15)) as handle:
        for _ in range(4):
            model(x).sum().backward()
        assert len(seen) == 2
        state = handle.state_dict()
        table = handle.budget.table()
    with compress_model(model, auto(0.15)) as handle:
        assert handle.load_state_dict(copy.deepcopy(state)) == []
        assert handle.budget.table() == table
        for _ in range(2):
            model(x).sum().backward()
        assert len(seen) == 2  # two of three passes were done
    with compress_model(model, auto(0.25)) as handle:
        assert handle.load_state_dict(state) == ["saved"]


def test_no_choice_depends_on_a_clock(monkeypatch):
    """The same bits, whether a second takes none or an hour."""
    tables = []
    for hurry in (0.0, 3600.0):
        times = itertools.count(step=hurry) if hurry else itertools.repeat(0.0)
        monkeypatch.setattr("time.perf_counter", lambda times=times: next(times))
        model, batch = build("bert").train(), batch_of("bert")
        with compress_model(model, auto(0.2)) as handle:
            torch.manual_seed(1)
            loss_of(model, batch).backward()
            tables.append(handle.budget.table())
    assert tables[0] == tables[1] and len({row["error"] for row in tables[0]}) > 12


def test_so_many_passes_are_run_as_a_few_steps_cost(monkeypatch):
    plain, seen = ExactPass.backward, []
    monkeypatch.setattr(ExactPass, "backward", lambda self: seen.append(1) or plain(self))
    monkeypatch.setattr(sensitivity, "COST", 2.0)
    model, batch = build("bert").train(), batch_of("bert")
    with compress_model(model, auto(0.2)) as handle:
        loss_of(model, batch).backward()
        slots = len(handle.budget.slots)
    # 4 rows are twice the 2 that are taken, and a backward pass is 2/3 of a step; then linear layers together, and
    # the allotments that are tried.
    assert len(seen) <= 2 * 2 * 3 / 2 + 1 + len(budget.LEAST) < slots


def test_what_was_not_measured_takes_its_nearest_relative(monkeypatch):
    monkeypatch.setattr(sensitivity, "COST", 0.0)
    model, batch = build("bert").train(), batch_of("bert")
    with compress_model(model, auto(0.2)) as handle:
        loss_of(model, batch).backward()
        assert all(row["error"] is not None and math.isfinite(row["error"]) for row in handle.budget.table())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_are_plain_and_do_not_hold_the_handle(duplicate):
    model = nn.Sequential(nn.Linear(32, 32))
    with compress_model(model, auto(0.2)) as handle:
        model(torch.randn(64, 32)).sum().backward()
        calls, twin = handle.meters["saved"].calls, duplicate(model)
        twin(torch.randn(64, 32)).sum().backward()
        assert type(twin) is nn.Sequential and handle.meters["saved"].calls == calls
        assert list(handle.budget.bits) == ["0#0"] == list(handle.budget.slots)
        assert handle.budget.bits["elsewhere"] == int(32 * 0.2)


def test_values_that_cannot_be_coded_are_counted_once():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Tanh()), torch.randn(64, 32)
    x[0, 0] = math.nan
    with compress_model(model, auto(0.25)) as handle:
        model(x).sum().backward()
        assert 0 < handle.meters["saved"].counts().nonfinite <= 2
        model(torch.randn(64, 32)).sum().backward()
        assert all(1 <= row["bits"] <= 8 for row in handle.budget.table())
