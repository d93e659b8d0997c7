"""How far gradients are from the exact ones when saved tensors are compressed, layer by layer.

    python benchmarks/saved_gradient_error.py

One batch of SST-2 (32 rows) through MiniLM, one of CIFAR-10 (32 images at 96 px) through EfficientNet-Lite0, the
embedded data where ../shared/data is absent; before the first step, dropout with the same seed on both sides.  For
each layer the relative error |g' - g| / |g| of the gradient of its parameters.  Writes
benchmarks/results/saved_gradient_error.json.
"""

from __future__ import annotations

from typing import Any

import harness
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_actcompress import ActCompressConfig, compress_model, find_layers
from hf_actcompress.workloads import (
    collate_images,
    load_image_model,
    load_images,
    load_text,
    load_text_model,
    prepare_images,
    tokenize_splits,
)  # fmt: skip

SPECS = ("block:bits=8", "block:bits=4", "block:bits=2", "auto:budget=0.1", "auto:budget=0.07")
ROWS = 32


def text() -> tuple[nn.Module, dict[str, Tensor]]:
    found = load_text(harness.data_or_embedded("glue/sst2"), max_train=ROWS, max_eval=8)
    model, tokenizer = load_text_model("minilm", found.num_labels)
    rows = tokenize_splits(found, tokenizer, 128, pad=True)[0].with_format("torch")[:ROWS]
    return model, {key: rows[key] for key in ("input_ids", "attention_mask", "labels")}


def images() -> tuple[nn.Module, dict[str, Tensor]]:
    found = load_images(harness.data_or_embedded("cifar10"), max_train=ROWS, max_eval=8)
    model, preprocessing = load_image_model("efficientnet-lite0", found.num_labels, 96)
    train, _ = prepare_images(found, preprocessing)
    return model, collate_images([train[i] for i in range(ROWS)])


def gradients(model: nn.Module, batch: dict[str, Tensor], layers: dict[str, str]) -> dict[str, Tensor]:
    """By layer; what belongs to none is "embeddings and head"."""
    torch.manual_seed(0)
    model.zero_grad()
    model(**batch).loss.backward()
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer = next((label for prefix, label in layers.items() if name.startswith(f"{prefix}.")), "stem and head")
        found.setdefault(layer, []).append(parameter.grad.flatten())
    return {layer: torch.cat(parts).double() for layer, parts in found.items()}


def measure(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    model.train()
    layers = {layer.module: layer.name for layer in find_layers(model, batch)}
    exact, rows = gradients(model, batch, layers), {}
    whole = torch.cat(list(exact.values()))
    for spec in SPECS:
        with compress_model(model, ActCompressConfig(saved=spec)) as handle:
            found = gradients(model, batch, layers)
            record = handle.meters["saved"]
        row = rows[spec] = {layer: float((found[layer] - g).norm() / g.norm()) for layer, g in exact.items()}
        row["all"] = float((torch.cat(list(found.values())) - whole).norm() / whole.norm())
        row["share held"] = record.payload_bytes / record.raw_bytes
    return rows


def main() -> None:
    harness.arguments(__doc__).parse_args()
    torch.manual_seed(0)
    models: dict[str, Any] = {}
    for name, make in tqdm({"MiniLM, SST-2": text, "EfficientNet-Lite0, CIFAR-10": images}.items(), desc="models"):
        models[name] = measure(*make())
        harness.save("saved_gradient_error", models=models)
        for spec, row in models[name].items():
            print(f"{name:30s} {spec:20s} " + "  ".join(f"{layer} {value:.3f}" for layer, value in row.items()))


if __name__ == "__main__":
    main()
