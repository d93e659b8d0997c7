"""When saved tensors are compressed and when not, and that nothing of it stays behind."""

import threading
import warnings

import pytest
import torch
from helpers.saved import Wrapped, gradients, only
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_actcompress import compress_model

pytestmark = pytest.mark.usefixtures("small_tensors")


def layers(middle=None):
    torch.manual_seed(0)
    parts = [nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64)]
    return nn.Sequential(*parts[:2], *([] if middle is None else [Wrapped(middle)]), *parts[2:])


def test_an_interrupt_leaves_nothing_behind():
    def stop(x):
        raise KeyboardInterrupt

    model, x = layers(stop), torch.randn(64, 64)
    with compress_model(model, only("block:bits=2")) as handle:
        with pytest.raises(KeyboardInterrupt):
            model(x)
        assert not handle.saved.active
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_threads_have_passes_of_their_own():
    model, x, failures = layers(), torch.randn(256, 64), []

    def run():
        try:
            for _ in range(10):
                torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        except Exception as error:
            failures.append(error)

    with compress_model(model, only("block:bits=4")):
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_forward_mode_passes_by():
    model, x = layers(), torch.randn(64, 64)
    plain = torch.func.jvp(model, (x,), (x,))
    with compress_model(model, only("block:bits=2")):
        found = torch.func.jvp(model, (x,), (x,))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_another_method_is_compressed_when_asked_for():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = layers()

        def encode(self, x):
            return self.net(x)

        def forward(self, x):
            return self.encode(x)

    model, x = Two(), torch.randn(64, 64)
    with pytest.warns(UserWarning, match=r"nothing was compressed.*handle.saving\(\)"):
        with compress_model(model, only("block:bits=4")):
            model.encode(x).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compress_model(model, only("block:bits=4")) as handle, handle.saving() as outputs:
            loss = model.encode(x).square().sum()
            outputs.append(loss)
    loss.backward()
    assert handle.stats()[-1]["ratio"] > 4 and {"codes", "normalised"} <= {row["kept"] for row in handle.report()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_inside_a_checkpoint_is_said_and_left_alone(reentrant, caplog):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = layers(), nn.Linear(64, 64)

        def forward(self, x):
            return self.last(checkpoint(self.inner, x, use_reentrant=reentrant))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(64, 64).requires_grad_()
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with compress_model(model, only("block:bits=8")):
        for _ in range(2):
            model.zero_grad()
            model(x).square().sum().backward()
    assert (gradients(model) - expected).norm() < 0.02 * expected.norm()
    if not reentrant:
        assert sum("saved their tensors past this site" in r.message for r in caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pure", [True, False])
def test_lower_precision(dtype, pure):
    model, x = layers(), torch.randn(256, 64)
    model, x = (model.to(dtype), x.to(dtype)) if pure else (model, x)

    def run():
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=not pure):
            y = model(x)
        (y.float() * 0.1).square().sum().backward()
        return gradients(model).float()

    expected = run()
    with compress_model(model, only("block:bits=8")) as handle:
        assert (run() - expected).norm() < 0.03 * expected.norm()
    assert handle.stats()[-1]["ratio"] > 1.8


@pytest.mark.parametrize("heads", [4, 2])
def test_sharp_attention_stays_bounded(heads):
    """Kept as codes beside an exact logsumexp, the error would grow exponentially with the scores."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=heads, intermediate_size=128),
    ).train()  # fmt: skip
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(200)
    ids = torch.randint(5, 90, (4, 64))
    model(input_ids=ids, labels=ids).loss.backward()
    expected, errors = gradients(model), {}
    for bits in (8, 4, 2):
        model.zero_grad()
        with compress_model(model, only(f"block:bits={bits}")):
            model(input_ids=ids, labels=ids).loss.backward()
        errors[bits] = float((gradients(model) - expected).norm() / expected.norm())
    assert errors[8] < 0.3 and errors[4] < 3 and errors[2] < 20, errors


def test_masks_of_attention_take_one_bit():
    q = torch.randn(4, 4, 64, 16)
    mask = torch.zeros(4, 1, 64, 64).masked_fill(torch.rand(4, 1, 64, 64) > 0.7, -torch.inf)
    mask[..., 0] = 0
    model = Wrapped(lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=mask))
    exact, found = q.clone().requires_grad_(), q.clone().requires_grad_()
    model(exact).square().sum().backward()
    with compress_model(model, only("block:bits=8")) as handle:
        model(found).square().sum().backward()
        kept = [row for row in handle.report() if row["kept"] == "one bit"]
    assert kept[0]["held_bytes"] * 32 == kept[0]["raw_bytes"] == mask.nbytes
    assert handle.stats()[-1]["nonfinite"] == 0 and (found.grad - exact.grad).norm() < 0.05 * exact.grad.norm()


def test_multi_head_attention_as_a_whole_is_coded():
    """It reaches torch as one call, whose parts are operations like others."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True).train(), torch.randn(8, 32, 64)
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with compress_model(model, only("block:bits=8")) as handle:
        model(x).square().sum().backward()
        exactly = sum(row["raw_bytes"] for row in handle.report() if row["kept"] == "exactly")
    record = handle.stats()[-1]
    assert exactly < 0.1 * record["raw_bytes"] and record["ratio"] > 4
    assert (gradients(model) - expected).norm() < 0.02 * expected.norm()


def test_convolutions_with_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU6(inplace=True), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16),
        nn.SiLU(inplace=True), nn.Conv2d(16, 8, 1),
    ).to(memory_format=torch.channels_last).train()  # fmt: skip
    x = torch.randn(8, 8, 20, 20).to(memory_format=torch.channels_last)
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    with compress_model(model, only("block:bits=8")) as handle:
        model(x).square().sum().backward()
    assert (gradients(model) - expected).norm() < 0.02 * expected.norm() and handle.stats()[-1]["ratio"] > 6
