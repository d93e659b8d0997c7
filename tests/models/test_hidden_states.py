"""What the next layer gets is what hidden states, backbones, timm's intermediates and hooks of others get."""

import pytest
import timm
import torch
import transformers
from helpers.layered_models import SMALL, bert

from hf_actcompress import ActCompressConfig, compress_model

TWO_BITS = ActCompressConfig(codec="uniform:bits=2", first=1, last=0)
VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
       "patch_size": 8}  # fmt: skip


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**VIT))


def received(model, path):
    """Notes the first input of a module."""
    seen = []
    model.get_submodule(path).register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    return seen


@pytest.mark.parametrize("ran_before", [True, False], ids=["capture hooks first", "boundary first"])
@pytest.mark.parametrize(("make", "second"), [
    (bert, "bert.encoder.layer.1"), (llama, "model.layers.1"), (vit, "layers.1"),
], ids=["bert", "llama", "vit"])  # fmt: skip
def test_output_hidden_states(make, second, ran_before):
    model = make().eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)} if make is vit else {"input_ids": torch.arange(3, 11)[None]}
    if ran_before:
        model(**batch, output_hidden_states=True)  # installs transformers' hooks
    seen = received(model, second)
    with compress_model(model, TWO_BITS):
        hidden = model(**batch, output_hidden_states=True).hidden_states[1]
    assert torch.equal(hidden, seen[-1])
    assert len(hidden.unique()) <= 4 * 2  # a scale for each of two samples


def test_backbones_give_feature_maps_from_after_the_boundary():
    backbone = transformers.Dinov2Backbone(
        transformers.Dinov2Config(
            **VIT, mlp_ratio=2, out_indices=[1], apply_layernorm=False, reshape_hidden_states=False
        )
    ).eval()
    pixels = torch.randn(2, 3, 32, 32)
    plain = backbone(pixels).feature_maps[0]  # and installs the hooks
    with compress_model(backbone, TWO_BITS):
        changed = backbone(pixels).feature_maps[0]
    assert not torch.equal(changed, plain)
    assert len(changed.unique()) <= 4 * 2


def test_timm_intermediates():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=3).eval()
    x, seen = torch.randn(2, 3, 32, 32), received(model, "blocks.1")
    with compress_model(model, TWO_BITS):
        got = model.forward_intermediates(x, indices=[0], output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(got, seen[-1][:, 1:])


@pytest.mark.parametrize(("name", "options"), [
    ("resnet18", {}), ("mobilenetv2_100", {"feature_cls": "hook"}), ("vit_tiny_patch16_224", {"img_size": 32}),
])  # fmt: skip
def test_timm_features_only(name, options):
    model = timm.create_model(name, pretrained=False, features_only=True, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = model(x)
    with compress_model(model, ActCompressConfig(codec="uniform:bits=2", first=1, last=0), example_inputs=x):
        changed = model(x)
    assert all(not torch.equal(a, b) for a, b in zip(plain[1:], changed[1:], strict=True))
    with compress_model(model, "identity", example_inputs=x):
        assert all(torch.equal(a, b) for a, b in zip(plain, model(x), strict=True))


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_hooks_of_others(first):
    model, seen = bert().eval(), []
    batch, block = {"input_ids": torch.arange(3, 11)[None]}, model.bert.encoder.layer[0]
    hook = lambda m, args, output: seen.append(output)  # noqa: E731
    if first == "theirs":
        block.register_forward_hook(hook)
    following = received(model, "bert.encoder.layer.1")
    with compress_model(model, TWO_BITS):
        if first == "ours":
            block.register_forward_hook(hook)
        seen.clear(), following.clear()
        model(**batch)
    assert torch.equal(seen[0], following[0])
