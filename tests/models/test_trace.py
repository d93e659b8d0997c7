"""The traced forward: run order, example inputs, explicit names, and a model that is afterwards as before."""

import copy

import pytest
import timm
import torch
import transformers
from helpers.layered_models import Backwards, Residual, bert, names
from torch import nn

from hf_actcompress.models.layers import (
    find_layers,
)  # fmt: skip

# The trace


def test_order_is_run_order_and_what_does_not_run_is_left_out():
    layers = find_layers(Backwards())
    assert names(layers) == ["conv", "blocks.2", "blocks.1", "blocks.0", "fc"]


def test_a_named_block_that_does_not_run_is_left_out_with_a_warning(caplog):
    layers = find_layers(Backwards(), names=["aux", "blocks.*"])
    assert names(layers) == ["conv", "blocks.2", "blocks.1", "blocks.0", "fc"]
    assert "['aux']" in caplog.text


def test_without_a_forward_the_order_is_registration_order_and_a_warning_is_logged(caplog):
    layers = find_layers(Backwards(), example_inputs=torch.zeros(3))
    assert [layer.name for layer in layers if layer.kind == "block"] == ["blocks.0", "blocks.1", "blocks.2"]
    assert layers[0].shape is None
    assert "untraced" in caplog.text
    assert "RuntimeError" in caplog.text
    layers = find_layers(Backwards(), example_inputs=torch.zeros(3), names=["blocks.2", "blocks.0", "blocks.1"])
    assert [layer.name for layer in layers if layer.kind == "block"] == ["blocks.2", "blocks.0", "blocks.1"]


@pytest.mark.parametrize("inputs", [
    {"input_ids": torch.ones(2, 5, dtype=torch.long)}, (torch.ones(2, 5, dtype=torch.long),),
    torch.ones(2, 5, dtype=torch.long), transformers.BatchEncoding({"input_ids": torch.ones(2, 5, dtype=torch.long)})])
def test_example_inputs_may_be_mapping_tuple_or_tensor(inputs):
    assert find_layers(bert(), example_inputs=inputs)[0].shape == (2, 5, 16)


def test_a_low_precision_model_is_traced_in_its_own_type():
    assert find_layers(timm.create_model("resnet18", pretrained=False).bfloat16())[3].dtype == torch.bfloat16


class Noisy(nn.Module):
    """Draws random numbers, changes buffers in place and by assignment, and fails on demand."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Residual(), Residual())
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))
        self.fail = False

    def forward(self, x):
        self.steps += 1
        self.last = torch.rand(2)
        x = self.blocks(x)
        if self.fail:
            raise RuntimeError("on demand")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_the_trace_leaves_no_mark(fail):
    model = Noisy()
    model.fail = fail
    model.train()
    model.blocks[1].norm.eval()
    identities = {name: id(buffer) for name, buffer in model.named_buffers()}
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    find_layers(model, torch.rand(2, 8, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == flags
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == identities
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


# Explicit names and missing layers


def test_names_are_paths_or_globs_within_one_component():
    model = timm.create_model("mobilenetv2_100", pretrained=False)
    assert names(find_layers(model, names=["blocks.*"])) == ["conv_stem", *(f"blocks.{i}" for i in range(7)),
                                                             "classifier"]
    assert len(find_layers(model, names=["blocks.*.*"])) == 19


def test_names_make_layers_of_a_plain_network():
    lenet = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                          nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    layers = find_layers(lenet, names=["2", "6"])
    assert [(e.kind, e.name, e.module) for e in layers] == [
        ("stem", "0", "1"), ("block", "2", "2"), ("block", "6", "6"), ("head", "8", "8")]


def test_a_stem_is_not_hooked_at_an_activation_that_runs_again_elsewhere():
    class Shared(Backwards):
        def __init__(self):
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x):
            x = self.act(self.conv(x))
            for block in self.blocks:
                x = self.act(block(x))
            return self.fc(x.mean((2, 3)))

    stem = find_layers(Shared())[0]
    assert (stem.module, stem.calls) == ("conv", 1)


def test_a_wrong_name_is_answered_with_candidates():
    message = r"'layer1.7' matches no module.*did you mean layer1\.[01].*Candidates: conv1"
    with pytest.raises(ValueError, match=message):
        find_layers(timm.create_model("resnet18", pretrained=False), names=["layer1.7"])
    with pytest.raises(ValueError, match=r"'layer1.0' lies inside 'layer1'"):
        find_layers(timm.create_model("resnet18", pretrained=False), names=["layer1", "layer1.0"])


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())])
def test_a_model_without_layers_raises_and_says_what_to_do(model):
    with pytest.raises(ValueError, match=r"no layers in \w+: looked for .*names=\[\.\.\.\]"):
        find_layers(model)


def test_blocks_that_never_run_raise():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.blocks = nn.Conv2d(3, 2, 1), nn.Sequential(Residual())

        def forward(self, x):
            return self.conv(x)

    with pytest.raises(ValueError, match="no layers in Unused.*ran in the traced forward"):
        find_layers(Unused())
