"""What saved tensors take: stored once, in the fewest bytes, and freed with the graph."""

import gc
import weakref

import pytest
import torch
from helpers.saved import backward_of, gradients, only
from torch import nn
from torch.nn import functional as F

from hf_actcompress import compress_model
from hf_actcompress.ops import memory
from hf_actcompress.saved import kept, passes
from hf_actcompress.saved.kept import Encoded, Exact, flatten, narrowest
from hf_actcompress.saved.normalised import Normalised
from hf_actcompress.saved.slots import Untouched

pytestmark = pytest.mark.usefixtures("small_tensors")


def test_what_is_saved_twice_is_stored_once():
    x = torch.randn(64, 64)
    _, _, once = backward_of(lambda x: x.tanh(), x)
    _, _, shared = backward_of(lambda x: (y := x.tanh()) * y.view(4, -1).view(64, 64) + (y.T * 2).T * y, x)
    # tanh's result, and what is made of it twice
    assert shared.payload_bytes == 2 * once.payload_bytes and shared.raw_bytes == 2 * once.raw_bytes


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


def test_a_tensor_that_is_changed_after_it_was_saved_is_refused_as_by_autograd():
    def function(x):
        y = x * 1.0
        one = y.sigmoid().mul(y).sum()  # saves y
        with torch.no_grad():
            y.add_(1.0)
        return one + y.sigmoid().sum()

    for spec in ("block:bits=12", "identity"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward_of(function, torch.randn(64, 64), spec)


@pytest.mark.parametrize("make", [
    lambda x: x.view(4, 8, 64).transpose(1, 2), lambda x: x.T, lambda x: x[:, ::2], lambda x: x[1:],
    lambda x: x.view(2, 8, 16, 8).contiguous(memory_format=torch.channels_last), lambda x: x[:1].expand(8, 64),
    lambda x: x.view(4, 8, 8, 8)[..., :4].transpose(1, 2),
])  # fmt: skip
def test_strides_are_restored(make):
    x = torch.randn(32, 64)
    run, layout, gaps = flatten(make(x))
    found = layout.restore(run.reshape(-1))
    assert run.is_contiguous() and torch.equal(found, make(x)) and (gaps or found.stride() == make(x).stride())
    sizes, strides = zip(*((n, s) for n, s in zip(found.shape, found.stride(), strict=True) if s), strict=True)
    order = sorted(range(len(sizes)), key=lambda d: -make(x).stride()[d])
    assert sorted(range(len(sizes)), key=lambda d: -strides[d]) == order, "the order of the dimensions stays"


def packed_by(model, run, spec="block:bits=2"):
    """{shape: kind of what is held} of a pass."""
    found, plain = [], passes.Pass.pack

    def noted(self, x):
        found.append((tuple(x.shape), plain(self, x)))
        return found[-1][1]

    with pytest.MonkeyPatch.context() as patch, compress_model(model, only(spec)):
        patch.setattr(passes.Pass, "pack", noted)
        run()
    return [(shape, getattr(held, "content", held)) for shape, held in found]


def test_parameters_buffers_and_casts_of_them_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(32, 64, requires_grad=True)).sum().backward()

    found = packed_by(model, run)
    assert [type(held) for shape, held in found if shape == (64, 64)] == [Exact], "autocast's copy of the weight"
    assert all(isinstance(held, (Exact, Untouched)) for shape, held in found if shape == (64,))
    assert [type(held) for shape, held in found if shape == (32, 64)] == [Encoded, Normalised]


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
    monkeypatch.setenv("HF_ACTCOMPRESS_KERNELS", "1")
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
        assert not handle.saved.active
        assert sizes[1] == sizes[2]
    # the hooks are off: nothing is packed any more
    before = handle.meters["saved"].payload_bytes
    nn.Linear(64, 64)(x).sum().backward()
    assert handle.meters["saved"].payload_bytes == before


def test_small_helpers():
    assert narrowest(torch.tensor([0, 255])) == torch.uint8 and narrowest(torch.tensor([-1, 5])) == torch.int8
    assert narrowest(torch.tensor([0, 256])) == torch.int16 and narrowest(torch.tensor([0, 2**40])) is None


def test_means_and_deviations_of_norms_are_kept():
    with compress_model(nn.Sequential(nn.LayerNorm(32)), only("block:bits=2")) as handle:
        handle.model(torch.randn(64, 32, requires_grad=True)).sum().backward()
    # codes, a scale for each row, two statistics
    assert handle.meters["saved"].payload_bytes == 64 * 32 // 4 + 64 * 4 + 2 * 64 * 4


def test_a_small_view_of_a_large_tensor_does_not_hold_it(monkeypatch):
    """As of one token of every row, which a pooler takes."""
    monkeypatch.setattr(kept, "SMALLEST", 1 << 14)
    x, weight = torch.randn(64, 128, 32), torch.randn(4, 32, requires_grad=True)
    _, grad, record = backward_of(lambda x, w: F.linear((x * 1)[:, 0], w).square(), x, parameters=(weight,))
    assert record.payload_bytes <= 64 * (32 + 4) * 4
    y = x.clone().requires_grad_()
    F.linear((y * 1)[:, 0], weight).square().sum().backward()
    assert torch.equal(grad, y.grad)


def test_what_nobody_takes_is_not_held(small_tensors):
    """As without hooks: autograd frees the node with the result."""
    class Two(nn.Module):
        def forward(self, x):
            y = x * 2
            (x * 3).log()
            return y.sin()

    with compress_model(Two(), only("block:bits=4")) as handle:
        handle.model(torch.randn(64, 64, requires_grad=True)).sum().backward()
        assert {row["operation"] for row in handle.report()} == {"Sin"}
