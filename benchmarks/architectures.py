"""Small models of every architecture that transformers and timm can build without weights, each with a batch.

transformers: the default configuration of each model type made small, and the first of its heads that takes one of the
batches below.  timm: the smallest model of each of its modules, and more of the large families.  Weights are random;
dropout and whatever drops layers, paths or frames is off.  This file knows nothing of compression.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

LENGTH, WIDTH, SIDE, LABELS, VOCABULARY = 64, 64, 64, 5, 128
MOST = 140e6  # parameters

Batch = dict[str, Any]

_LAYERS = dict.fromkeys(
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_block num_blocks num_hidden_groups encoder_num_hidden_layers "
    "decoder_num_hidden_layers".split(), 2
)  # fmt: skip
_HEADS = dict.fromkeys(
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads decoder_num_attention_heads "
    "encoder_num_attention_heads".split(), 4
)  # fmt: skip
_WIDTHS = dict.fromkeys(
    "hidden_size d_model n_embd dim embed_dim embedding_size projection_dim encoder_hidden_size decoder_hidden_size "
    "d_embed output_size hidden_dim encoder_embed_dim decoder_embed_dim".split(), WIDTH
)  # fmt: skip
_INNER = dict.fromkeys(
    "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner d_inner mlp_dim ffn_hidden_size "
    "dim_feedforward decoder_intermediate_size encoder_intermediate_size".split(), 2 * WIDTH
)  # fmt: skip
_SIXTEEN = dict.fromkeys(
    "d_kv d_head head_dim global_head_dim kv_channels rotary_dim q_lora_rank kv_lora_rank v_head_dim qk_nope_head_dim "
    "qk_rope_head_dim attention_head_size state_size mamba_d_state".split(), 16
)  # fmt: skip
SMALL: dict[str, Any] = {
    **_LAYERS, **_HEADS, **_WIDTHS, **_INNER, **_SIXTEEN,
    "num_key_value_heads": 2, "num_kv_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 2 * LENGTH,
    "n_positions": 2 * LENGTH, "image_size": SIDE, "img_size": SIDE, "patch_size": 8, "num_frames": 4,
    "tubelet_size": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "top_k_experts": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "n_group": 1, "num_group": 1, "num_expert_group": 1, "window_size": 4, "topk_group": 1,
    "first_k_dense_replace": 1, "num_labels": LABELS, "pad_token_id": 0,
    "bos_token_id": 1, "entity_vocab_size": VOCABULARY, "max_window_layers": 2, "max_length": LENGTH,
    "eos_token_id": 2, "decoder_start_token_id": 1, "layerdrop": 0.0, "apply_spec_augment": False, "num_mel_bins": 16,
    "max_source_positions": LENGTH, "max_target_positions": 2 * LENGTH, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "num_nextn_predict_layers": 0, "num_queries": 16, "use_cache": False,
    "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "use_pretrained_backbone": False, "attention_window": 16,
    "block_size": 16, "num_random_blocks": 1, "layer_norm_eps": 1e-5, "prediction_length": 16,
    "context_length": LENGTH,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "num_buckets": None,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "lru_width": WIDTH,
}  # fmt: skip

# Batches, in the order in which they are tried.
HEADS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT",
    "VIDEO_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "SPEECH_SEQ_2_SEQ", "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION", "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION", "IMAGE_TO_IMAGE", "KEYPOINT_DETECTION", "POSE_ESTIMATION", "TIME_SERIES_PREDICTION",
    "SEQUENCE_CLASSIFICATION", "MULTIMODAL_LM", "PRETRAINING", "",
)  # fmt: skip


def _small(kind: type, options: dict[str, Any]) -> Any:
    """A configuration of that kind with these options as far as it has them, without dropout; configurations within
    it too."""
    base = kind()
    chosen = {key: value for key, value in options.items() if hasattr(base, key) and key not in kind.attribute_map}
    for key, value in base.to_dict().items():
        if isinstance(value, float) and "drop" in key:
            chosen[key] = 0.0
        elif key in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "rope_type" in value:
            chosen[key] = value | {"mrope_section": [2, 3, 3]}
        elif key in ("depths", "layer_depths", "num_blocks_per_stage") and isinstance(value, (list, tuple)):
            chosen[key] = type(value)(min(d, 1 + (i == 1)) for i, d in enumerate(value))
        elif isinstance(value, (list, tuple)) and key in ("image_size", "patch_size") and key in chosen:
            chosen[key] = type(value)([chosen[key]] * len(value))
    for key in kind.sub_configs:
        inner = getattr(base, key, None)
        if inner is not None:
            chosen[key] = _small(type(inner), options)
    for key, default in (("head_dim", None), ("num_buckets", None)):
        if key in chosen and getattr(base, key) is default:
            chosen.pop(key)
    return kind(**chosen)


def configuration(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    problems = []
    for left_out in ((), ("head_dim",), tuple(_SIXTEEN), (*_SIXTEEN, *_WIDTHS, *_HEADS, *_INNER, "patch_size")):
        options = {key: value for key, value in SMALL.items() if key not in left_out}
        try:
            yield _small(CONFIG_MAPPING[name], options)
        except Exception as error:  # noqa: BLE001  (checks of hundreds of kinds)
            problems.append(error)
    if len(problems) == 4:
        raise problems[0]


def _find(config: Any, key: str, default: Any) -> Any:
    for one in (config, *(getattr(config, k, None) for k in type(config).sub_configs)):
        value = getattr(one, key, None)
        if value is not None:
            return value
    return default


def batches(config: Any, model: nn.Module, rows: int) -> Iterator[Batch]:
    """Batches that a model may take, likely ones first."""
    takes = set(inspect.signature(model.forward).parameters)
    high = min(_find(config, "vocab_size", VOCABULARY), VOCABULARY)
    ids, classes = torch.randint(3, high - 1, (rows, LENGTH)), torch.randint(0, LABELS, (rows,))
    side, channels = _find(config, "image_size", SIDE), _find(config, "num_channels", 3)
    side, frames = side if isinstance(side, int) else side[0], _find(config, "num_frames", 4)
    mels = _find(config, "num_mel_bins", _find(config, "feature_size", 80))
    steps = 2 * _find(config, "max_source_positions", 64)
    decoder = {"decoder_input_ids": ids[:, :32]} if "decoder_input_ids" in takes else {}
    text = {"input_ids": ids, **({"decoder_input_ids": ids} if decoder else {})}
    for size in dict.fromkeys((side, 128, 224)):
        pixels = torch.randn(rows if size < 200 else rows // 4, channels, size, size)
        video = torch.randn(rows // 4, frames, channels, size, size)
        if "pixel_values" in takes:
            few = {"input_ids": ids[: len(pixels)]} if "input_ids" in takes else {}
            if "input_ids" in takes:
                yield {"pixel_values": pixels, **few, **{k: v[: len(pixels)] for k, v in decoder.items()}}
            else:
                if "labels" in takes:
                    yield {"pixel_values": pixels, "labels": classes[: len(pixels)]}
                yield {"pixel_values": pixels, **decoder}
                yield {"pixel_values": pixels}
                yield {"pixel_values": video}
        if "pixel_values_videos" in takes and "input_ids" not in takes:
            yield {"pixel_values_videos": video}
        if "input_ids" in takes:
            break
    if "input_ids" in takes:
        if "labels" in takes:
            yield {**text, "labels": ids}
            yield {**text, "labels": classes}
        yield text
        if "bbox" in takes:
            yield {**text, "bbox": torch.randint(0, 100, (rows, LENGTH, 4)).sort(-1).values}
    if "input_features" in takes:
        for shape in ((rows, mels, steps), (rows, steps, mels), (rows, LENGTH, 160), (rows, LENGTH, 80)):
            yield {"input_features": torch.randn(shape), **decoder}
        if "input_ids" in takes:
            yield {"input_features": torch.randn(rows, mels, steps), "input_ids": ids}
            yield {"input_features": torch.randn(rows, 1, 1001, 64), "input_ids": ids}
    if "input_values" in takes:
        yield {"input_values": torch.randn(rows // 2, 8000), **decoder}
        yield {"input_values": torch.randn(rows // 2, 1, 8000)}
        yield {"input_values": torch.randn(rows // 2, _find(config, "max_length", 128), mels)}
        if "input_ids" in takes:
            yield {"input_values": torch.randn(rows // 2, 8000), "input_ids": ids[: rows // 2]}
    if "past_values" in takes:
        length, channels = _find(config, "context_length", LENGTH), _find(config, "num_input_channels", 1)
        yield {"past_values": torch.randn(8 * rows, length, channels)}
    if "inputs_embeds" in takes:
        yield {"inputs_embeds": torch.randn(rows, LENGTH, _find(config, "hidden_size", WIDTH))}


def transformers_models() -> list[str]:
    """Model types that have a model; those that only join two others are left out."""
    from transformers.models.auto.modeling_auto import CONFIG_MAPPING_NAMES, MODEL_MAPPING_NAMES

    pairs = ("encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder", "vision-text-dual-encoder",
             "timm_wrapper", "timm_backbone")  # fmt: skip
    return sorted(name for name in MODEL_MAPPING_NAMES if name in CONFIG_MAPPING_NAMES and name not in pairs)


def of_transformers(name: str, rows: int, works: Callable[[nn.Module, Batch], None]) -> tuple[nn.Module, Batch]:
    """A small model of that type and a batch of about so many rows.

    works: raises where a step with them is not possible.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    problem: Exception | None = None
    for config in configuration(name):
        for head in HEADS:
            names = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES")
            found = names.get(name)
            if found is None:
                continue
            kind = getattr(transformers, found if isinstance(found, str) else found[0])
            try:
                if _parameters(kind, config) > MOST / 4:
                    raise ValueError(f"{_parameters(kind, config) / 1e6:.0f} M parameters")
                torch.manual_seed(0)
                model = _prepared(kind(config))
            except Exception as error:  # noqa: BLE001
                problem = problem or error
                continue
            for batch in batches(config, model, rows):
                try:
                    works(model, batch)
                except Exception as error:  # noqa: BLE001
                    problem = problem or error
                    continue
                return model, batch
    raise problem or ValueError(f"{name}: no batch that it takes.")


# The smallest of each module of timm, as far as it has fewer than 140 M parameters, and more of the large families.
TIMM = """
    beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny
    convmixer_1024_20_ks9_p14 convnext_atto convnextv2_atto cpubone_nano crossvit_tiny_240 cs3darknet_s csatv2
    cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46_c dpn48b eca_botnext26ts_256
    ecaresnet26t edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_lite0
    efficientvim_m1 efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0
    fastvit_t12 fbnetc_100 flexivit_small focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m_enc gernet_s ghostnet_050
    gmlp_s16_224 halonet26t hardcorenas_b hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_s inception_next_atto
    inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnetv2_small legacy_seresnet18 legacy_xception
    levit_128s levit_384_s8 lowformer_b0 mambaout_femto maxvit_pico_rw_256 mixer_s16_224 mnasnet_small
    mobilenetv2_100 mobilenetv3_large_100 mobilenetv3_small_050 mobilenetv5_base mobileone_s1 mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_siglip nasnetalarge nest_tiny nextvit_small nf_regnet_b0
    nf_resnet26 pit_xs_224 pnasnet5large poolformer_s12 poolformerv2_s12 pvt_v2_b0 qwen3_vit_88m rdnet_tiny
    regnetx_002 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resmlp_12_224 resnest14d resnet10t resnet18
    resnetv2_18 resnext26ts rexnet_100 sam2_hiera_tiny samvit_base_patch16_224 selecsls42 semnasnet_075
    sequencer2d_s seresnext26t_32x4d shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_cr_tiny_224 swinv2_tiny_window16_256 tf_efficientnetv2_b0 tiny_vit_5m_224 tinynet_a
    tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny vit_relpos_small_patch16_224
    vit_small_patch16_dinov3 vit_small_r26_s32_224 vit_srelpos_small_patch16_224 vit_tiny_patch16_224
    vit_wee_patch16_reg1_gap_256 vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
""".split()


def timm_models() -> list[str]:
    return TIMM


def _parameters(kind: type, config: Any) -> int:
    """How many a model of that kind would have; 0 where that cannot be told without making it."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in kind(config).parameters())
    except Exception:  # noqa: BLE001
        return 0


def of_timm(name: str, rows: int, works: Callable[[nn.Module, Batch], None]) -> tuple[nn.Module, Batch]:
    import timm

    problem: Exception | None = None
    for side, times, options in (
        (64, 2, {"img_size": 64, "depth": 4}), (64, 2, {"img_size": 64}), (64, 2, {}),
        (84, 1, {"img_size": 84, "depth": 4}), (128, 1, {}), (None, 0.25, {}),
    ):  # fmt: skip
        try:
            torch.manual_seed(0)
            model = _prepared(timm.create_model(name, num_classes=10, **options))
            side = model.default_cfg["input_size"][-1] if side is None else side
            batch = {"x": torch.randn(int(rows * times), model.default_cfg["input_size"][0], side, side)}
            works(model, batch)
        except Exception as error:  # noqa: BLE001
            problem = problem or error
            continue
        return model, batch
    raise problem or ValueError(name)


def _prepared(model: nn.Module) -> nn.Module:
    """In training mode, nothing dropped, and no part without a gradient because its scale or weight starts at zero."""
    if sum(p.numel() for p in model.parameters()) > MOST:
        raise ValueError(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    for module in model.modules():
        for key, value in vars(module).items():
            probability = "drop" in key or key == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if isinstance(value, float) and probability:
                with contextlib.suppress(AttributeError):
                    setattr(module, key, 0.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad or not p.is_floating_point():
                continue
            if p.dim() > 1 and p.numel() and p.abs().max() < 0.005:  # as of heads that start near zero
                p.normal_(0, 0.02)
            elif p.dim() == 1 and not name.endswith("bias") and p.numel() > 1 and p.abs().max() < 1e-3:
                p.fill_(0.5)  # scale of a layer, or of a norm at the end of a branch
    return model.train()


def sharpen(model: nn.Module, factor: float = 8.0) -> list[str]:
    """Multiplies what makes the queries of attention; returns the names of the parameters."""
    found = []
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, p in model.named_parameters():
            path, _, leaf = name.rpartition(".")
            last = path.rpartition(".")[2]
            parent = modules[path.rpartition(".")[0]]
            if leaf == "in_proj_weight":
                p[: p.shape[0] // 3].mul_(factor)
            elif leaf != "weight" or p.dim() not in (1, 2, 4):
                continue
            elif last in ("q_norm", "query_norm", "q_layernorm") and p.dim() == 1:
                p.mul_(factor)
            elif last in ("q_proj", "query", "q_lin", "to_q", "query_proj", "q", "q_b_proj", "wq", "q_linear", "Wq"):
                if isinstance(getattr(parent, "q_norm", None), nn.Module):
                    continue  # which would take it out again
                p.mul_(factor)
            elif last in ("qkv", "Wqkv", "qkv_proj", "c_attn", "in_proj_qkv"):
                side = 1 if type(parent._modules[last]).__name__ == "Conv1D" else 0
                if p.shape[side] != 3 * p.shape[1 - side]:
                    continue
                p.narrow(side, 0, p.shape[side] // 3).mul_(factor)
            elif last == "query_key_value" and p.dim() == 2 and p.shape[0] == 3 * p.shape[1]:
                heads = getattr(parent, "num_heads", 0) or getattr(parent, "num_attention_heads", 0)
                if not heads:
                    continue
                p.view(heads, 3, -1, p.shape[1])[:, 0].mul_(factor)
            else:
                continue
            found.append(name)
    return found


def tensors_of(batch: Batch) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]
