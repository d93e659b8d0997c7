"""Which layers first, last, placement and patterns choose, and where the hidden state is in their outputs."""

import collections
import dataclasses

import pytest
import timm
import torch
import transformers
from helpers.layered_models import SMALL, bert, classifier, names, tiny_t5
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from hf_actcompress.models.layers import (
    find_layers,
    first_tensor,
    match_layers,
    replace_first_tensor,
    select_boundaries,
)  # fmt: skip

# Boundaries


@pytest.fixture(scope="module")
def bert_layers():
    return find_layers(bert())


@pytest.mark.parametrize(("first", "last", "placement", "expected"), [
    (1, 1, "every", [0, 3]), (1, 2, "cuts", [0, 2]), (2, 2, "every", [0, 1, 2, 3]), (2, 2, "cuts", [1, 2]),
    (0, 0, "every", []), (0, 0, "cuts", []), (0, 1, "every", [3]), (1, 0, "cuts", [0]), (0, 4, "every", [0, 1, 2, 3]),
    (4, 4, "every", [0, 1, 2, 3]), (3, 3, "every", [0, 1, 2, 3]), (3, 2, "cuts", [2]), (4, 0, "cuts", [3]),
])
def test_select_boundaries(bert_layers, first, last, placement, expected):
    chosen = select_boundaries(bert_layers, first, last, placement)
    assert [layer.index for layer in chosen] == expected


def test_roberta_of_the_reference_tables_is_cut_after_block_0_and_before_the_last_block():
    layers = find_layers(classifier(transformers.RobertaConfig(**SMALL)))
    assert names(select_boundaries(layers, first=1, last=2, placement="cuts")) == [
        "roberta.encoder.layer.0", "roberta.encoder.layer.2"]


def test_each_stack_has_its_own_boundaries():
    layers = find_layers(tiny_t5())
    assert names(select_boundaries(layers, 1, 1)) == ["encoder.block.0", "encoder.block.2", "decoder.block.0",
                                                      "decoder.block.1"]
    assert names(select_boundaries(layers, 0, 2, stack="decoder")) == ["decoder.block.0", "decoder.block.1"]
    with pytest.raises(ValueError, match=r"last=3.*the decoder has 3 layers"):
        select_boundaries(layers, 0, 3)
    with pytest.raises(ValueError, match=r"stack='middle'.*'encoder', 'decoder'"):
        select_boundaries(layers, stack="middle")


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"first": 5}, "first=5 .*the model has 5 layers.*from 0 to 4"), ({"last": -1}, "last=-1 .*5 layers"),
    ({"first": 1.0}, r"first=1\.0"), ({"last": True}, "last=True"), ({"placement": "all"}, "'every' or 'cuts'"),
    ({"stack": "encoder"}, "stack='encoder' is not there"),
])
def test_select_boundaries_errors(bert_layers, kwargs, message):
    with pytest.raises(ValueError, match=message):
        select_boundaries(bert_layers, **kwargs)


# Patterns


def test_match_layers(bert_layers):
    assert [e.index for e in match_layers(bert_layers, "bert.encoder.layer.3")] == [3]
    assert [e.index for e in match_layers(bert_layers, "encoder.layer.3")] == [3]
    assert [e.index for e in match_layers(bert_layers, "layer.[12]")] == [1, 2]
    assert [e.index for e in match_layers(bert_layers, "encoder.*")] == [0, 1, 2, 3]
    assert [e.index for e in match_layers(bert_layers, "*")] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"did you mean bert\.encoder\.layer\..*Candidates: bert.encoder.layer.0, "):
        match_layers(bert_layers, "encoder.layers.3")
    with pytest.raises(ValueError, match=r"layers\['3'\] matches no layer"):
        match_layers(bert_layers, "3")
    blocks = match_layers(find_layers(timm.create_model("mobilenetv2_100", pretrained=False)), "blocks.*")
    assert len(blocks) == 17


# Outputs

Pair = collections.namedtuple("Pair", "mask hidden")
HIDDEN, MASK, NEW = torch.zeros(2, 3), torch.ones(2, dtype=torch.long), torch.ones(2, 3)


@pytest.mark.parametrize("output", [
    HIDDEN, (HIDDEN, MASK), (MASK, HIDDEN), (None, HIDDEN, torch.rand(2)), [MASK, HIDDEN], Pair(MASK, HIDDEN),
    {"mask": MASK, "x": HIDDEN}, {"x": torch.rand(1), "last_hidden_state": HIDDEN}, collections.OrderedDict(x=HIDDEN),
    BaseModelOutput(last_hidden_state=HIDDEN, hidden_states=(HIDDEN,)), ImageClassifierOutput(logits=HIDDEN),
    torch.zeros(2, 3).max(dim=1)._replace(values=HIDDEN) if hasattr(torch.return_types.max, "_replace")
    else torch.return_types.max((HIDDEN, MASK)),
], ids=lambda value: type(value).__name__)
def test_the_hidden_state_is_replaced_in_a_copy_of_the_same_type(output):
    assert first_tensor(output) is HIDDEN
    changed = replace_first_tensor(output, NEW)
    assert type(changed) is type(output)
    assert first_tensor(changed) is NEW
    assert first_tensor(output) is HIDDEN  # the original is left alone
    if not isinstance(output, torch.Tensor):
        assert len(changed) == len(output)
        keys = list(output) if hasattr(output, "keys") else range(len(output))
        assert list(changed) == keys if hasattr(output, "keys") else True
        for key in keys:
            holds = any(each is HIDDEN for each in (output[key] if isinstance(output[key], tuple) else [output[key]]))
            assert (changed[key] is not output[key]) == holds, key


def test_every_place_of_the_hidden_state_is_replaced_and_nothing_else():
    """A head may read the last of hidden_states where the next layer reads last_hidden_state."""
    first = torch.rand(2, 3)
    changed = replace_first_tensor(BaseModelOutput(last_hidden_state=HIDDEN, hidden_states=(first, HIDDEN)), NEW)
    assert changed.last_hidden_state is changed.hidden_states[1] is NEW
    assert changed.hidden_states[0] is first


@dataclasses.dataclass(frozen=True)
class Output:
    mask: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize(("output", "read"), [
    (((HIDDEN, MASK), 4, 4), lambda o: o[0][0]),  # PVTv2: the layer's tuple, the height, the width
    ([[MASK, HIDDEN], "text"], lambda o: o[0][1]), (Output(MASK, HIDDEN), lambda o: o.hidden),
])
def test_the_hidden_state_may_lie_deeper_or_in_a_dataclass(output, read):
    assert first_tensor(output) is HIDDEN
    changed = replace_first_tensor(output, NEW)
    assert type(changed) is type(output)
    assert read(changed) is NEW
    assert read(output) is HIDDEN


def test_model_outputs_keep_attribute_and_item_the_same():
    output = BaseModelOutput(last_hidden_state=HIDDEN, attentions=(MASK,))
    changed = replace_first_tensor(output, NEW)
    assert changed.last_hidden_state is changed["last_hidden_state"] is changed[0] is NEW
    assert changed.attentions is output.attentions


@pytest.mark.parametrize("output", [None, (), (MASK, None), {"mask": MASK}, "text"])
def test_outputs_without_a_hidden_state(output):
    assert first_tensor(output) is None
    with pytest.raises(ValueError, match="no floating tensor"):
        replace_first_tensor(output, NEW)
