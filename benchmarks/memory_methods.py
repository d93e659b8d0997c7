"""Models, batches and ways to hold less between forward and backward, for memory.py and others.

No model has dropout, so that attention runs fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.workloads import load_image_model, load_text_model

Batch = dict[str, torch.Tensor]


def tokens(vocabulary: int, rows: int, length: int) -> Batch:
    ids = torch.randint(0, vocabulary, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def minilm(length: int) -> tuple[torch.nn.Module, Callable[[int], Batch]]:
    model, _ = load_text_model("minilm", 2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, lambda rows: {**tokens(30000, rows, length), "labels": torch.randint(0, 2, (rows,))}


def gpt2(length: int = 256) -> tuple[torch.nn.Module, Callable[[int], Batch]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    def batch(rows: int) -> Batch:
        made = tokens(50257, rows, length)
        return {**made, "labels": made["input_ids"]}

    return model, batch


def image(name: str, size: int, **options: Any) -> tuple[torch.nn.Module, Callable[[int], Batch]]:
    model, _ = load_image_model(name, 10, size, pretrained=False, **options)

    def batch(rows: int) -> Batch:
        return {"pixel_values": torch.randn(rows, 3, size, size), "labels": torch.randint(0, 10, (rows,))}

    return model, batch


# name: (model and maker of batches, rows of a batch)
MODELS: dict[str, tuple[Callable[[], tuple[torch.nn.Module, Callable[[int], Batch]]], int]] = {
    "minilm 32x128": (lambda: minilm(128), 32),
    "minilm 8x512": (lambda: minilm(512), 8),
    "mobilenetv2_100 64x96px": (lambda: image("mobilenetv2_100", 96), 64),
    "efficientnet_lite0 64x96px": (lambda: image("tf_efficientnet_lite0", 96), 64),
    "resnet18 64x96px": (lambda: image("resnet18", 96), 64),
    "vit_tiny 16x224px": (lambda: image("vit_tiny_patch16_224", 224), 16),
    "gpt2 4x256": (gpt2, 4),
}


Method = Callable[[torch.nn.Module], AbstractContextManager]


def saved(spec: str) -> Method:
    return lambda model: compress_model(model, ActCompressConfig(saved=spec))


@contextmanager
def checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """As the Trainer's gradient_checkpointing=True."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextmanager
def checkpointing_saved(model: torch.nn.Module) -> Iterator[None]:
    with checkpointing(model), saved("block:bits=4")(model):
        yield


def none(model: torch.nn.Module) -> AbstractContextManager:
    return nullcontext()


def compiled(inner: Method = none, budget: float = 1.0) -> Method:
    """The method in a compiled model; budget: torch's `activation_memory_budget` (1: nothing is recomputed)."""

    @contextmanager
    def method(model: torch.nn.Module) -> Iterator[Any]:
        with torch._functorch.config.patch(activation_memory_budget=budget), inner(model) as handle:
            model.compile()
            yield handle

    return method


METHODS: dict[str, Method] = {
    "none": none,
    "saved 8": saved("block:bits=8"),
    "saved 4": saved("block:bits=4"),
    "saved 2": saved("block:bits=2"),
    "checkpointing": checkpointing,
    "save_on_cpu": lambda model: torch.autograd.graph.save_on_cpu(),
    "checkpointing + saved 4": checkpointing_saved,
    "saved auto 0.07": saved("auto:budget=0.07"),
    "compiled": compiled(),
    "compiled, saved 8": compiled(saved("block:bits=8")),
    "compiled, saved 4": compiled(saved("block:bits=4")),
    "compiled, saved 2": compiled(saved("block:bits=2")),
    "compiled, budget 0.5": compiled(budget=0.5),
    "compiled, budget 0.2": compiled(budget=0.2),
    "compiled, budget 0.2, saved 8": compiled(saved("block:bits=8"), 0.2),
    "compiled, budget 0.2, saved 4": compiled(saved("block:bits=4"), 0.2),
}
