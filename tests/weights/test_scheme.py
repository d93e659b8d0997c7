"""Which parameters a pattern names."""

import pytest
import torch
from torch import nn

from hf_actcompress.weights import find_tasks, parse_scheme
from hf_actcompress.weights.compressions import Codebook
from hf_actcompress.weights.pruning import Prune
from hf_actcompress.workloads.lenet import LeNet5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([Block(), Block()])})
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight


def names(model, scheme):
    return [list(task.names) for task in find_tasks(model, scheme)]


def test_modules_by_glob_and_the_rest_by_star():
    assert names(LeNet5(), {"conv*": "prune:keep=104", "*": "codebook:k=2"}) == [
        ["conv1.weight", "conv2.weight"], ["fc1.weight", "fc2.weight"],
    ]  # fmt: skip


def test_patterns_may_begin_at_any_component():
    dense = ["encoder.layer.0.dense.weight", "encoder.layer.1.dense.weight"]
    for pattern in ("layer.*.dense", "dense", "encoder.*.dense", "encoder.layer.*.dense.weight", "layer.?.dense"):
        assert names(Net(), {pattern: "binary"}) == [dense], pattern
    assert names(Net(), {"layer.1.*": "binary"}) == [dense[1:]]
    with pytest.raises(ValueError, match="matches no parameter"):
        names(Net(), {"ense": "binary"})


def test_biases_and_norms_only_by_their_names():
    assert names(LeNet5(), {"fc?.bias": "codebook:k=4"}) == [["fc1.bias", "fc2.bias"]]
    assert "norm" not in str(names(Net(), "binary"))
    assert names(Net(), {"layer.0.norm.weight": "binary"}) == [["encoder.layer.0.norm.weight"]]


def test_shared_parameters_count_once():
    assert names(Net(), "binary")[0].count("embed.weight") == 1
    assert "head.weight" not in str(names(Net(), "binary"))


def test_forms_of_a_scheme():
    expected = {"fc*": Codebook(4), "conv1": Prune("1%")}
    assert parse_scheme({"fc*": "codebook:k=4", "conv1": Prune("1%")}) == expected
    assert parse_scheme('{"fc*": "codebook:k=4", "conv1": "prune:keep=1%"}') == expected
    assert parse_scheme("codebook:k=4") == {"*": Codebook(4)}


@pytest.mark.parametrize(("scheme", "message"), [
    ({"fd*": "binary"}, r"'fd\*'.*matches no parameter. Layers still free: conv1, conv2, fc1, fc2; .* conv1.weight"),
    ({"fc*": "binary", "fc1": "ternary"}, r"'fc1'.*its matches \['fc1.weight'\] belong to earlier patterns"),
    ({"conv1": "lowrank:rank=21"}, r"rank=21 is above 20, the largest of conv1.weight \(20, 1, 5, 5\)"),
    ({"fc1.bias": "lowrank:rank=1"}, "is above 0"),
    ({}, "maps patterns to compressions"),
    ("{nonsense}", "is not JSON"),
    ({"fc1": "nonsense"}, "Unknown compression"),
])  # fmt: skip
def test_schemes_that_do_not_fit(scheme, message):
    with pytest.raises(ValueError, match=message):
        find_tasks(LeNet5(), scheme)


def test_integer_parameters_are_no_candidates():
    model = nn.Module()
    model.a = nn.Parameter(torch.zeros(2, 2, dtype=torch.int32), requires_grad=False)
    model.b = nn.Parameter(torch.zeros(2, 2))
    assert names(model, {"*": "binary"}) == [["b"]]
