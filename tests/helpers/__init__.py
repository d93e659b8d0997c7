"""Tiny models, their batches, and a training loop whose every number can be compared bit for bit."""

from __future__ import annotations

from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn

from hf_actcompress.boundary.hook import Boundary

VOCABULARY = 99
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 40, "num_labels": 3,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_decoder_layers": 4,
    "num_heads": 2, "decoder_start_token_id": 0,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _classifier(config) -> nn.Module:
    return transformers.AutoModelForSequenceClassification.from_config(config)


def _vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


TEXT_MODELS = {
    "bert": lambda: _classifier(transformers.BertConfig(**TEXT)),
    "roberta": lambda: _classifier(transformers.RobertaConfig(**TEXT)),
    "distilbert": lambda: _classifier(
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=16, n_layers=4, n_heads=2, hidden_dim=32, num_labels=3
        )
    ),
    "deberta-v2": lambda: _classifier(
        transformers.DebertaV2Config(**TEXT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"])
    ),
    "modernbert": lambda: _classifier(
        transformers.ModernBertConfig(
            **TEXT, **SPECIAL, cls_token_id=1, sep_token_id=2, mlp_dropout=0.1, attention_dropout=0.1
        )
    ),
    "gpt2": lambda: _classifier(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=40, num_labels=3, **SPECIAL
        )
    ),
    "llama": lambda: _classifier(transformers.LlamaConfig(**TEXT, **SPECIAL, attention_dropout=0.1)),
}


def text_batch(rows: int = 4, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}


def image_batch(rows: int = 4, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, size, size, generator=generator), torch.arange(rows) % 3


def build(name: str) -> nn.Module:
    """A tiny random model: transformers by the keys above, "vit", "t5", or any timm name; always the same weights."""
    torch.manual_seed(0)
    if name in TEXT_MODELS:
        return TEXT_MODELS[name]()
    if name == "vit":
        return _vit()
    if name == "t5":
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    import timm

    size = {"img_size": 32} if name.startswith("vit") else {}
    return timm.create_model(name, pretrained=False, num_classes=3, drop_rate=0.1, drop_path_rate=0.1, **size)


def batch_of(name: str, seed: int = 0, size: int = 32) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
    if name in TEXT_MODELS:
        return text_batch(seed=seed)
    if name == "t5":
        batch = text_batch(seed=seed)
        return {**batch, "labels": batch["input_ids"][:, :5].contiguous()}
    pixels, labels = image_batch(size=size, seed=seed)
    return {"pixel_values": pixels, "labels": labels} if name == "vit" else (pixels, labels)


def loss_of(model: nn.Module, batch: dict[str, Tensor] | tuple[Tensor, Tensor]) -> Tensor:
    if isinstance(batch, dict):
        return model(**batch).loss
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def logits_of(model: nn.Module, batch: dict[str, Tensor] | tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits if isinstance(batch, dict) else model(batch[0])


def train_steps(model: nn.Module, batches: list, optimizer: str = "AdamW", autocast: bool = False) -> list:
    """Trains one step on each batch, with dropout, and returns every loss, gradient and final parameter or buffer."""
    torch.manual_seed(1)
    model.train()
    steps = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
    trace = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, batch)
        loss.backward()
        trace.append(("loss", loss.detach().clone()))
        trace += [(name, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None]
        steps.step()
        steps.zero_grad()
    return trace + [(f"state:{name}", value.clone()) for name, value in model.state_dict().items()]


def differing(one: list, other: list) -> list[str]:
    """Names of the entries of two traces that are not the same bit for bit."""
    assert [name for name, _ in one] == [name for name, _ in other]
    return [name for (name, a), (_, b) in zip(one, other, strict=True) if not torch.equal(a, b)]


@contextmanager
def naming(*case: object):
    """Says which of the cases that a test goes through an error is about."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{', '.join(map(str, case))}: {type(error).__name__} {error}") from error


def boundaries_on(model: nn.Module) -> list[str]:
    """Modules that carry a boundary."""
    return [n for n, m in model.named_modules() if any(isinstance(h, Boundary) for h in m._forward_hooks.values())]


def hooks_on(model: nn.Module) -> dict[str, int]:
    """How many hooks of any kind each module carries."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {name: n for name, m in model.named_modules() if (n := sum(len(getattr(m, kind)) for kind in kinds))}


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.dropout(self.first(x).relu()))


class Stack(nn.Module):
    """Four blocks and a head; `segments` runs them under torch's activation checkpointing, so many at a time."""

    def __init__(
        self, width: int = 8, blocks: int = 4, segments: int = 0, reentrant: bool = False, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.head = nn.Linear(width, 3)
        self.segments, self.reentrant = segments, reentrant

    def run(self, start: int, x: Tensor) -> Tensor:
        for block in self.blocks[start : start + max(1, self.segments)]:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        for start in range(0, len(self.blocks), max(1, self.segments)):
            if self.segments and self.training:
                x = checkpoint(self.run, start, x, use_reentrant=self.reentrant)
            else:
                x = self.run(start, x)
        return self.head(x)


def stack(**options) -> Stack:
    torch.manual_seed(0)
    return Stack(**options)


def points(rows: int = 6, width: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Reentrant checkpointing needs an input that asks for its gradient.
    return torch.randn(rows, width, generator=generator).requires_grad_(), torch.arange(rows) % 3
