"""The error of each codec on real activations: hidden states of MiniLM, feature maps of EfficientNet-Lite0.

    python benchmarks/codec_error.py

Writes benchmarks/results/codec_error.json.  Inputs: one batch of CoLA and of CIFAR-10 from --data (default
../shared/data), or of the embedded data sets where that folder is absent.  Error: squared error over the variance
within features, so that a feature's mean earns nothing; and its median over features, which tells what an ordinary
feature suffers when a few large ones set the scale.
"""

from __future__ import annotations

from pathlib import Path

import harness
import torch
from torch import Tensor

from hf_actcompress import find_layers, parse_codec
from hf_actcompress.models.tracing import first_tensor
from hf_actcompress.ops.gaussian import gauss_levels
from hf_actcompress.ops.hadamard import butterflies
from hf_actcompress.workloads import load_image_model, load_images, load_text, load_text_model, prepare_images

SPECS = [
    "uniform:bits=8", "uniform:bits=4", "sort:bits=8", "sort:bits=4", "kmeans:bits=4", "float8", "topk:ratio=0.2",
    "block:bits=8", "block:bits=4,equalize=none", "block:bits=4", "block:bits=2,equalize=none", "block:bits=2",
    "rotated:bits=4", "rotated:bits=3", "rotated:bits=2", "trellis:bits=3", "trellis:bits=2",
]  # fmt: skip


def capture(model: torch.nn.Module, inputs: dict[str, Tensor], places: dict[str, int]) -> dict[str, Tensor]:
    """Outputs of the layers with those indices, in a training-mode forward without dropout."""
    layers, kept = find_layers(model), {}
    hooks = [
        model.get_submodule(layers[index].module).register_forward_hook(
            lambda _, __, output, name=name: kept.__setitem__(name, first_tensor(output).detach())
        )
        for name, index in places.items()
    ]
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return kept


def activations(data: Path) -> dict[str, Tensor]:
    text = load_text(harness.data_or_embedded("glue/cola", data), max_train=32, max_eval=8)
    model, tokenizer = load_text_model("minilm", text.num_labels)
    batch = tokenizer(list(text.texts()), padding=True, truncation=True, return_tensors="pt")
    result = capture(model, dict(batch), {"MiniLM block 0": 0, "MiniLM block 4": 4})
    pictures = load_images(harness.data_or_embedded("cifar10", data), max_train=64, max_eval=8)
    model, preprocessing = load_image_model("efficientnet-lite0", pictures.num_labels, 96)
    train, _ = prepare_images(pictures, preprocessing)
    pixels = torch.stack([train[i]["pixel_values"] for i in range(64)])
    last = len(find_layers(model)) - 2
    return result | capture(
        model, {"pixel_values": pixels}, {"EfficientNet stem": 0, "EfficientNet last block": last}
    )


def error(x: Tensor, y: Tensor) -> dict[str, float]:
    fold = (lambda t: t.movedim(1, -1).flatten(0, -2)) if x.dim() == 4 else (lambda t: t.flatten(0, -2))
    x, y = fold(x).double(), fold(y).double()
    variance, squared = x.var(0, correction=0), (y - x).pow(2).mean(0)
    used = variance > 1e-12
    return {
        "error": float(squared.sum() / variance.sum()),
        "median_feature_error": float((squared[used] / variance[used]).median()),
    }


def without_signs(x: Tensor, bits: int) -> Tensor:
    """Groups of 128, mean out, the plain Walsh-Hadamard transform, Gaussian levels: what the random signs replace."""
    pad = -x.numel() % 128
    rows = torch.cat([x.reshape(-1), x.reshape(-1)[-1:].expand(pad)]).view(-1, 128)
    center = rows.mean(1, keepdim=True)
    plain = butterflies(torch.eye(128)) / 128**0.5
    turned = (rows - center) @ plain
    spread = turned.pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-20)
    levels = torch.tensor(gauss_levels(bits))
    codes = torch.bucketize(turned / spread, (levels[1:] + levels[:-1]) / 2)
    return ((levels[codes] * spread) @ plain.T + center).view(-1)[: x.numel()].view(x.shape)


def main() -> None:
    tensors = activations(harness.arguments(__doc__, data=True).parse_args().data)
    rows = []
    for spec in SPECS:
        codec = parse_codec(spec)
        for name, x in tensors.items():
            ratio = codec.encode(x, codec.init_state()).ratio
            y = codec.roundtrip(x, codec.init_state())
            rows.append({"codec": spec, "tensor": name, "ratio": ratio, **error(x, y)})
    for bits in (2, 3, 4):
        for name, x in tensors.items():
            spec = f"bits {bits}, rotated without signs, Gaussian levels"
            rows.append({"codec": spec, "tensor": name, "ratio": None, **error(x, without_signs(x, bits))})
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    harness.save("codec_error", shapes=shapes, rows=rows)
    for row in rows:
        print(f"{row['codec']:60s} {row['tensor']:24s} {row['error']:.4f} {row['median_feature_error']:.4f}")


if __name__ == "__main__":
    main()
