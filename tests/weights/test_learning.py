"""Learning-Compression in a plain loop: the penalty, the steps, which weights the model holds."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_actcompress.weights import LearningCompression, load_compressed

SCHEME = {"0": "prune:keep=20", "2": "codebook:k=2 + prune:keep=2"}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 6, generator=generator)
    return x, (x[:, :3] * x[:, 3:]).argmax(1)


def train(net, lc, steps, by_gradient=False, lr=0.1):
    optimizer, (x, y) = torch.optim.SGD(net.parameters(), lr), data()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(x), y)
        (loss if by_gradient else loss + lc.penalty()).backward()
        if by_gradient:
            lc.add_gradients()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_training_starts_from_direct_compression():
    net = model()
    lc = LearningCompression(net, SCHEME)
    expected = lc.tasks[0].compression.compress([net[0].weight]).values()[0]
    assert torch.equal(lc.delta["0.weight"], expected)
    assert all((m == 0).all() for m in lc.multipliers.values())


def test_the_penalty_by_its_formula_and_its_gradient_by_both_ways():
    net = model()
    lc = LearningCompression(net, SCHEME, mu=0.3)
    train(net, lc, 3)
    lc.c_step()
    assert any((m != 0).any() for m in lc.multipliers.values())
    expected = sum(
        lc.mu / 2 * ((w := net.get_parameter(n)) - lc.delta[n] - lc.multipliers[n] / lc.mu).square().sum()
        for n in lc.parameters
    )
    torch.testing.assert_close(lc.penalty(), expected)
    lc.penalty().backward()
    one = {n: p.grad.clone() for n, p in lc.parameters.items()}
    net.zero_grad()
    lc.add_gradients()
    for name, p in lc.parameters.items():
        torch.testing.assert_close(p.grad, one[name])
        w = p.detach()
        torch.testing.assert_close(p.grad, lc.mu * (w - lc.delta[name]) - lc.multipliers[name])
    assert net[0].bias.grad is None


def test_a_c_step_by_hand():
    net = model()
    lc = LearningCompression(net, {"0": "prune:keep=20"}, mu=0.5, growth=3)
    train(net, lc, 5)
    w, before = net[0].weight.detach().clone(), lc.multipliers["0.weight"] + 0.01
    lc.multipliers["0.weight"] = before.clone()
    lc.c_step()
    delta = lc.tasks[0].compression.compress([w - before / 0.5]).values()[0]
    assert torch.equal(lc.delta["0.weight"], delta)
    torch.testing.assert_close(lc.multipliers["0.weight"], before - 0.5 * (w - delta))
    assert (lc.mu, lc.c_steps) == (1.5, 1)


def test_it_beats_direct_compression_and_ends_on_the_scheme():
    net = model()
    x, y = data()
    optimizer = torch.optim.SGD(net.parameters(), 0.5)
    for _ in range(200):
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    lc = LearningCompression(net, SCHEME, mu=1e-3, growth=1.5)
    with lc.compressed(), torch.no_grad():
        direct = nn.functional.cross_entropy(net(x), y).item()
    for _ in range(20):
        train(net, lc, 20, by_gradient=True)
        lc.c_step()
    assert lc.distance() < 0.02
    lc.finish()
    with torch.no_grad():
        learned = nn.functional.cross_entropy(net(x), y).item()
    assert learned < 0.8 * direct
    assert int((net[0].weight != 0).sum()) == 20
    assert len(net[2].weight.unique()) <= 2 + 2


def test_the_context_changes_the_weights_and_gives_them_back():
    net = model()
    lc = LearningCompression(net, SCHEME)
    before = copy.deepcopy(net.state_dict())
    with lc.compressed():
        assert torch.equal(net[0].weight, lc.delta["0.weight"])
        lc.use_compressed()  # again: nothing more is kept
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(KeyError), lc.compressed():
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with lc.compressed():
        lc.c_step()  # of the trained weights, whatever the model holds
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_bits_and_ratios():
    lc = LearningCompression(model(), {"0": "binary"})
    assert lc.bits == 72 + 32 + 32 * (12 + 36 + 3)
    assert lc.ratio == 32 * (72 + 12 + 36 + 3) / lc.bits
    assert lc.layers_ratio == 32 * 72 / (72 + 32)


def test_what_is_saved_is_what_the_model_holds(tmp_path):
    net = model()
    lc = LearningCompression(net, {**SCHEME, "0": "lowrank:rank=2"}, mu=0.1)
    train(net, lc, 5)
    lc.c_step()
    lc.finish()
    lc.save(tmp_path)
    other = model()
    load_compressed(tmp_path, other)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.state_dict().items())


def test_state_goes_on_exactly():
    def start():
        net = model()
        return net, LearningCompression(net, {**SCHEME, "2": "block:bits=4,group=8"}, mu=0.05, growth=1.3)

    net, lc = start()
    train(net, lc, 4)
    lc.c_step()
    state, bits, weights = lc.state_dict(), lc.bits, copy.deepcopy(net.state_dict())
    whole = train(net, lc, 4)
    lc.c_step()
    whole += train(net, lc, 4)
    other, again = start()
    other.load_state_dict(weights)
    again.load_state_dict(*state)
    assert (again.mu, again.c_steps, again.bits) == (0.05 * 1.3, 1, bits)
    part = train(other, again, 4)
    again.c_step()
    assert part + train(other, again, 4) == whole


def test_another_schemes_state_is_refused():
    state = LearningCompression(model(), SCHEME).state_dict()
    with pytest.raises(ValueError, match=r"written with the scheme .*keep=20.*this run has .*keep=21"):
        LearningCompression(model(), {**SCHEME, "0": "prune:keep=21"}).load_state_dict(*state)


def test_half_precision_parameters():
    net = model().bfloat16()
    lc = LearningCompression(net, SCHEME, mu=1e-2)
    lc.add_gradients()
    assert net[0].weight.grad.dtype == torch.bfloat16
    lc.c_step()
    lc.finish()
    assert torch.equal(net[0].weight.float(), lc.delta["0.weight"])


def test_it_can_be_copied_and_pickled_with_its_model():
    net = model()
    lc = LearningCompression(net, SCHEME)
    for other in (copy.deepcopy(lc), pickle.loads(pickle.dumps(lc))):
        other.finish()
        assert torch.equal(other.model[0].weight, other.delta["0.weight"])
        assert not torch.equal(net[0].weight, other.delta["0.weight"])


def frozen():
    net = model()
    net[0].weight.requires_grad_(False)
    return net


@pytest.mark.parametrize(("net", "options", "message"), [
    (model, {"mu": 0}, "mu=0: the weight of the penalty is a number above 0"),
    (model, {"growth": 0.5}, "growth=0.5"),
    (frozen, {}, "frozen parameters: 0.weight"),
])  # fmt: skip
def test_bad_input(net, options, message):
    with pytest.raises(ValueError, match=message):
        LearningCompression(net(), SCHEME, **options)
