"""Layers are found in run order, numbered as the reference tables number them, and the trace leaves no mark."""

import collections
import copy
import os
import subprocess
import sys

import pytest
import timm
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from hf_actcompress.models.layers import (
    find_layers,
    first_tensor,
    match_layers,
    replace_first_tensor,
    select_boundaries,
)  # fmt: skip

SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 40}
T5 = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0}


def classifier(config):
    return transformers.AutoModelForSequenceClassification.from_config(config)


def bert():
    return classifier(transformers.BertConfig(**SMALL))


def tiny_albert():
    return classifier(transformers.AlbertConfig(**SMALL, embedding_size=8))


def tiny_t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def names(layers):
    return [layer.name for layer in layers]


class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Backwards(nn.Module):
    """Runs its blocks in the opposite of registration order, and never runs the auxiliary head."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Linear(8, 2)
        self.fc = nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = self.conv(x)
        for block in reversed(self.blocks):
            x = block(x)
        return self.fc(x.mean((2, 3)))


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
    with pytest.raises(ValueError, match=r"stack='middle'.*\['encoder', 'decoder'\]"):
        select_boundaries(layers, stack="middle")


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"first": 5}, "first=5 .*the model has 5 layers.*from 0 to 4"), ({"last": -1}, "last=-1 .*5 layers"),
    ({"first": 1.0}, r"first=1\.0"), ({"last": True}, "last=True"), ({"placement": "all"}, "'every' or 'cuts'"),
    ({"stack": "encoder"}, "stack='encoder' is unknown"),
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
    with pytest.raises(ValueError, match="'3' matches no layer"):
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
        same = [changed[k] is output[k] for k in keys]
        assert same.count(False) == 1


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


def test_the_module_imports_neither_transformers_nor_timm():
    code = ("import sys, torch, hf_actcompress.models.layers as layers\n"
            "try: layers.find_layers(torch.nn.Linear(1, 1))\nexcept ValueError: pass\n"
            "print([name for name in ('transformers', 'timm') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == "[]", done.stderr
