"""Stages in a row compute what the model computes, with its own parameters and gradients."""

import pytest
import torch
from helpers import TEXT_MODELS, batch_of, build
from torch import nn

from hf_actcompress.models.layers import find_layers
from hf_actcompress.pipeline import merge, split

MODELS = [
    *(name for name in TEXT_MODELS if name != "deberta-v2"), "vit", "mobilenetv2_100", "resnet18",
    "vit_tiny_patch16_224", "convnext_atto",
]  # fmt: skip


def run(stages, batch):
    if isinstance(batch, dict):
        side = {k: v for k, v in batch.items() if k not in ("input_ids", "pixel_values", "labels")}
        x = batch.get("input_ids", batch.get("pixel_values"))
    else:
        x, side = batch[0], {}
    for stage in stages:
        x = stage(x, **side)
    return x


def whole(model, batch):
    if isinstance(batch, dict):
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return model(batch[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["first", "last", "every"])
def test_stages_in_a_row_are_the_model(name, how):
    model, batch = build(name).eval(), batch_of(name)
    if name in ("gpt2", "llama"):  # they classify by the last token that is not padding, which has the number 0
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    count = len(find_layers(model))
    cuts = {"first": [0], "last": [count - 2], "every": list(range(count - 1))}[how]
    expected = whole(model, batch)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()), allow_unused=True)
    stages = split(model, cuts)
    found = run(stages, batch)
    assert torch.equal(found, expected)
    others = torch.autograd.grad(found.square().sum(), list(model.parameters()), allow_unused=True)
    for (label, _), a, b in zip(model.named_parameters(), gradients, others, strict=True):
        # Parameters on top of the model are copied into every stage; the first one's are used.
        if "." in label:
            assert (a is None and b is None) or torch.equal(a, b), label


@pytest.mark.parametrize("name", ["bert", "vit", "mobilenetv2_100", "vit_tiny_patch16_224"])
def test_parameters_are_kept_once_under_their_own_names(name):
    model = build(name)
    stages = split(model, stages=3)
    states = [stage.own_state_dict() for stage in stages]
    whole = merge(states)
    assert set(whole) == set(model.state_dict())
    assert all(torch.equal(whole[k], v) for k, v in model.state_dict().items())
    assert sum(len(state) for state in states) == len(whole)


def test_wrong_cuts_are_refused():
    model = build("bert")
    for cuts in ([5], [-1], [1, 0], [0, 0]):
        with pytest.raises(ValueError, match="ascending numbers of layers from 0 to"):
            split(model, cuts)
    for options in ({}, {"cuts": [0], "stages": 2}):
        with pytest.raises(ValueError, match="either cuts or stages"):
            split(model, **options)
    with pytest.raises(ValueError, match="stages=9 is not"):
        split(model, stages=9)
    with pytest.raises(ValueError, match="encoder-decoder"):
        split(build("t5"), [0])
    with pytest.raises(ValueError, match="DebertaV2.*rel_embeddings.*train its own copy"):
        split(build("deberta-v2"), [0])
    with pytest.raises(ValueError):
        split(nn.Linear(2, 2), [0])
