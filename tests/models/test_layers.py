"""Layers are found in run order and numbered as the reference tables number them."""

import os
import subprocess
import sys

import pytest
import timm
import torch
import transformers
from helpers.layered_models import SMALL, T5, bert, classifier, names, tiny_albert, tiny_t5
from torch import nn

from hf_actcompress.models.layers import (
    find_layers,
)  # fmt: skip

# Transformers


@pytest.mark.parametrize(("config", "blocks", "head", "output"), [
    (transformers.BertConfig(**SMALL), "bert.encoder.layer", "classifier", "Tensor"),
    (transformers.RobertaConfig(**SMALL), "roberta.encoder.layer", "classifier", "Tensor"),
    (transformers.DistilBertConfig(vocab_size=99, dim=16, n_layers=4, n_heads=2, hidden_dim=32),
     "distilbert.transformer.layer", "classifier", "Tensor"),
    (transformers.DebertaV2Config(**SMALL), "deberta.encoder.layer", "classifier", "tuple"),
    (transformers.ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
                                   sep_token_id=2), "model.layers", "classifier", "Tensor"),
    (transformers.GPT2Config(vocab_size=99, n_embd=16, n_layer=4, n_head=2, n_positions=40, bos_token_id=1,
                             eos_token_id=2), "transformer.h", "score", "Tensor"),
    (transformers.LlamaConfig(**SMALL), "model.layers", "score", "Tensor"),
], ids=lambda value: getattr(value, "model_type", ""))
def test_a_transformer_is_its_blocks_and_a_head(config, blocks, head, output, caplog):
    layers = find_layers(classifier(config))
    assert names(layers) == [f"{blocks}.{i}" for i in range(4)] + [head]
    assert [layer.index for layer in layers] == [0, 1, 2, 3, 4]
    assert [layer.kind for layer in layers] == ["block"] * 4 + ["head"]
    assert [layer.module for layer in layers] == names(layers)
    for layer in layers[:4]:
        assert (layer.shape, layer.dtype, layer.output) == ((1, 8, 16), torch.float32, output)
        assert (layer.calls, layer.stack) == (1, "")
    assert not [record for record in caplog.records if record.name.startswith("hf_actcompress")]


def test_embeddings_belong_to_block_0_and_the_pooler_to_the_head():
    layers = find_layers(bert())
    assert layers[0].parts == ("bert.embeddings", "bert.encoder.layer.0")
    assert layers[1].parts == ("bert.encoder.layer.1",)
    assert layers[-1].parts == ("bert.pooler", "dropout", "classifier")


def test_what_runs_between_blocks_belongs_to_the_block_that_follows():
    config = transformers.DebertaV2Config(**SMALL, conv_kernel_size=3, conv_act="gelu", relative_attention=True,
                                          position_buckets=8)
    assert find_layers(classifier(config))[1].parts == ("deberta.encoder.conv", "deberta.encoder.layer.1")


def test_vit_has_no_stem_of_its_own():
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
                                    image_size=32, patch_size=8)
    layers = find_layers(transformers.ViTForImageClassification(config))
    assert len(layers) == 4
    assert layers[0].kind == "block"
    assert layers[0].parts[0] == "vit.embeddings"
    assert layers[0].shape == (1, 17, 16)


def test_convolutions_inside_attending_blocks_do_not_make_a_stem():
    config = transformers.ConvBertConfig(**SMALL, embedding_size=16, head_ratio=1)
    layers = find_layers(classifier(config))
    assert [layer.kind for layer in layers] == ["block"] * 4 + ["head"]
    assert layers[0].parts == ("convbert.embeddings", "convbert.encoder.layer.0")


def test_nested_checkpointing_layers_are_taken_innermost():
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2],
                                     window_size=2)
    layers = find_layers(transformers.SwinForImageClassification(config))
    assert names(layers) == ["swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.0",
                             "swin.encoder.layers.1.blocks.1", "classifier"]
    assert {layer.output for layer in layers[:-1]} == {"tuple"}


def test_a_block_that_runs_several_times_is_counted_and_named(caplog):
    layers = find_layers(tiny_albert())
    assert [(layer.kind, layer.calls) for layer in layers] == [("block", 4), ("head", 1)]
    assert layers[0].parts[0] == "albert.embeddings"
    assert "albert_layers.0 runs 4 times" in caplog.text


def test_a_base_model_without_head_ends_with_its_last_block():
    config = transformers.DistilBertConfig(vocab_size=99, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    assert names(find_layers(transformers.DistilBertModel(config))) == ["transformer.layer.0", "transformer.layer.1"]


def test_the_stacks_of_t5_are_numbered_by_themselves():
    layers = find_layers(tiny_t5())
    assert [(e.stack, e.index, e.kind, e.name) for e in layers] == [
        ("encoder", 0, "block", "encoder.block.0"), ("encoder", 1, "block", "encoder.block.1"),
        ("encoder", 2, "block", "encoder.block.2"), ("encoder", 3, "head", "encoder.final_layer_norm"),
        ("decoder", 0, "block", "decoder.block.0"), ("decoder", 1, "block", "decoder.block.1"),
        ("decoder", 2, "head", "lm_head")]
    assert {e.output for e in layers if e.kind == "block"} == {"tuple"}
    assert layers[-1].parts == ("decoder.final_layer_norm", "lm_head")


def test_a_classifier_on_an_encoder_decoder_is_traced():
    layers = find_layers(classifier(transformers.T5Config(**T5)))
    assert layers[-1].name == "classification_head"
    assert layers[-1].shape == (1, 2)


# Convolutional networks


@pytest.mark.parametrize(("name", "blocks", "first", "stem", "stem_module", "head"), [
    ("mobilenetv2_100", 17, "blocks.0.0", "conv_stem", "bn1", "classifier"),
    ("efficientnet_lite0", 16, "blocks.0.0", "conv_stem", "bn1", "classifier"),
    ("resnet18", 8, "layer1.0", "conv1", "maxpool", "fc"),
    ("convnext_atto", 12, "stages.0.blocks.0", "stem", "stem", "head"),
    ("vit_tiny_patch16_224", 12, "blocks.0", None, None, "head"),
])
def test_timm(name, blocks, first, stem, stem_module, head, caplog):
    model = timm.create_model(name, pretrained=False)
    layers = find_layers(model)
    found = [layer for layer in layers if layer.kind == "block"]
    assert len(found) == blocks
    assert len({type(model.get_submodule(layer.name)) for layer in found}) <= 2
    assert found[0].name == first
    # In these models blocks are registered in run order, so the trace must give the same.
    registered = [path for path, _ in model.named_modules()]
    assert [registered.index(layer.name) for layer in found] == sorted(registered.index(e.name) for e in found)
    if stem:
        assert (layers[0].kind, layers[0].name, layers[0].module) == ("stem", stem, stem_module)
        assert layers[0].shape[2:] in {(32, 32), (16, 16)}  # traced at 64 pixels
    else:
        assert layers[0].parts[:2] == ("patch_embed", "pos_drop")
        assert layers[0].shape == (1, 197, 192)  # its size is fixed
    assert (layers[-1].kind, layers[-1].name) == ("head", head)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert all(layer.calls == 1 for layer in layers)
    assert not caplog.records


def test_head_and_stem_of_a_cnn_hold_everything_around_the_blocks():
    layers = find_layers(timm.create_model("mobilenetv2_100", pretrained=False))
    assert layers[0].parts == ("conv_stem", "bn1")
    assert layers[-1].parts == ("conv_head", "bn2", "global_pool", "classifier")


def test_the_stem_output_is_what_block_0_receives():
    model = timm.create_model("resnet18", pretrained=False).eval()
    stem, block = find_layers(model)[:2]
    seen = {}
    model.get_submodule(stem.module).register_forward_hook(lambda m, a, out: seen.update(stem=out))
    model.get_submodule(block.module).register_forward_pre_hook(lambda m, a: seen.update(block=a[0]))
    model(torch.zeros(1, 3, 64, 64))
    assert seen["stem"] is seen["block"]


def test_one_input_channel_and_a_small_fixed_size():
    assert len(find_layers(timm.create_model("resnet18", pretrained=False, in_chans=1))) == 10
    assert len(find_layers(timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32))) == 13


@pytest.mark.parametrize(("kind", "blocks"), [("basic", "ResNetBasicLayer"), ("bottleneck", "ResNetBottleNeckLayer")])
def test_stages_are_opened_and_residual_blocks_are_not(kind, blocks):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=kind)
    model = transformers.ResNetForImageClassification(config)
    layers = find_layers(model)
    assert names(layers) == ["resnet.embedder", "resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.0.layers.1",
                             "resnet.encoder.stages.1.layers.0", "resnet.encoder.stages.1.layers.1", "classifier"]
    assert type(model.get_submodule(layers[1].name)).__name__ == blocks


def test_hf_mobilenet_v2_and_the_timm_wrapper():
    layers = find_layers(transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config()))
    assert (len(layers), layers[0].module, layers[1].name) == (18, "mobilenet_v2.conv_stem", "mobilenet_v2.layer.0")
    config = transformers.TimmWrapperConfig(architecture="mobilenetv2_100", num_labels=10)
    layers = find_layers(transformers.TimmWrapperForImageClassification(config))
    assert (len(layers), layers[0].module, layers[-1].shape) == (19, "timm_model.bn1", (1, 10))


def test_torchvision_inception_modules_are_blocks_though_they_are_in_no_list():
    torchvision = pytest.importorskip("torchvision")
    layers = find_layers(torchvision.models.googlenet(weights=None, init_weights=False))
    assert names(layers)[1:-1] == [f"inception{i}" for i in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
    assert (layers[0].module, layers[-1].name) == ("maxpool2", "fc")


def test_blocks_without_a_residual_stay_closed_where_others_of_their_class_have_one():
    class ConvNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(x))

    class Inverted(nn.Module):
        def __init__(self, residual):
            super().__init__()
            self.body, self.residual = nn.Sequential(ConvNorm(), ConvNorm()), residual

        def forward(self, x):
            y = self.body(x)
            if self.residual:
                y += x  # in place: the same tensor object, but not the same values
            return y

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Inverted(False), Inverted(True), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 8, 8))
    assert names(find_layers(model, torch.zeros(1, 3, 8, 8))) == ["0", "1", "2", "4"]


def test_the_module_imports_neither_transformers_nor_timm():
    code = ("import sys, torch, hf_actcompress.models.layers as layers\n"
            "try: layers.find_layers(torch.nn.Linear(1, 1))\nexcept ValueError: pass\n"
            "print([name for name in ('transformers', 'timm') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]", done.stderr
