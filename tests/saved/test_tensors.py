"""Tensors saved for backward: exact where exactness is asked for, right on average elsewhere, nothing left behind."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from helpers import TEXT_MODELS, batch_of, build, differing, hooks_on, loss_of, points, stack, train_steps
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_actcompress import ActCompressConfig, compress_model, parse_codec, remove_compression
from hf_actcompress.ops import memory
from hf_actcompress.saved import tensors as site
from hf_actcompress.saved.forms import flatten, narrowest
from hf_actcompress.saved.rules import slopes_of
from hf_actcompress.saved.slopes import SLOPES, extreme
from hf_actcompress.saved.tensors import SavedTensors


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiny models have tiny tensors."""
    monkeypatch.setattr(site, "SMALLEST", 16)


def only(codec, **options):
    return ActCompressConfig(first=0, last=0, saved=codec, **options)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Wrapped(nn.Module):
    """A function as a model."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.own = function, nn.ParameterList(parameters)

    def forward(self, *args):
        return self.function(*args, *self.own)


def backward_of(function, x, codec="block:bits=2", parameters=(), **options):
    """Output, gradient of x and the bytes held, with the function's saved tensors packed."""
    model, x = Wrapped(function, *parameters), x.detach().clone().requires_grad_()
    with compress_model(model, only(codec, **options)) as handle:
        y = model(x)
        y.sum().backward()
        return y.detach(), x.grad, handle.saved.record


# Exactness


@pytest.mark.parametrize("name", [*TEXT_MODELS, "vit", "t5", "mobilenetv2_100", "resnet18", "convnext_atto"])
def test_identity_changes_no_bit(name):
    model, batches = build(name), [batch_of(name, seed) for seed in range(2)]
    plain = train_steps(copy.deepcopy(model), batches)
    with compress_model(model, only("identity")) as handle:
        assert not differing(plain, train_steps(model, batches))
        assert handle.saved.record.passes == 2 and handle.saved.record.raw_bytes > 0
    assert not hooks_on(model)


def test_forward_values_stay_and_gradients_do_not():
    """Else the test above could pass with hooks that never run."""
    model, batches = build("bert"), [batch_of("bert")]
    plain = train_steps(copy.deepcopy(model), batches, "SGD")
    with compress_model(model, only("block:bits=4")):
        changed = differing(plain, train_steps(model, batches, "SGD"))
    assert "loss" not in changed and "bert.encoder.layer.0.attention.self.query.weight" in changed


@pytest.mark.parametrize("saves", [F.relu, lambda x: F.relu(x + 0, inplace=True)])
def test_functional_rectifiers_are_values_like_others(saves):
    """Only a module says that its saved tensor is asked for its sign alone."""
    x = torch.randn(40, 64)
    y, grad, _ = backward_of(saves, x, "block:bits=8")
    assert torch.equal(y, F.relu(x)) and grad.unique().tolist() == [0, 1]


@pytest.mark.parametrize("module", [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 0.25)
])  # fmt: skip
def test_masks_of_rectifiers_are_exact_and_take_one_bit(module):
    x = 4 * torch.randn(40, 64)

    def plain(x):
        return module(x * 1.0)

    expected = x.clone().requires_grad_()
    plain(expected).sum().backward()
    model = nn.Sequential(module)
    x = x.requires_grad_()
    with compress_model(model, only("block:bits=2")) as handle:
        model(x * 1.0).sum().backward()
        assert handle.saved.record.kept_bytes == 40 * 64 // 8
    assert torch.equal(x.grad, expected.grad)


def test_rectifiers_of_one_tensor_keep_their_own_masks():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide, self.relu = nn.Hardtanh(-0.1, 0.1), nn.Hardtanh(-1.0, 1.0), nn.ReLU()

        def forward(self, x):
            y = x * 1.0
            return self.narrow(y) + self.wide(y) + self.relu(y)

    x = torch.randn(40, 64)
    x[0, 0] = math.nan
    expected, found = x.clone().requires_grad_(), x.clone().requires_grad_()
    model = Both()
    model(expected).sum().backward()
    with compress_model(model, only("block:bits=2")):
        model(found).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0, equal_nan=True)


def test_a_tensor_that_the_codec_cannot_take_is_kept():
    x = torch.randn(64, 16)
    _, grad, record = backward_of(lambda x: x.square(), x, "lowrank:rank=20")
    assert torch.equal(grad, 2 * x) and record.kept_bytes == record.raw_bytes == 64 * 16 * 4


def test_error_feedback_is_refused():
    with pytest.raises(ValueError, match="saved='ef.topk:ratio=0.1': error feedback would add.*Use 'topk:ratio=0.1'"):
        only("ef+topk:ratio=0.1")


def test_a_rectifier_between_layers_masks_exactly_though_its_values_are_coded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).double()
    x = torch.randn(64, 32, dtype=torch.float64)
    model(x).sum().backward()
    expected = model[0].bias.grad.clone()  # depends on the mask alone
    model.zero_grad()
    with compress_model(model, only("block:bits=1")):
        model(x).sum().backward()
    assert torch.equal(model[0].bias.grad, expected)


def test_dropout_is_exact():
    x, p = torch.randn(64, 64), 0.3
    y, grad, record = backward_of(lambda x: F.dropout(x, p, True), x)
    assert torch.equal(grad, torch.where(y != 0, torch.tensor(1 / (1 - p)), torch.tensor(0.0)))
    assert record.kept_bytes == 64 * 64 // 8


@pytest.mark.parametrize(("size", "width"), [(8, 1), (32, 2)])
def test_indices_of_pooling_take_the_fewest_bytes(size, width):
    x = torch.randn(4, 8, size, size)
    expected = x.clone().requires_grad_()
    F.max_pool2d(expected, 2).sum().backward()
    _, grad, record = backward_of(lambda x: F.max_pool2d(x, 2), x, "identity")
    assert torch.equal(grad, expected.grad)
    assert record.kept_bytes == x.numel() * 4 + x.numel() // 4 * width


def test_bool_masks():
    x, mask = torch.randn(32, 32), torch.rand(32, 32) > 0.5
    _, grad, record = backward_of(lambda x: x.masked_fill(mask, 0.0), x)
    assert torch.equal(grad, (~mask).float()) and record.kept_bytes == 128


# Averages


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_gradients_that_are_linear_in_what_was_saved_are_right_on_average(bits):
    """200 draws, within three standard errors; the multiple of the standard error is itself checked in the mean."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    x = torch.randn(6, 3, 8, 8)
    layers(x).square().sum().backward()
    expected = gradients(layers)
    draws = []
    with compress_model(layers, only(f"block:bits={bits}")):
        for _ in range(200):
            layers.zero_grad()
            layers(x).square().sum().backward()
            draws.append(gradients(layers))
    draws = torch.stack(draws).double()
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(200) + 1e-6 * expected.abs().max())
    assert draws.std(0).max() > 0
    assert error.square().mean() < 1.35  # 1 for a mean that is right
    assert (error.abs() < 3).double().mean() > 0.99


def test_every_pass_draws_fresh_noise_and_the_state_goes_on():
    torch.manual_seed(0)
    model, x = nn.Linear(32, 32), torch.randn(64, 32)

    def grad(handle):
        model.zero_grad()
        model(x).square().sum().backward()
        return gradients(model)

    with compress_model(model, only("block:bits=2")) as handle:
        first, second = grad(handle), grad(handle)
        state = handle.state_dict()
        third = grad(handle)
    assert not torch.equal(first, second)
    with compress_model(model, only("block:bits=2")) as handle:
        assert not handle.load_state_dict(copy.deepcopy(state))
        assert torch.equal(grad(handle), third)
    with compress_model(model, only("block:bits=3")) as handle:
        assert handle.load_state_dict(state) == ["saved"]


def test_rounding_is_stochastic_unless_another_is_named():
    for spec, found in {
        "block:bits=4": "block:bits=4,round=stochastic,equalize=none",
        "block:bits=4,group=64": "block:bits=4,group=64,round=stochastic,equalize=none",
        "block:bits=4,equalize=feature": "block:bits=4,round=stochastic,equalize=feature",
        "block:bits=4,round=nearest": "block:bits=4,round=nearest,equalize=none",
        "uniform:bits=4": "uniform:bits=4,round=stochastic",
    }.items():
        assert str(parse_codec(spec).for_saved()) == found
    for spec in ("rotated:bits=2", "kmeans:bits=4", "uniform:bits=4,round=nearest"):
        assert parse_codec(spec).for_saved() == parse_codec(spec)


# Memory


def test_what_is_saved_twice_is_stored_once():
    x = torch.randn(64, 64)
    _, _, once = backward_of(lambda x: x.exp(), x)
    _, _, twice = backward_of(lambda x: (y := x.exp()) * y.sin() + y.view(4, -1).cos().view(64, 64) + y.T.tanh().T, x)
    # exp, sin's result, tanh's result; without sharing five more
    assert twice.kept_bytes == 3 * once.kept_bytes


def test_memory_that_is_used_again_is_another_tensor():
    """Tensors that die within the forward leave their address to the next: a bare data_ptr would merge them."""
    addresses = set()

    def function(x):
        total = 0
        for i in range(6):
            y = x * (i + 1.0)
            addresses.add(y.data_ptr())
            total = total + (y + 1).square().sum()
            del y
        return total

    x = torch.randn(100, 100)
    _, grad, _ = backward_of(function, x, "block:bits=8")
    expected = sum(2 * (i + 1) * (x * (i + 1) + 1) for i in range(6))
    assert len(addresses) < 6, "no address was used again: this test would show nothing"
    assert (grad - expected).norm() < 0.02 * expected.norm()


def test_a_changed_tensor_is_not_the_one_that_was_packed_before():
    def function(x):
        y = x * 1.0
        one = y.sin().sum()  # saves y
        with torch.no_grad():
            y.add_(1.0)
        return one + y.cos().sum()  # saves the y of now

    x = torch.randn(64, 64)
    _, grad, _ = backward_of(function, x, "block:bits=12")
    torch.testing.assert_close(grad, x.cos() - (x + 1).sin(), rtol=0, atol=4e-3)


@pytest.mark.parametrize("make", [
    lambda x: x.view(4, 8, 64).transpose(1, 2), lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1:],
    lambda x: x.view(2, 8, 16, 8).contiguous(memory_format=torch.channels_last), lambda x: x[:1].expand(8, 64),
])  # fmt: skip
def test_strides_are_restored(make):
    seen, inner = [], site.unpack
    x = torch.randn(32, 64)
    saved = SavedTensors(parse_codec("identity"))
    y = make(x)
    found = inner(saved.pack(y))
    seen.append(found.stride())
    assert torch.equal(found, y) and (found.stride() == y.stride() or flatten(y) is None)
    assert torch.equal(inner(saved.pack(y)), y), "packed twice"


def test_parameters_buffers_and_small_tensors_pass(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    with compress_model(model, only("block:bits=2")) as handle:
        packed, inner = [], handle.saved.pack
        monkeypatch.setattr(handle.saved, "pack", lambda x: packed.append((x, inner(x))) or packed[-1][1])
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(32, 64, requires_grad=True)).sum().backward()
    kept = [tuple(x.shape) for x, p in packed if isinstance(p, site.Kept)]
    assert (64, 64) in kept, "autocast's copy of the weight"
    assert all(not isinstance(p, site.Kept) for x, p in packed if tuple(x.shape) == (32, 64))
    assert sum(tuple(x.shape) == (32, 64) for x, _ in packed) == 2


def test_frozen_weights_under_autocast_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 48).requires_grad_(False))
    x = torch.randn(20, 48)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with compress_model(model, only("uniform:bits=1")), torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().sum().backward()
    # the bias sees only the exact path back through the frozen layer; with 1-bit weights it would be far off
    assert torch.equal(model[0].bias.grad, expected[48 * 32 :])


def test_what_is_decoded_shares_memory_that_goes_with_the_graph(monkeypatch):
    monkeypatch.setenv("HF_ACTCOMPRESS_COMPILE", "1")
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU6(), nn.BatchNorm1d(256)) for _ in range(4)))
    x, pools, plain = torch.randn(2048, 256), {}, memory.Pool.take

    def noted(self, n, dtype):
        found = plain(self, n, dtype)
        pools.setdefault(weakref.ref(self), []).append((found.data_ptr(), self.nbytes))
        return found

    def run(twice):
        model.zero_grad()
        with compress_model(model, only("block:bits=4", seed=3)):
            loss = model(x).square().sum()
            loss.backward(retain_graph=twice)
            if twice:
                model.zero_grad()
                loss.backward()
        return gradients(model)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "POOLED", 1 << 40)
        expected = run(False)
    monkeypatch.setattr(memory.Pool, "take", noted)
    assert torch.equal(run(False), expected) and torch.equal(run(True), expected)
    gc.collect()
    assert len(pools) == 2 and all(pool() is None for pool in pools)  # one for each pass, gone with it
    for taken in pools.values():
        assert len(taken) >= 11 > 4 >= len({address for address, _ in taken})
        assert max(size for _, size in taken) <= 3 * x.nbytes


@pytest.mark.parametrize("backward", ["always", "never", "raises"])
def test_live_bytes_stay_flat(backward):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), torch.randn(64, 64)

    def live():
        gc.collect()
        return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is torch.Tensor)

    def broken(module, args):
        raise RuntimeError("the cable was pulled")

    with compress_model(model, only("block:bits=4")) as handle:
        if backward == "raises":
            model[2].register_forward_pre_hook(broken)
        sizes = []
        for step in range(201):
            if backward == "raises":
                with pytest.raises(RuntimeError, match="cable"):
                    model(x)
            else:
                loss = model(x).sum()
                if backward == "always":
                    loss.backward()
                del loss
            model.zero_grad()
            if step % 100 == 0:
                sizes.append(live())
        assert not handle.saved.active and not handle.saved._seen
        assert sizes[1] == sizes[2]
    # the hooks are off: nothing is packed any more
    before = handle.saved.record.kept_bytes
    nn.Linear(64, 64)(x).sum().backward()
    assert handle.saved.record.kept_bytes == before


# Composition


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_inputs_are_coded_and_recomputation_is_not(reentrant):
    model, (x, y) = stack(segments=2, reentrant=reentrant, dropout=0.0), points(64, 8)
    plain = copy.deepcopy(model).train()
    F.cross_entropy(plain(x), y.repeat(1)[: len(x)]).backward()
    model.train()
    with compress_model(model, only("block:bits=8")) as handle:
        F.cross_entropy(model(x), y).backward()
        held = handle.saved.record.raw_bytes
    # two checkpoints of two blocks: their inputs, and the head's
    assert held == 3 * 64 * 8 * 4
    change = gradients(model) - gradients(plain)
    assert 0 < change.norm() < 0.05 * gradients(plain).norm()


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
    x = torch.randn(64, 64, requires_grad=True)
    model = Wrapped(lambda x: (x.sin() * x).sum())
    with compress_model(model, only("block:bits=16")):
        y = model(x)
        one, = torch.autograd.grad(y, x, retain_graph=True)
        two, = torch.autograd.grad(y, x, create_graph=True)
        assert torch.equal(one, two)
        second, = torch.autograd.grad(two.sum(), x)
    torch.testing.assert_close(second, 2 * x.cos() - x * x.sin(), rtol=0, atol=1e-2)


def test_functional_transforms_are_refused_by_torch_itself():
    model = nn.Linear(64, 64)
    with compress_model(model, only("block:bits=4")), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: model(x).sum())(torch.randn(32, 64))
    assert not hooks_on(model)


def test_compiled_models_are_refused():
    model = build("bert")
    with pytest.raises(ValueError, match="does not work inside torch.compile.*Train without torch_compile"):
        compress_model(torch.compile(model), only("block:bits=4"))
    assert not hooks_on(model)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_cannot_be_coded(bad):
    x = torch.randn(64, 64)
    x[3, 4] = bad
    _, grad, record = backward_of(lambda x: x.square(), x)
    assert record.nonfinite == 1
    torch.testing.assert_close(grad, 2 * x, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(FloatingPointError, match=r"saved: NaN, Inf.*shape \(64, 64\)"):
        backward_of(lambda x: x.square(), x, nonfinite="raise")
    # the hooks were popped although the forward raised
    y = torch.randn(64, 64, requires_grad=True)
    y.square().sum().backward()
    assert torch.equal(y.grad, 2 * y)


def test_no_hooks_without_gradients():
    model = build("bert")
    with compress_model(model, only("block:bits=4")) as handle, torch.no_grad():
        loss_of(model, batch_of("bert"))
        assert handle.saved.record.passes == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_compressed_and_cleaned(duplicate):
    model = build("resnet18")
    with compress_model(model, only("block:bits=4")) as handle:
        twin = duplicate(model)
        loss_of(twin, batch_of("resnet18")).backward()
        assert handle.saved.record.passes == 0
        with pytest.raises(ValueError, match="compressed already"):
            compress_model(twin, only("block:bits=4"))
    assert not hooks_on(model) and hooks_on(twin)
    assert "" in remove_compression(twin) and not hooks_on(twin)
    assert not any(m._forward_hooks_always_called for m in twin.modules())


def test_small_helpers():
    assert narrowest(torch.tensor([0, 255])) == torch.uint8 and narrowest(torch.tensor([-1, 5])) == torch.int8
    assert narrowest(torch.tensor([0, 256])) == torch.int16 and narrowest(torch.tensor([0, 2**40])) is None


@pytest.mark.parametrize(("module", "name"), [
    (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu"), (ACT2FN["gelu"], "gelu"),
    (ACT2FN["silu"], "silu"), (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"), (nn.ReLU(), None), (None, None),
    (ACT2FN["gelu_python"], None), (ACT2FN["gelu_new"], None),
])  # fmt: skip
def test_which_modules_ask_for_slopes(module, name):
    assert slopes_of(module) == name


@pytest.mark.parametrize("make", [nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU, lambda: ACT2FN["gelu"]])
@pytest.mark.parametrize("bits", [2, 4])
def test_gradients_through_smooth_activations_are_right_on_average(make, bits):
    """Which values in few bits, whose slopes would be taken, cannot be: that would be biased."""
    torch.manual_seed(0)
    x, model = torch.randn(8, 512) * 2, nn.Sequential(make())
    y = x.clone().requires_grad_()
    make()(y).sum().backward()
    draws = []
    with compress_model(model, only(f"block:bits={bits}")) as handle:
        for _ in range(200):
            z = x.clone().requires_grad_()
            model(z).sum().backward()
            draws.append(z.grad)
        record = handle.saved.record
    assert record.kept_bytes * 8 == 200 * x.numel() * (3 if bits == 4 else bits)
    draws, name = torch.stack(draws).double(), slopes_of(make())
    least = SLOPES[name](-extreme(name))
    width = (SLOPES[name](extreme(name)) - least) / (2 ** (3 if bits == 4 else bits) - 1)
    # Not what was drawn: a slope very near a level may have been rounded to it 200 times out of 200.
    part = ((y.grad.double() - least) / width) % 1
    error = (draws.mean(0) - y.grad) / (width * (part * (1 - part) / 200).sqrt() + 1e-5)
    assert draws.std(0).max() > 0.05
    assert 0.8 < error.square().mean() < 1.25
    assert (error.abs() < 3).double().mean() > 0.98


def test_means_and_deviations_of_norms_are_kept():
    with compress_model(nn.Sequential(nn.LayerNorm(32)), only("block:bits=2")) as handle:
        handle.model(torch.randn(64, 32, requires_grad=True)).sum().backward()
    assert handle.saved.record.kept_bytes == 64 * 32 // 4 + 64 // 4 * 4 + 2 * 64 * 4  # codes, scales, two statistics


def test_a_small_view_of_a_large_tensor_does_not_hold_it(monkeypatch):
    """As of one token of every row, which a pooler takes."""
    monkeypatch.setattr(site, "SMALLEST", 1 << 14)
    x, weight = torch.randn(64, 128, 32), torch.randn(4, 32, requires_grad=True)
    _, grad, record = backward_of(lambda x, w: F.linear((x * 1)[:, 0], w).square(), x, parameters=(weight,))
    assert record.kept_bytes <= 64 * (32 + 4) * 4
    y = x.clone().requires_grad_()
    F.linear((y * 1)[:, 0], weight).square().sum().backward()
    assert torch.equal(grad, y.grad)
