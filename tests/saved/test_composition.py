"""Saved tensors together with checkpointing, boundaries, autocast, user hooks, second derivatives, copies."""

import copy
import math
import pickle

import pytest
import torch
from helpers import batch_of, build, differing, hooks_on, loss_of, points, stack, train_steps
from helpers.saved import Wrapped, backward_of, gradients, only
from torch import nn
from torch.nn import functional as F

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.models.replay import undisturbed

pytestmark = pytest.mark.usefixtures("small_tensors")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_inputs_are_coded_and_recomputation_is_not(reentrant):
    model, (x, y) = stack(segments=2, reentrant=reentrant, dropout=0.0), points(64, 8)
    plain = copy.deepcopy(model).train()
    F.cross_entropy(plain(x), y.repeat(1)[: len(x)]).backward()
    model.train()
    with compress_model(model, only("block:bits=8")) as handle:
        F.cross_entropy(model(x), y).backward()
        held = handle.meters["saved"].raw_bytes
    # two checkpoints of two blocks: their inputs, and the head's
    assert held == 3 * 64 * 8 * 4
    change = gradients(model) - gradients(plain)
    assert 0 < change.norm() < 0.05 * gradients(plain).norm()


def test_the_forward_pass_of_a_checkpointed_model_runs_nothing_again():
    """Blocks that end with a norm: its result is what the next checkpoint holds, and is no tensor of the norm's."""
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(4)
            )

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    torch.manual_seed(0)
    model, x, y, calls = Model(), torch.randn(32, 64), torch.randn(32, 64), []
    (model(x) * y).sum().backward()
    exact = gradients(model)
    for block in model.blocks:
        block.register_forward_hook(lambda *args: calls.append(1))
    model.zero_grad()
    with compress_model(model, only("block:bits=8")) as handle:
        loss = (model(x) * y).sum()
        assert len(calls) == 4
        loss.backward()
        row, = (row for row in handle.report() if row["operation"] == "checkpoint" and row["kept"] == "codes")
    assert row["tensors"] == 3 and row["held_bytes"] < row["raw_bytes"] / 3
    assert 0 < (gradients(model) - exact).norm() < 0.05 * exact.norm()


def test_with_boundaries_and_under_bf16():
    model = build("bert")
    batches = [batch_of("bert", seed) for seed in range(2)]
    plain = train_steps(copy.deepcopy(model), batches, autocast=True)
    config = ActCompressConfig("identity", first=1, last=1, saved="identity")
    with compress_model(model, config) as handle:
        assert not differing(plain, train_steps(model, batches, autocast=True))
        assert [row["direction"] for row in handle.stats()] == ["forward", "backward"] * 2 + ["saved"]


def test_nested_hooks_of_a_user_are_theirs():
    seen = []

    def function(x):
        y = x.sin()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            z = y.cos()
        return z.tanh()

    x = torch.randn(64, 64)
    _, grad, record = backward_of(function, x, "block:bits=12")
    expected = x.clone().requires_grad_()
    function(expected).sum().backward()
    assert len(seen) == 2 and record.raw_bytes == 2 * 64 * 64 * 4
    torch.testing.assert_close(grad, expected.grad, rtol=0, atol=1e-2)


def test_a_tensor_that_is_kept_and_changed_in_place_raises_as_without():
    def function(x):
        w = torch.ones(8, requires_grad=True)  # small: kept as it is
        y = w * 1.0
        z = (y * x.sum()).exp()
        with torch.no_grad():
            z.add_(1.0)
        return z

    with pytest.raises(RuntimeError, match="modified by an inplace operation.*shape .8,.*is at version 1, expected"):
        backward_of(function, 0.01 * torch.randn(64))


def test_backward_twice_and_second_derivatives():
    """What was coded would make second derivatives wrong: they raise, and are exact where nothing was."""
    x = torch.randn(64, 64, requires_grad=True)
    model = Wrapped(lambda x: (x.sigmoid() * x).sum())
    with compress_model(model, only("block:bits=16")):
        y = model(x)
        one, = torch.autograd.grad(y, x, retain_graph=True)
        two, = torch.autograd.grad(y, x, retain_graph=True)
        assert torch.equal(one, two)
        with pytest.raises(RuntimeError, match=r"second derivatives .*handle.disabled\(\)"):
            torch.autograd.grad(y, x, create_graph=True)
    plain, = torch.autograd.grad(model(x), x, create_graph=True)
    expected, = torch.autograd.grad(plain.sum(), x)
    with compress_model(model, only("identity")):
        first, = torch.autograd.grad(model(x), x, create_graph=True)
        second, = torch.autograd.grad(first.sum(), x)
    assert torch.equal(first, plain) and torch.equal(second, expected)


def test_functional_transforms_are_refused_by_torch_itself():
    model = nn.Linear(64, 64)
    with compress_model(model, only("block:bits=4")), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: model(x).sum())(torch.randn(32, 64))
    assert not hooks_on(model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_cannot_be_coded(bad):
    x = torch.randn(64, 64)
    x[3, 4] = bad
    _, grad, record = backward_of(lambda x: x.square().sum(1), x)
    assert record.nonfinite == 1
    lost = torch.zeros(64, 64, dtype=torch.bool)
    lost[3] = True  # the group of that value
    assert torch.equal(grad.isnan(), lost)
    with pytest.raises(FloatingPointError, match=r"saved: NaN, Inf.*shape \(64, 64\)"):
        backward_of(lambda x: x.square().sum(1), x, nonfinite="raise")
    # the hooks were popped although the forward raised
    y = torch.randn(64, 64, requires_grad=True)
    y.square().sum().backward()
    assert torch.equal(y.grad, 2 * y)


def test_no_hooks_without_gradients():
    model = build("bert")
    with compress_model(model, only("block:bits=4")) as handle, torch.no_grad():
        loss_of(model, batch_of("bert"))
        assert handle.meters["saved"].calls == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_plain_models(duplicate):
    model = build("resnet18")
    kind = type(model)
    with compress_model(model, only("block:bits=4")) as handle:
        assert type(model) is not kind and type(model).__name__ == kind.__name__ and isinstance(model, kind)
        twin = duplicate(model)
        assert type(twin) is kind
        loss_of(twin, batch_of("resnet18")).backward()
        assert handle.meters["saved"].calls == 0
        compress_model(twin, only("block:bits=4")).remove()
    assert type(model) is kind and not hooks_on(model) and not hooks_on(twin)


def test_isolated_works_on_copies_and_tells_other_listeners():
    """A measurement with the run's own noise, after which the run goes on as if it had not been."""

    def run(measure):
        torch.manual_seed(0)
        model, x, seen = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.5)), torch.randn(64, 32), []
        with compress_model(model, only("block:bits=2,round=stochastic")) as handle:
            for _ in range(2):
                if measure:
                    with handle.isolated(seen.append), undisturbed(model):
                        torch.autograd.grad(model(x).square().sum(), model.parameters())
                model(x).square().sum().backward()
            return gradients(model), handle.stats(), seen

    (plain, counted, _), (measured, counts, events) = run(False), run(True)
    assert torch.equal(plain, measured) and counted == counts
    assert [(e.name, str(e.codec or ""), e.calls) for e in events[:4]] == [
        ("", "", 1), ("0#0", "block:bits=2,group=32,round=stochastic", 0),
        ("Tanh#0", "block:bits=2,group=32,round=stochastic", 0), ("Mul", "", 0),
    ]  # fmt: skip
    assert all(e.site == "saved" and e.raw_bytes >= 8 * e.payload_bytes / 2 > 0 for e in events[1:4])
