"""Inputs that are made up from the names of arguments and the config: sound, video, time series, several kinds."""

import pytest
import torch
import transformers
from helpers.layered_models import SMALL, names
from torch import nn

from hf_actcompress import compress_model, find_layers
from hf_actcompress.models.inputs import guesses

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STACKS = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
SERIES = {"prediction_length": 4, "context_length": 12, "lags_sequence": [1, 2], "num_time_features": 2}
TEXT, VISION = {"vocab_size": 99, **SIZES}, {"image_size": 32, "patch_size": 8, **SIZES}


def lxmert():
    config = transformers.LxmertConfig(vocab_size=99, hidden_size=16, num_attention_heads=2, intermediate_size=32,
                                       l_layers=2, x_layers=2, r_layers=1, visual_feat_dim=8)  # fmt: skip
    return transformers.LxmertModel(config)


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        **SIZES, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config)


MODELS = {
    "wav2vec2": wav2vec2,
    "whisper": lambda: transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=99, num_mel_bins=20, max_source_positions=16, max_target_positions=20, decoder_start_token_id=1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **STACKS)),
    "spectrogram": lambda: transformers.ASTModel(transformers.ASTConfig(
        **SIZES, max_length=32, num_mel_bins=16, patch_size=8, frequency_stride=8, time_stride=8)),
    "time series": lambda: transformers.TimeSeriesTransformerModel(
        transformers.TimeSeriesTransformerConfig(**SERIES, **STACKS)),
    "patches of a series": lambda: transformers.PatchTSTModel(transformers.PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=16, num_hidden_layers=2,
        num_attention_heads=2, ffn_dim=32)),
    "video": lambda: transformers.VideoMAEModel(transformers.VideoMAEConfig(num_frames=2, **VISION)),
    "text and image": lambda: transformers.CLIPModel(transformers.CLIPConfig(
        text_config=TEXT, vision_config=VISION, projection_dim=8)),
    "boxes": lambda: transformers.BrosModel(transformers.BrosConfig(
        **TEXT | {"hidden_size": 64, "num_attention_heads": 4})),
    "regions": lxmert,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_traced_without_example_inputs(name, caplog):
    model = MODELS[name]()
    layers = find_layers(model)
    assert all(layer.shape is not None for layer in layers)
    assert not [r for r in caplog.records if "untraced" in r.message]
    if name in ("whisper", "time series"):
        assert {layer.stack for layer in layers} == {"encoder", "decoder"}
    if name == "text and image":
        assert {layer.name.partition(".")[0] for layer in layers[:-1]} == {"text_model", "vision_model"}


def test_rows_and_special_tokens():
    config = transformers.LlamaConfig(**SMALL, image_token_id=4)
    ids = next(guesses(transformers.LlamaForCausalLM(config), rows=3))["input_ids"]
    assert ids.shape == (3, 8)
    assert 4 not in ids


# diffusers is not needed: these have the structure of its UNet2DConditionModel and DiTTransformer2DModel, whose
# config is a mapping and whose forward has no main input.


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.time, self.context = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(1, 8), nn.Linear(6, 8)

    def forward(self, x, t, context):
        return x + self.conv(x) + self.time(t)[..., None, None] + self.context(context).mean(1)[..., None, None]


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.resnets = nn.ModuleList([Part(), Part()])

    def forward(self, x, t, context):
        kept = ()
        for resnet in self.resnets:
            x = resnet(x, t, context)
            kept += (x,)
        return x, kept


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.resnets = nn.ModuleList([Part(), Part()])

    def forward(self, x, kept, t, context):
        for resnet, skipped in zip(self.resnets, reversed(kept), strict=True):
            x = resnet(x + skipped, t, context)
        return x


class UNet(nn.Module):
    config = {"in_channels": 4, "sample_size": 16, "cross_attention_dim": 6}

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList([Down(), Down()]), nn.ModuleList([Up(), Up()])
        self.mid_block = Part()

    def forward(self, sample, timestep, encoder_hidden_states, class_labels=None):
        t, x, kept = timestep[:, None].float(), self.conv_in(sample), []
        for block in self.down_blocks:
            x, states = block(x, t, encoder_hidden_states)
            kept.append(states)
        x = self.mid_block(x, t, encoder_hidden_states)
        for block in self.up_blocks:
            x = block(x, kept.pop(), t, encoder_hidden_states)
        return self.conv_out(x)


class DiT(nn.Module):
    config = {"in_channels": 4, "sample_size": 8, "num_embeds_ada_norm": 5}

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(4, 16, 2, 2)
        self.transformer_blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
                                                for _ in range(3))  # fmt: skip
        self.time, self.label, self.out = nn.Linear(1, 16), nn.Embedding(5, 16), nn.Linear(16, 16)

    def forward(self, hidden_states, timestep, class_labels):
        x = self.proj(hidden_states).flatten(2).transpose(1, 2)
        x = x + (self.time(timestep[:, None].float()) + self.label(class_labels))[:, None]
        for block in self.transformer_blocks:
            x = block(x)
        return self.out(x)


def test_a_diffusion_unet():
    model = UNet()
    layers = find_layers(model)
    assert [layer.kind for layer in layers] == ["stem", *["block"] * 8, "head"]
    assert all(layer.shape is not None for layer in layers)
    assert names(layers)[1:3] == ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1"]
    with compress_model(model, "block:bits=4") as handle:
        model(torch.randn(2, 4, 16, 16), torch.ones(2), torch.randn(2, 8, 6)).sum().backward()
        assert all(row["calls"] == 1 for row in handle.stats())


def test_a_diffusion_transformer():
    layers = find_layers(DiT())
    assert names(layers) == [*(f"transformer_blocks.{i}" for i in range(3)), "out"]
    assert layers[0].shape == (1, 16, 16)
