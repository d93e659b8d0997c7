"""What is held between forward and backward, and how far the gradient is off, for models that people train.

    python benchmarks/saved_held.py [--models minilm beit ...]

One batch each, no dropout (so attention runs fused), fp32 unless the name says bf16.  Held: bytes of what autograd
would hold over bytes that are held, both as the site counts them.  Error: |g' - g| / |g| over the gradients of all
parameters.  "sharp" multiplies the query weights by 8: random weights have flat attention, which hides what goes wrong
with it.  Writes benchmarks/results/saved_held.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.workloads import load_text, load_text_model, tokenize_splits

SPECS = ("block:bits=8", "block:bits=4", "block:bits=2")


def minilm(random: bool, rows: int, length: int) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    found = load_text(harness.data_or_embedded("glue/sst2"), max_train=rows, max_eval=8)
    model, tokenizer = load_text_model("minilm", found.num_labels)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout_prob = 0.0
    if random:
        torch.manual_seed(0)
        batch = {"input_ids": torch.randint(5, 900, (rows, length)), "labels": torch.randint(0, 2, (rows,))}
    else:
        split = tokenize_splits(found, tokenizer, length, pad=True)[0].with_format("torch")[:rows]
        batch = {key: split[key] for key in ("input_ids", "attention_mask", "labels")}
    return model, lambda: model(**batch).loss


def beit() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    from transformers import BeitConfig, BeitForImageClassification

    model = BeitForImageClassification(
        BeitConfig(
            hidden_size=192, num_attention_heads=3, intermediate_size=384, num_hidden_layers=2, num_labels=10,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
        )
    )  # fmt: skip
    pixels, labels = torch.randn(4, 3, 224, 224), torch.tensor([1, 2, 3, 4])
    return model, lambda: model(pixel_values=pixels, labels=labels).loss


def llama(sharp: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=512,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config).to(dtype), torch.randint(5, 90, (4, 256))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(sharp)
    return model, lambda: model(input_ids=ids, labels=ids).loss


def qwen3(sharp: float) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=99, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=512, head_dim=32,
    )  # fmt: skip
    model, ids = Qwen3ForCausalLM(config), torch.randint(5, 90, (4, 256))
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.mul_(sharp)
    return model, lambda: model(input_ids=ids, labels=ids).loss


def gpt2() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=99, n_embd=256, n_layer=4, n_head=8, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model, ids = GPT2LMHeadModel(config), torch.randint(5, 90, (4, 256))
    return model, lambda: model(input_ids=ids, labels=ids).loss


def timm_model(name: str, size: int) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    import timm

    model = timm.create_model(name, num_classes=10)
    x, labels = torch.randn(16, 3, size, size), torch.randint(0, 10, (16,))
    return model, lambda: nn.functional.cross_entropy(model(x), labels)


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[], torch.Tensor]]]] = {
    "MiniLM, 32x64 of SST-2": lambda: minilm(False, 32, 64),
    "MiniLM, 16x64 random tokens": lambda: minilm(True, 16, 64),
    "MiniLM, 32x128 random tokens": lambda: minilm(True, 32, 128),
    "BEiT 192": beit,
    "Llama 4x256": llama,
    "Llama 4x256, sharp": lambda: llama(8.0),
    "Llama 4x256, bf16": lambda: llama(dtype=torch.bfloat16),
    "Qwen3 4x256, sharp": lambda: qwen3(8.0),
    "GPT-2 4x256": gpt2,
    "ViT-tiny, 16x224": lambda: timm_model("vit_tiny_patch16_224", 224),
    "MobileNetV2, 16x96": lambda: timm_model("mobilenetv2_100", 96),
    "ResNet-18, 16x96": lambda: timm_model("resnet18", 96),
    "EfficientNet-Lite0, 16x96": lambda: timm_model("efficientnet_lite0", 96),
}


def gradient(model: nn.Module, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def measure(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, loss = MODELS[name]()
    model.train()
    exact, result = gradient(model, loss), {}
    for spec in SPECS:
        with compress_model(model, ActCompressConfig(saved=spec)) as handle:
            error = float((gradient(model, loss) - exact).norm() / exact.norm())
            record, report = handle.stats()[-1], handle.report()
        result[spec] = {
            "error": error,
            "raw_mb": record["raw_bytes"] / 1e6,
            "held_mb": record["payload_bytes"] / 1e6,
            "exactly": {r["operation"]: r["held_bytes"] for r in report if r["kept"] == "exactly"},
        }
    return result


def main() -> None:
    parser = harness.arguments(__doc__, results="saved_held")
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="Some of them, by the start of their names.")
    args = parser.parse_args()
    record: dict[str, Any] = harness.about("saved_held.py") | {"models": {}}
    for name in MODELS:
        if not any(name.lower().startswith(wanted.lower()) for wanted in args.models):
            continue
        found = record["models"][name] = measure(name)
        cells = [f"{r['error']:.3f} 1/{r['raw_mb'] / r['held_mb']:.1f} {r['held_mb']:.1f} MB" for r in found.values()]
        print(f"{name}: " + "; ".join(cells), flush=True)
        harness.write(args.results, record)


if __name__ == "__main__":
    main()
