"""Blocks that are not members of a list of a known class."""

import timm
import torch
import transformers
from helpers.layered_models import SMALL, Residual, names
from torch import nn

from hf_actcompress import compress_model, find_layers


def conv(channels_in, channels, stride=1):
    return [nn.Conv2d(channels_in, channels, 3, stride, 1), nn.ReLU()]


class Stage(nn.Module):
    """Blocks as named children, as in timm's RegNet."""

    def __init__(self):
        super().__init__()
        self.b1, self.b2 = Residual(), Residual()

    def forward(self, x):
        return self.b2(self.b1(x))


class Branches(nn.Module):
    """Two branches of one class, and their sum: a block of Inception."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Residual(), Residual()

    def forward(self, x):
        return self.one(x) + self.two(x)


class Reduction(Branches):
    pass


class Named(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def head():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def test_blocks_that_are_named_children():
    model = Named(stem=nn.Conv2d(3, 8, 3), s1=Stage(), s2=Stage(), head=head())
    assert names(find_layers(model)) == ["stem", "s1.b1", "s1.b2", "s2.b1", "s2.b2", "head"]


def test_a_block_between_blocks_of_another_class_is_not_taken_apart():
    model = Named(stem=nn.Conv2d(3, 8, 3), a1=Branches(), a2=Branches(), b=Reduction(), a3=Branches(), head=head())
    assert names(find_layers(model)) == ["stem", "a1", "a2", "b", "a3", "head"]


def test_a_plain_chain_is_cut_where_the_size_of_the_image_changes():
    vgg = nn.Sequential(nn.Sequential(*conv(3, 8), nn.MaxPool2d(2), *conv(8, 8), *conv(8, 8), nn.MaxPool2d(2)), head())
    assert names(find_layers(vgg)) == ["0.2", "0.7", "1"]
    assert find_layers(vgg)[1].parts == ("0.3", "0.4", "0.5", "0.6", "0.7")
    assert find_layers(vgg)[-1].parts == ("1",)
    strided = nn.Sequential(*conv(3, 8), *conv(8, 8, 2), *conv(8, 8), head())
    assert names(find_layers(strided)) == ["1", "5", "6"]


def test_timm_regnet():
    layers = find_layers(timm.create_model("regnetx_002", pretrained=False))
    assert names(layers)[:4] == ["stem", "s1.b1", "s2.b1", "s3.b1"]
    assert len(layers) == 2 + 13


def test_blocks_whose_forward_is_called_directly_end_with_their_last_part():
    config = transformers.SqueezeBertConfig(**SMALL, embedding_size=16)
    model = transformers.SqueezeBertForSequenceClassification(config)
    layers = find_layers(model)
    assert names(layers)[:-1] == [f"transformer.encoder.layers.{i}" for i in range(4)]
    assert layers[0].module == "transformer.encoder.layers.0.output"
    with compress_model(model, "block:bits=4") as handle:
        model(input_ids=torch.arange(3, 11)[None]).logits.sum().backward()
        assert [row["calls"] for row in handle.stats()] == [1] * 4


def test_a_stage_that_hands_on_a_view_of_its_last_block_is_opened():
    """CvT's last stage gives its classifier the class token alone: a cut after the stage would have no gradient."""
    config = transformers.CvtConfig(embed_dim=[8, 8, 8], num_heads=[1, 1, 1], depth=[1, 2, 3])
    layers = find_layers(transformers.CvtForImageClassification(config))
    assert names(layers)[-3:] == ["cvt.encoder.stages.2.layers.1", "cvt.encoder.stages.2.layers.2", "classifier"]


def test_a_state_space_model_has_no_stem():
    config = transformers.MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=3, state_size=4)
    layers = find_layers(transformers.MambaForCausalLM(config))
    assert (layers[0].kind, layers[0].name, len(layers)) == ("block", "backbone.layers.0", 4)
    assert layers[0].parts[0] == "backbone.embeddings"
