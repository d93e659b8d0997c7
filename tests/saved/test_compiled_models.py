"""compress_model and torch.compile in every order: gradients close, bytes coded, graphs whole."""

import pytest
import torch
from helpers.saved import only
from torch import nn

from hf_actcompress import compress_model
from hf_actcompress.saved.compiled.operators import STATES

from .test_compiled import BACKEND, bert, error, gradients, llama

FOUR, NOISY = "block:bits=4", "block:bits=4,round=stochastic"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    return torch.compile(model, backend=BACKEND, **options)


def ratio(handle):
    return handle.meters["saved"].record()["ratio"]


class Outer(nn.Module):
    """A user's module around a model, which is what gets compiled."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.last = inner, nn.Linear(2, 2)

    def forward(self, **inputs):
        labels = inputs.pop("labels")
        return nn.functional.cross_entropy(self.last(self.inner(**inputs).logits), labels)


def whole(model):
    return compiled(model, fullgraph=True)


def by_layer(model):
    for layer in model.bert.encoder.layer:
        layer.compile(backend=BACKEND, fullgraph=True)
    return model


def in_pieces(model):
    """With a graph break before each layer."""
    for layer in model.bert.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    return compiled(model)


@pytest.mark.parametrize(
    ("compile_", "ran_before"), [(whole, False), (whole, True), (by_layer, True), (in_pieces, False)]
)
def test_attached_before_and_after(compile_, ran_before):
    model, inputs = bert(layers=1)
    exact = gradients(model, model, inputs)
    call = compile_(model)
    if ran_before:
        assert error(gradients(model, call, inputs), exact) < 1e-4
    for codec, limit in (("identity", 1e-5), (FOUR, 0.5)):
        with compress_model(model, only(codec)) as handle:
            found = [gradients(model, call, inputs) for _ in range(2)]
        assert all(error(one, exact) <= limit for one in found)
        assert codec == "identity" or ratio(handle) > 7
    assert error(gradients(model, call, inputs), exact) < 1e-4, "nothing is left"


def test_a_module_around_the_model_is_compiled():
    model, inputs = bert(layers=1)
    outer = Outer(model)
    exact = gradients_of(outer, outer, inputs)
    with compress_model(outer, only(FOUR)) as handle:
        assert error(gradients_of(outer, compiled(outer, fullgraph=True), inputs), exact) < 0.5
    assert ratio(handle) > 7


def gradients_of(model, call, inputs):
    model.zero_grad(set_to_none=True)
    call(**inputs).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_sizes_that_change():
    model, inputs = llama(layers=1)
    small = {name: x[:3, :48] for name, x in inputs.items()}
    call = compiled(model, dynamic=True, fullgraph=True)
    with compress_model(model, only("block:bits=8")) as handle:
        for batch in (inputs, small):
            found = gradients(model, call, batch)
            with handle.disabled():
                exact = gradients(model, model, batch)
            assert error(found, exact) < 0.02
    assert ratio(handle) > 5


def test_half_precision():
    model, inputs = llama(layers=1)
    model.bfloat16()
    exact = gradients(model, model, inputs)
    with compress_model(model, only(FOUR)) as handle:
        assert error(gradients(model, compiled(model, fullgraph=True), inputs), exact) < 0.3
    assert ratio(handle) > 5


def test_noise_is_the_sites_own():
    """Seeded by the configuration, and continued from a checkpoint."""
    model, inputs = bert(layers=1)
    call = compiled(model, fullgraph=True)
    with compress_model(model, only(NOISY)) as handle:
        first, saved, second = gradients(model, call, inputs), handle.state_dict(), gradients(model, call, inputs)
        assert STATES[str(handle.saved.codec)] is handle.saved.state
    with compress_model(model, only(NOISY)) as handle:
        assert torch.equal(gradients(model, call, inputs), first)
        handle.load_state_dict(saved)
        assert torch.equal(gradients(model, call, inputs), second)
    with compress_model(model, only(NOISY, seed=1)):
        assert not torch.equal(gradients(model, call, inputs), first)


def test_the_report_names_operations():
    model, inputs = bert(layers=1)
    with compress_model(model, only(FOUR)) as handle:
        gradients(model, compiled(model, fullgraph=True), inputs)
        rows, counts = handle.report(), handle.meters["saved"].counts()
    assert {"codes", "made again"} <= {row["kept"] for row in rows}
    assert any(row["operation"] == "aten::addmm" for row in rows)
    assert sum(row["held_bytes"] for row in rows) == pytest.approx(counts.payload_bytes, rel=0.01)
