"""Stages in a row compute what the model computes, with its own parameters and gradients."""

import pytest
import torch
import transformers
from helpers import SPECIAL, T5, TEXT, TEXT_MODELS, Block, batch_of, build, stack, text_batch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from hf_actcompress.models.layers import find_layers
from hf_actcompress.pipeline import merge, split
from hf_actcompress.pipeline.balance import partition

MODELS = [
    *TEXT_MODELS, "vit", "mobilenetv2_100", "resnet18", "vit_tiny_patch16_224", "convnext_atto",
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
        # Tied parameters add their gradients up in another order.
        same = torch.equal if how != "every" or name != "deberta-v2" else torch.allclose
        assert (a is None and b is None) or same(a, b), label


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
    with pytest.raises(ValueError):
        split(nn.Linear(2, 2), [0])


# -- parameters that several stages need, or that belong to no layer ----------------------------------------------
SMALL = {k: v for k, v in TEXT.items() if k != "num_labels"}
TIED = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=4, n_head=2, n_positions=40, **SPECIAL)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, **SPECIAL, tie_word_embeddings=True)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_is_shared_by_the_stages_that_use_it(name):
    torch.manual_seed(0)
    model, batch = TIED[name]().eval(), text_batch()
    expected = whole(model, batch)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    stages = split(model, stages=3)
    assert list(stages[0].shared.stages.values()) == [(0, 2)]
    assert torch.equal(run(stages, batch), expected)
    others = torch.autograd.grad(run(stages, batch).square().sum(), list(model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, others, strict=True))
    assert set(merge([stage.own_state_dict() for stage in stages])) == set(model.state_dict())


class Plain(nn.Module):
    """Blocks of its own, and what the cases below do around them."""

    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.inp, self.head = nn.Linear(16, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(Block(16, 0.0) for _ in range(4))
        self.token, self.scale = nn.Parameter(torch.randn(16)), nn.Parameter(torch.zeros(()))
        self.unused = nn.Parameter(torch.ones(2))
        self.table = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        first = x = self.inp(x) + self.token
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.case == "every block":
                x = x + self.table[number]
            if self.case == "skips" and number == 3:
                x = x + first
        if self.case == "reads a weight":
            x = linear(x, self.inp.weight)
        return self.head(x) * self.scale.exp()


@pytest.mark.parametrize("case", ["plain", "every block", "reads a weight"])
def test_parameters_of_no_layer_are_trained_where_they_are_used(case):
    x, y = torch.randn(8, 16), torch.arange(8) % 3
    reference, model = Plain(case), Plain(case)
    stages = split(model, stages=3, example_inputs=x[:1])
    names = [{name for name, _ in stage.model.named_parameters() if "." not in name} for stage in stages]
    tables = ["table"] if case == "every block" else []
    assert names == [{"token", "unused", *tables, *([] if tables else ["table"])}, {*tables}, {"scale", *tables}]
    shared = {"plain": {}, "every block": {"table": (0, 1, 2)}, "reads a weight": {"inp.weight": (0, 2)}}
    assert stages[0].shared.stages == shared[case]
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (reference, model)]
    for _ in range(3):
        cross_entropy(reference(x), y).backward()
        cross_entropy(run(stages, (x, y)), y).backward()
        for step in steps:
            step.step()
            step.zero_grad()
    found = merge([stage.own_state_dict() for stage in stages])
    assert set(found) == set(reference.state_dict())
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in reference.state_dict().items())
    assert sum(len(stage.own_state_dict()) for stage in stages) == len(found)


def test_a_connection_that_skips_a_cut_is_refused():
    with pytest.raises(ValueError, match=r"cut after layer \d.*what inp computes in stage 0 is used again in stage 1"):
        split(Plain("skips"), stages=2, example_inputs=torch.randn(1, 16))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="SelfAttention computes in stage 0 is used again"):
        split(transformers.T5EncoderModel(transformers.T5Config(**T5)), [0])


def test_frozen_parameters_count_and_stay_frozen():
    model = build("bert")
    for name, p in model.named_parameters():
        p.requires_grad_("classifier" in name)
    stages = split(model, stages=2)
    assert [p.requires_grad for p in model.parameters()] == ["classifier" in n for n, _ in model.named_parameters()]
    assert set(merge([stage.own_state_dict() for stage in stages])) == set(model.state_dict())


def test_the_model_still_runs_as_a_whole_and_can_be_split_again():
    model, batch = build("bert").eval(), text_batch()
    expected = whole(model, batch)
    for cuts in ([0], [1, 2]):
        stages = split(model, cuts)
        assert torch.equal(whole(model, batch), expected) and torch.equal(run(stages, batch), expected)


@pytest.mark.parametrize(("balance", "expected"), {
    "layers": [2, 2], "parameters": [1, 3], "flops": [1, 3],
}.items())  # fmt: skip
def test_stages_can_have_about_as_much_of_something(balance, expected):
    model = stack(blocks=3)
    model.blocks[0].first, model.blocks[0].second = nn.Linear(8, 64), nn.Linear(64, 8)
    stages = split(model, stages=2, balance=balance, example_inputs=torch.randn(2, 8))
    assert [len(stage.layers) for stage in stages] == expected
    assert [len(s.layers) for s in split(model, stages=2, balance="time", example_inputs=torch.randn(2, 8))]
    with pytest.raises(ValueError, match="balance='size' is not known; choose one of: layers, parameters"):
        split(model, stages=2, balance="size", example_inputs=torch.randn(2, 8))


def test_the_dearest_stage_is_as_cheap_as_it_can_be():
    for seed in range(20):
        costs = torch.rand(7, generator=torch.Generator().manual_seed(seed)).tolist()
        bounds = partition(costs, 3)
        dearest = max(sum(costs[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))
        every = [max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:])) for a in range(1, 6) for b in range(a + 1, 7)]
        assert dearest == pytest.approx(min(every)) and bounds[0] == 0 and bounds[-1] == 7
