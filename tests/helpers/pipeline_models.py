"""What every rank of tests/pipeline/test_models.py runs: models that people train, on two and three stages.

    pipeline_models.py FOLDER CASE...

rankR.json: {case: {"losses", "alone", "weights", ...}}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers  # noqa: E402
from torch.distributed.pipelining import ScheduleZBVZeroBubble  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from helpers import SPECIAL, TEXT, VOCABULARY, build, text_batch  # noqa: E402
from hf_actcompress import parse_codec  # noqa: E402
from hf_actcompress.pipeline import (  # noqa: E402
    CompressedPipelineStage,
    EarlySchedule1F1B,
    PipelineGradScaler,
    split,
)
from hf_actcompress.pipeline.launch import leave  # noqa: E402

STEPS, CHUNKS, ROWS = 20, 4, 4
SMALL = {k: v for k, v in TEXT.items() if k != "num_labels"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OVERFLOW = 5  # in this step


def frozen() -> torch.nn.Module:
    """As with LoRA on the last layers: nothing learns before the classifier's stage."""
    model = build("bert")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    for name, p in model.named_parameters():
        p.requires_grad_("layer.3" in name or "classifier" in name)
    return model


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=4, n_head=2, n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, **SPECIAL,
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, **SPECIAL, tie_word_embeddings=True)
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **NO_DROPOUT)),
    "deberta-v2": lambda: transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(
            **TEXT, **NO_DROPOUT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]
        )
    ),
    "frozen": frozen,
}  # fmt: skip


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train()


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    found = [text_batch(rows=ROWS, seed=step) for step in range(STEPS)]
    for batch in found:
        if name in ("gpt2", "llama", "bert"):  # a label a token
            batch["labels"] = batch["input_ids"].roll(-1, 1)
    return found


def optimizer_of(parameters: list) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": parameters}], lr=1e-3)


def alone(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, losses = make(name), []
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    for batch in batches(name):
        parts = [dict(zip(batch, values, strict=True)) for values in zip(*(v.chunk(CHUNKS) for v in batch.values()),
                                                                         strict=True)]  # fmt: skip
        total = 0.0
        for part in parts:
            labels = part.pop("labels")
            loss = loss_of(model(**part).logits, labels)
            (loss / CHUNKS).backward()
            total += float(loss.detach()) / CHUNKS
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, model.state_dict()


def together(name: str, shape: str, scaled: bool) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    count = size if shape == "line" else 2 * size
    modules = split(make(name), stages=count)
    own = [rank] if shape == "line" else [rank, count - 1 - rank]
    stages = [CompressedPipelineStage(modules[k], k, count, torch.device("cpu"), codec=parse_codec("identity"),
                                      timeout=60, checksum=name == "gpt2") for k in own]  # fmt: skip
    parameters = list({id(p): p for k in own for p in modules[k].parameters() if p.requires_grad}.values())
    optimizer = optimizer_of(parameters)
    scaler = PipelineGradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    step, losses, scales = 0, [], []

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = scaler.scale(loss_of(logits, labels))
        return loss * torch.inf if scaled and step == OVERFLOW else loss

    if shape == "line":
        schedule: Any = EarlySchedule1F1B(stages[0], n_microbatches=CHUNKS, loss_fn=loss_fn)
    else:
        schedule = ScheduleZBVZeroBubble(stages, n_microbatches=CHUNKS, loss_fn=loss_fn)
    first, last = 0 in own, count - 1 in own
    before = [p.detach().clone() for p in parameters]
    moved = []
    for batch in batches(name):
        side = {"attention_mask": batch["attention_mask"]}
        found: list[torch.Tensor] = []
        args = (batch["input_ids"],) if first else ()
        if last:
            schedule.step(*args, target=batch["labels"], losses=found, **side)
            losses.append(float(torch.stack(found).mean().detach()) / scaler.get_scale())
        else:
            schedule.step(*args, **side)
        scaler.step(optimizer)
        scales.append(scaler.get_scale())
        scaler.update()
        optimizer.zero_grad()
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)))
        before = [p.detach().clone() for p in parameters]
        step += 1
    return {
        "losses": losses, "scales": scales, "moved": moved, "bytes": [dict(s.bytes) for s in stages],
        "state": {k: v for one in own for k, v in modules[one].own_state_dict().items()},
        "shared": {k: list(v) for k, v in modules[0].shared.stages.items()},
        "copies": {n: p.detach().sum().item() for n, p in modules[0].shared._parameters.items()},
        "finite": all(bool(torch.isfinite(p).all()) for p in parameters), "trained": len(parameters),
    }  # fmt: skip


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for case in cases:
        name, shape, *scaled = case.split("/")
        losses, state = alone(name)
        result = together(name, shape, bool(scaled))
        own = result.pop("state")
        result["weights"] = max(float((own[k].float() - state[k].float()).abs().max()) for k in own)
        found[case] = {**result, "alone": losses}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave()
