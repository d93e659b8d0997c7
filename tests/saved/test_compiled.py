"""Saved tensors inside torch.compile.  Most graphs run without inductor, which makes the same graphs in seconds."""

from __future__ import annotations

import contextlib

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.saved.compiled import graph_hooks, graphs_of

BACKEND = "aot_eager_decomp_partition"  # inductor's graphs, run by torch
IDS = torch.randint(5, 200, (8, 64), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@contextlib.contextmanager
def saving(spec, pack=lambda x: x, unpack=lambda x: x):
    hooks = graph_hooks(parse_codec(spec), pack, unpack)
    torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    try:
        yield
    finally:
        torch._C._autograd._pop_saved_tensors_default_hooks()


def bert(layers=2):
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=512, vocab_size=200,
            hidden_dropout_prob=0, attention_probs_dropout_prob=0,
        )
    ).train()  # fmt: skip
    for layer in model.bert.encoder.layer:  # sharp attention: random weights hide what goes wrong with it
        layer.attention.self.query.weight.data.mul_(20)
        layer.attention.self.key.weight.data.mul_(20)
    return model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS[:, 0] % 2}


def llama(layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=200, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=384,
    )  # fmt: skip
    return LlamaForCausalLM(config).train(), {"input_ids": IDS, "labels": IDS}


def gradients(model, call, inputs):
    model.zero_grad(set_to_none=True)
    output = call(**inputs) if isinstance(inputs, dict) else call(*inputs)
    loss = output.loss if hasattr(output, "loss") else output.square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def error(a, b):
    return float((a - b).norm() / b.norm())


def rows_of(spec):
    return graphs_of(parse_codec(spec))[-1]


def ratio_of(spec):
    rows = rows_of(spec)
    return sum(row.raw for row in rows) / sum(row.held for row in rows)


@pytest.mark.parametrize(
    ("make", "errors", "ratio"), [(bert, {8: 0.025, 4: 0.5}, 12), (llama, {8: 0.01, 4: 0.2}, 11)]
)
def test_transformers_keep_codes_and_make_the_rest_again(make, errors, ratio):
    model, inputs = make()
    exact = gradients(model, model, inputs)
    for bits, limit in errors.items():
        spec = f"block:bits={bits}"
        torch._dynamo.reset()
        call = torch.compile(model, fullgraph=True, backend=BACKEND)
        with saving(spec):
            assert error(gradients(model, call, inputs), exact) < limit
    assert ratio_of(spec) > ratio
    kept = {row.kept for row in rows_of(spec)}
    assert {"codes", "again", "exact"} <= kept
    assert all(row.why for row in rows_of(spec) if row.kept == "exact")


@pytest.mark.parametrize("make", [bert, llama])
def test_with_a_memory_budget_what_is_left_is_coded(make):
    """Products and attention run again in backward, then, from decoded values."""
    model, inputs = make()
    exact, spec = gradients(model, model, inputs), "block:bits=8"
    with torch._functorch.config.patch(activation_memory_budget=0.3), saving(spec):
        assert error(gradients(model, torch.compile(model, fullgraph=True, backend=BACKEND), inputs), exact) < 0.1
    wide = [row for row in rows_of(spec) if row.raw >= 1 << 16]
    assert {"aten::addmm", "aten::mm"} & {row.operation for row in wide}
    assert {row.kept for row in wide} == {"codes"}, [row for row in wide if row.kept != "codes"]


@pytest.mark.parametrize("image", [False, True])
def test_the_mask_of_a_relu_is_exact(image):
    """The gradient of the input depends on weights and masks alone."""
    nn = torch.nn
    if image:
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
        x = torch.randn(4, 3, 38, 38)
    else:
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
        x = torch.randn(256, 64)
    found = []
    for call in (model, torch.compile(model.forward, fullgraph=True, backend=BACKEND)):
        own = x.clone().requires_grad_()
        with contextlib.nullcontext() if call is model else saving("block:bits=2"):
            y = call(own)
            (gradient,) = torch.autograd.grad(y, own, torch.ones_like(y))
        found.append(gradient)
    assert error(*found) < 1e-5
    assert sum(row.kept == "codes" and "relu" in row.operation for row in rows_of("block:bits=2")) == 2
    assert ratio_of("block:bits=2") > 6


@pytest.mark.parametrize("budget", [1.0, 0.3])
@pytest.mark.parametrize("activation", ["ReLU", "ReLU6", "LeakyReLU", "Hardtanh", "Hardswish"])
def test_masks_of_what_is_computed_again_are_those_of_the_forward_pass(activation, budget):
    """Backward normalises the decoded output of the convolution again, and compares that with bounds."""
    nn = torch.nn

    def block(inputs):
        return nn.Sequential(nn.Conv2d(inputs, 16, 3), nn.BatchNorm2d(16), getattr(nn, activation)())

    model, x = nn.Sequential(block(3), block(16), nn.Conv2d(16, 4, 3)), torch.randn(8, 3, 38, 38) * 3
    exact, spec = gradients(model, model, (x,)), "block:bits=8"
    with torch._functorch.config.patch(activation_memory_budget=budget), saving(spec):
        call = torch.compile(model.forward, fullgraph=True, backend=BACKEND)
        assert error(gradients(model, call, (x,)), exact) < 0.01
    assert all(row.kept != "exact" for row in rows_of(spec) if row.raw > 1 << 16)
