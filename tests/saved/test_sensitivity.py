"""Sensitivities of saved tensors: read off many at once where that is the same, and as they are on the whole batch."""

import pytest
import torch
from helpers import loss_of
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.observe.gradients import ExactPass
from hf_actcompress.saved import kept, sensitivity


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(kept, "SMALLEST", 16)
    monkeypatch.setattr(sensitivity, "COST", 1e9)


def errors_of(model, run, seed=0):
    config = ActCompressConfig(first=0, last=0, saved="auto:budget=0.25", seed=seed)
    with compress_model(model, config) as handle:
        run(model)
        return {name: slot.error for name, slot in handle.budget.slots.items()}


def means_of(model, run, draws=5):
    found = [errors_of(model, run, seed) for seed in range(draws)]
    return {name: sum(errors[name] for errors in found) / draws for name in found[0]}


def passes_of(monkeypatch):
    plain, seen = ExactPass.backward, []
    monkeypatch.setattr(ExactPass, "backward", lambda self: seen.append(1) or plain(self))
    return seen


class Sums(nn.Module):
    """Saves nothing, and its result cannot be made again."""

    def forward(self, x):
        return x.cumsum(-1)


def test_together_and_one_by_one_are_the_same(monkeypatch):
    """Layers whose input goes into their own gradient alone share one backward pass."""
    torch.manual_seed(0)
    parts = [part for i in range(4) for part in (nn.Conv2d(4 * 2**i, 8 * 2**i, 3, padding=1), Sums())]
    model, batch = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten()).train(), torch.randn(16, 4, 8, 8)

    def run(model):
        return model(batch).square().sum()

    seen = passes_of(monkeypatch)
    together, few = means_of(model, run), len(seen)
    monkeypatch.setattr(sensitivity, "PRODUCTS", ())
    alone = means_of(model, run)
    assert few < len(seen) - few and together.keys() == alone.keys()
    ratios = torch.tensor([together[n] / alone[n] for n in together if alone[n] > 1e-9])
    assert len(ratios) > 3 and ((0.4 < ratios) & (ratios < 2.5)).all(), ratios  # means of a few draws
    assert 0.8 < ratios.log().mean().exp() < 1.25


def test_a_layer_that_runs_twice_is_measured_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.once = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.once(self.shared(self.shared(x).cumsum(1)).cumsum(1)).sum()

    trial = trial_of(Twice(), torch.randn(64, 32))
    assert set(trial.local()) == {"once#0"}


def trial_of(model, batch):
    """The trial of the measurement at the first forward pass."""
    found, plain = [], sensitivity.Trial.local

    def local(self):
        found.append(self)
        return plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity.Trial, "local", local)
        errors_of(model, lambda m: loss_of(m, batch) if isinstance(batch, dict) else m(batch))
    return found[0]


def test_batch_norms_of_few_rows_are_rated_as_on_all(monkeypatch):
    """Two convolutions with a norm between them on maps of 3x3: error through the norm by 4 and by all 64 rows."""

    def error(rows, settled=sensitivity.SETTLED):
        monkeypatch.setattr(sensitivity, "ROWS", rows // 2)
        monkeypatch.setattr(sensitivity, "SETTLED", settled)
        found = []
        for seed in range(8):
            torch.manual_seed(seed)
            model = nn.Sequential(
                nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            )  # fmt: skip
            x = torch.randn(64, 8, 3, 3)
            found.append(errors_of(model, lambda m, x=x: m(x))["1#0"])
        return torch.tensor(found).median().item()

    whole = error(64)
    assert whole / 3 < error(4) < whole * 3
    assert error(4, settled=0) > 1.3 * whole  # as they come out, with what the next layer adds
