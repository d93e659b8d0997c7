"""Layers, identity and block:4 in small models of every architecture of transformers and timm.

    python benchmarks/boundary_architectures.py --family hf     # model types of transformers, tiny configs
    python benchmarks/boundary_architectures.py --family timm   # one model of each of timm's families, and more
    python benchmarks/boundary_architectures.py --table         # the table of docs/boundaries.md

Each model runs in a process of its own with a time limit; what has a result is not run again (--again runs it).
Weights are random, everything is made offline.  For each model:

    layers     found without example inputs; "traced" if a made-up input ran
    identity   loss, gradients and the random states after a step are those of the plain model, bit by bit
    block:4    two boundaries fire in both directions, and gradients are finite
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import harness
import numpy
import torch
from torch import nn

RESULTS = Path(__file__).parent / "results" / "boundary_architectures.json"
LARGEST = 30e6  # parameters
ROWS = 2

# -- tiny configs ----------------------------------------------------------------------------------------------------
SMALL = dict(
    hidden_size=64, d_model=64, n_embd=64, dim=64, embed_dim=64, embedding_size=64, num_hidden_layers=3, n_layer=3,
    num_layers=3, n_layers=3, encoder_layers=3, decoder_layers=3, num_encoder_layers=3, num_decoder_layers=3, depth=3,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4, encoder_attention_heads=4, decoder_attention_heads=4,
    num_key_value_heads=2, intermediate_size=128, ffn_dim=128, d_ff=128, hidden_dim=128, encoder_ffn_dim=128,
    decoder_ffn_dim=128, d_kv=16, head_dim=16, vocab_size=99, max_position_embeddings=128, image_size=32, patch_size=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, n_inner=128, rotary_dim=16,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, state_size=8,
    out_hidden_size=64, projection_dim=64, num_classes=5, encoder_num_hidden_layers=3, decoder_num_hidden_layers=3,
    encoder_ffn=128, mlp_dim=128, expert_ffn_hidden_size=128, hidden_size_per_layer_input=16, text_embed_dim=64,
    prediction_length=4,
)  # fmt: skip
FEWER = {k: v for k, v in SMALL.items() if "layers" in k or k in ("depth", "n_layer", "vocab_size", "image_size")}
WIDTHS = ("hidden_sizes", "embed_dims", "dims", "neck_hidden_sizes", "encoder_hidden_sizes", "widths", "block_sizes")


def tiny(config_class: type, overrides: dict[str, Any], depths: bool = True) -> Any:
    """A config of that class with the small values for whatever it knows, also in the configs inside it."""
    base = config_class()
    return config_class(**_small_values(base, overrides, depths))


def _small_values(base: Any, overrides: dict[str, Any], depths: bool) -> dict[str, Any]:
    values = {}
    for name, value in vars(base).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            try:
                values[name] = type(value)(**_small_values(value, overrides, depths))
            except Exception:  # noqa: BLE001
                values[name] = value
        elif name in overrides and isinstance(value, (int, type(None))) and not isinstance(value, bool):
            if value is not None or name in ("pad_token_id", "prediction_length"):
                values[name] = overrides[name]
        elif "layerdrop" in name and isinstance(value, float):
            values[name] = 0.0  # a cut behind a layer that is left out at random does not fire
        elif depths and name == "depths" and isinstance(value, (list, tuple)):
            values[name] = [min(d, 2) for d in value]
    for name in overrides:  # attributes that map to others (n_embd for hidden_size)
        if name in getattr(base, "attribute_map", {}) and base.attribute_map[name] not in values:
            values[base.attribute_map[name]] = overrides[name]
    return values


def hf_classes(kind: str) -> list[str]:
    """Class names for a model type, those with a task first."""
    from transformers.models.auto import modeling_auto as auto

    order = (
        "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION",
        "MASKED_LM", "AUDIO_CLASSIFICATION", "CTC", "VIDEO_CLASSIFICATION", "TIME_SERIES_PREDICTION",
        "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "OBJECT_DETECTION", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM",
    )  # fmt: skip
    found = []
    for task in order:
        mapping = getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        if kind in mapping:
            found.append(mapping[kind])
    if kind in auto.MODEL_MAPPING_NAMES:
        found.append(auto.MODEL_MAPPING_NAMES[kind])
    return [name for each in found for name in ([each] if isinstance(each, str) else each)]


def hf_names() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return sorted(MODEL_MAPPING_NAMES)


def hf_models(kind: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Models of that type that are small enough."""
    import transformers
    from transformers import CONFIG_MAPPING

    why: Exception | str = "no class"
    for name in dict.fromkeys(hf_classes(kind)):
        model_class = getattr(transformers, name)
        no_head_dim = {k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads", "rotary_dim")}
        no_patch = {k: v for k, v in SMALL.items() if k not in ("image_size", "patch_size")}
        for overrides, depths in ((SMALL, True), (no_head_dim, True), (no_patch, False), (FEWER, True), ({}, True)):
            try:
                config = tiny(CONFIG_MAPPING[kind], overrides, depths)
                for known in (config, *[v for v in vars(config).values() if hasattr(v, "to_dict")]):
                    if "layer_types" in vars(known) and known.layer_types:
                        known.layer_types = known.layer_types[: known.num_hidden_layers]
                with torch.device("meta"):
                    size = sum(p.numel() for p in model_class(config).parameters())
                if size > LARGEST:
                    why = f"{size / 1e6:.0f}M parameters"
                    continue
                torch.manual_seed(0)
                yield model_class(config).train(), {"class": name}
            except Exception as error:  # noqa: BLE001 - configs refuse combinations of values
                why = error
    raise NoModel(f"{why}"[:120])


class NoModel(Exception):
    """The benchmark cannot build or feed it: says nothing about boundaries."""


# -- timm ------------------------------------------------------------------------------------------------------------
def timm_names() -> list[str]:
    """A model of each module of timm, the smallest by its name, and second ones of the first modules: 120 in all."""
    import timm

    chosen, rest = [], []
    for module in timm.list_modules():
        models = timm.list_models(module=module)
        small = sorted(models, key=lambda n: (not any(s in n for s in SMALLEST), len(n), n))
        chosen += small[:1]
        rest += small[1:2]
    small_first = {name: not any(s in name for s in SMALLEST[:9]) for name in [*chosen, *rest[: 120 - len(chosen)]]}
    return sorted(small_first, key=lambda name: (small_first[name], name))


SMALLEST = ("test_", "nano", "atto", "femto", "pico", "tiny", "_xxs", "_xs", "_s", "18", "11", "_small", "_050", "a0")


def timm_models(name: str) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    import timm

    for options in ({"img_size": 64}, {}):  # a small image, where the size is fixed
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False, num_classes=5, **options)
            yield model.train(), {"class": type(model).__name__}
        except Exception:  # noqa: BLE001 - not every model has the option, or allows such a size
            continue


# -- batches ---------------------------------------------------------------------------------------------------------
def filled(value: Any, generator: torch.Generator) -> Any:
    """The same tensor with noise in place of zeros."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value.dtype)
    return value


def batches(model: nn.Module) -> Iterator[Any]:
    from hf_actcompress.models.inputs import guesses

    generator = torch.Generator().manual_seed(0)
    for each in guesses(model, rows=ROWS):
        if isinstance(each, dict):
            yield {name: filled(value, generator) for name, value in each.items()}
        elif isinstance(each, torch.Tensor):
            yield filled(each, generator)
    yield from by_hand(model, generator)


def by_hand(model: nn.Module, generator: torch.Generator) -> Iterator[dict[str, Any]]:
    """Inputs that the package does not guess."""
    config = getattr(model, "config", None)
    ids = torch.randint(5, 90, (ROWS, 16), generator=generator)
    vision = getattr(config, "vision_config", config)
    size, channels = getattr(vision, "image_size", 32), getattr(vision, "num_channels", 3)
    size = size if isinstance(size, int) else 32
    if not isinstance(channels, int):
        channels = 3
    pixels = torch.randn(ROWS, channels, size, size, generator=generator)
    yield {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    yield {"input_ids": ids, "bbox": torch.zeros(ROWS, 16, 4, dtype=torch.long), "pixel_values": pixels}
    yield {"pixel_values": pixels, "task_inputs": ids}
    yield {"pixel_values": pixels, "prompt_pixel_values": pixels, "prompt_masks": pixels}
    yield {"input_ids": ids, "visual_feats": torch.randn(ROWS, 4, getattr(config, "visual_feat_dim", 8)),
           "visual_pos": torch.rand(ROWS, 4, 4)}  # fmt: skip
    yield {"source_pixel_values": pixels}
    yield {"inputs": torch.randn(ROWS, 16, getattr(config, "d_model", 64))}


# -- what is checked -------------------------------------------------------------------------------------------------
def step(model: nn.Module, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor | None], list[Any]]:
    """(loss, gradients, random states afterwards)"""
    from hf_actcompress.models.replay import loss_of

    output = model(**batch) if isinstance(batch, dict) else model(batch)
    loss = loss_of(output)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    states = [torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate()]
    return loss.detach(), gradients, states


def seeded(model: nn.Module, state: dict[str, torch.Tensor], act: Callable[[], Any]) -> Any:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
    return act()


def same(one: Any, other: Any) -> bool:
    return (torch.equal(one[0], other[0]) and one[2] == other[2]
            and all((a is None) == (b is None) and (a is None or torch.equal(a, b))
                    for a, b in zip(one[1], other[1], strict=True)))  # fmt: skip


def check(model: nn.Module, batch: Any, plain: Any, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    from hf_actcompress import ActCompressConfig, compress_model, find_layers

    row: dict[str, Any] = {"layers": 0}
    try:
        layers = find_layers(model)
        row |= {"layers": len(layers), "traced": layers[0].shape is not None,
                "cut_at": [layers[0].name, layers[-2].name] if len(layers) > 1 else []}  # fmt: skip
        with_identity = seeded(model, state, lambda: identity(model, batch, compress_model))
        unreached = seeded(model, state, lambda: without_gradient(model, batch, layers))
        row["identity"] = same(plain, with_identity)

        def lossy() -> None:
            with compress_model(model, ActCompressConfig(codec="block:bits=4")) as handle:
                *_, (_, gradients, _) = (step(model, batch) for _ in range(1 if row["traced"] else 2))
                silent = {f"{r['boundary']}/{r['direction']}" for r in handle.stats() if not r["calls"]}
                row["fired"], row["silent"] = bool(handle.boundaries) and silent <= unreached, sorted(silent)
                row["block4"] = all(g is None or bool(g.isfinite().all()) for g in gradients)

        seeded(model, state, lossy)
    except Exception as error:  # noqa: BLE001 - the row says what failed
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    return row


def without_gradient(model: nn.Module, batch: Any, layers: list) -> set[str]:
    """Layers whose output the plain model gives no gradient (what follows is not part of the loss, or is rounded)."""
    from hf_actcompress.models.layers import first_tensor, replace_first_tensor

    reached, handles = set(), []
    for layer in layers:
        def hook(module: nn.Module, args: Any, output: Any, name: str = layer.name) -> Any:
            tensor = first_tensor(output)
            if tensor is None or not tensor.requires_grad:
                return None
            # A tensor of its own: the layer may hand on its input, which others read, too.
            own = tensor.clone()
            own.register_hook(lambda gradient: reached.add(name))
            return replace_first_tensor(output, own)

        handles.append(model.get_submodule(layer.module).register_forward_hook(hook))
    step(model, batch)
    for handle in handles:
        handle.remove()
    return {f"{layer.name}/backward" for layer in layers if layer.name not in reached}


def identity(model: nn.Module, batch: Any, compress_model: Callable) -> Any:
    with compress_model(model, "identity"):
        return step(model, batch)


def measure(family: str, name: str) -> dict[str, Any]:
    why = "it does not run with any input that was tried"
    for model, row in (hf_models if family == "hf" else timm_models)(name):
        for batch in batches(model):
            state = {n: b.clone() for n, b in model.named_buffers()}
            try:
                plain = seeded(model, state, lambda: step(model, batch))  # noqa: B023
            except Exception as error:  # noqa: BLE001
                why = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            if all(g is None for g in plain[1]) or not bool(plain[0].isfinite()):
                why = "no finite loss with a gradient"
                continue
            if not same(plain, seeded(model, state, lambda: step(model, batch))):  # noqa: B023
                return row | {"skipped": "two plain steps differ"}
            row["parameters"] = sum(p.numel() for p in model.parameters())
            row["inputs"] = sorted(batch) if isinstance(batch, dict) else ["x"]
            return row | check(model, batch, plain, state)
    raise NoModel(why)


# -- processes -------------------------------------------------------------------------------------------------------
def in_a_process(family: str, name: str, limit: int) -> dict[str, Any]:
    """Forked, so that transformers is imported once."""
    began, (reader, writer) = time.perf_counter(), os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(limit)
        try:
            row = measure(family, name)
        except NoModel as error:
            row = {"skipped": str(error)}
        except BaseException as error:  # noqa: BLE001
            row = {"skipped": f"{type(error).__name__}: {str(error)[:120]}"}
        os.write(writer, json.dumps(row).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if not text:
        text = json.dumps({"skipped": f"ended by signal {status & 127}" + (" (time limit)" if status == 14 else "")})
    return json.loads(text) | {"seconds": round(time.perf_counter() - began, 1)}


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown: how many models of each family pass each check, and which do not."""
    columns = {
        "traced": lambda r: r.get("traced"), "cut": lambda r: r.get("layers", 0) > 1,
        "identity bit-equal": lambda r: r.get("identity"),
        "block:4 runs": lambda r: r.get("block4") and r.get("fired"),
    }  # fmt: skip
    lines = ["| family | models | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) + 1)]
    failed = []
    for family, rows in results.items():
        ran = {name: row for name, row in rows.items() if "skipped" not in row}
        counts = [sum(bool(check(row)) for row in ran.values()) for check in columns.values()]
        title = {"hf": "transformers", "timm": "timm"}[family]
        lines.append(f"| {title} | {len(ran)} | " + " | ".join(map(str, counts)) + " |")
        failed += [f"{title} {name}" for name, row in ran.items() if not good(row)]
    return "\n".join([*lines, "", f"Failed: {', '.join(failed) or 'none'}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("hf", "timm"))
    parser.add_argument("--table", action="store_true", help="print the table; so does leaving out --family")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--part", default="0/1", help="K/N: every N-th model, beginning with the K-th")
    parser.add_argument("--limit", type=int, default=60, help="seconds a model")
    parser.add_argument("--again", action="store_true", help="run what has a result, too")
    parser.add_argument("--failed", action="store_true", help="run again what failed")
    parser.add_argument("--older", action="store_true", help="run again what another commit measured")
    parser.add_argument("--commit", help="what rows are labelled with; default: the checkout's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {"hf": {}, "timm": {}}
    if options.table or options.family is None:
        print(table(results))
        return
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = options.only or (hf_names() if options.family == "hf" else timm_names())
    part, parts = map(int, options.part.split("/"))
    commit = options.commit or harness.commit()  # of the code that a row stands for
    import hf_actcompress.attach  # noqa: F401 - once, before the processes are made
    measure("hf", "bert") if options.family == "hf" else measure("timm", "resnet18")

    for name in names[part::parts]:
        row = results[options.family].get(name)
        older = options.older and row is not None and "skipped" not in row and row.get("commit") != commit
        if row is None or older or options.again or options.only or (options.failed and not good(row)):
            row = in_a_process(options.family, name, options.limit) | {"commit": commit}
            results[options.family][name] = row
            print(name, "" if good(row) else "<<<<" if "skipped" not in row else "", json.dumps(row), flush=True)
            options.results.parent.mkdir(exist_ok=True)
            whole = options.results.with_suffix(".part")
            whole.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
            whole.replace(options.results)


def good(row: dict[str, Any]) -> bool:
    return row.get("layers", 0) > 1 and bool(row.get("identity") and row.get("block4") and row.get("fired"))


if __name__ == "__main__":
    sys.exit(main())
