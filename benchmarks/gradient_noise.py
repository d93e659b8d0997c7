"""How much a codec at one cut changes the gradient of a CNN, beside changes that training sees anyway.

    python benchmarks/gradient_noise.py

One batch of 64 CIFAR-10 images (embedded digits where ../shared/data is absent), EfficientNet-Lite0 at 96 px, before
the first step.  Writes benchmarks/results/gradient_noise.json: |g' - g| / |g| and the cosine over all parameters.
"""

from __future__ import annotations

import harness
import torch

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.workloads import collate_images, load_image_model, load_images, prepare_images

CODECS = ("block:bits=8", "block:bits=4", "rotated:bits=2")


def main() -> None:
    harness.arguments(__doc__).parse_args()
    torch.manual_seed(0)
    data = load_images(harness.data_or_embedded("cifar10"), max_train=64, max_eval=8)
    model, preprocessing = load_image_model("efficientnet-lite0", data.num_labels, 96)
    model = model.to(memory_format=torch.channels_last).train()
    train, _ = prepare_images(data, preprocessing)

    def batch() -> dict[str, torch.Tensor]:
        return collate_images([train[i] for i in range(64)])

    def gradient(inputs: dict[str, torch.Tensor], config: ActCompressConfig | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model.zero_grad()
        with compress_model(model, config or ActCompressConfig("identity")):
            model(**inputs).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    inputs = batch()
    plain = gradient(inputs)
    pixels = inputs["pixel_values"]
    rows = {
        "the same images, other crops and flips": gradient(batch()),
        "pixels + 0.1 % noise": gradient(inputs | {"pixel_values": pixels + 1e-3 * torch.randn_like(pixels)}),
        "backward at both cuts, block:bits=8,round=stochastic": gradient(
            inputs, ActCompressConfig("identity", "block:bits=8,round=stochastic")
        ),
    }
    for codec in CODECS:
        rows[f"forward after the stem, {codec}"] = gradient(inputs, ActCompressConfig(codec, "identity", 1, 0))
        rows[f"forward before the head, {codec}"] = gradient(inputs, ActCompressConfig(codec, "identity", 0, 1))
    result = {
        name: {
            "change": float((g - plain).norm() / plain.norm()),
            "cosine": float(g @ plain / g.norm() / plain.norm()),
        }
        for name, g in rows.items()
    }
    harness.save("gradient_noise", rows=result)
    for name, row in result.items():
        print(f"{name:75s} {row['change']:.3f} {row['cosine']:.3f}")


if __name__ == "__main__":
    main()
