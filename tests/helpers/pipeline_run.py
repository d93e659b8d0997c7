"""What every rank of tests/pipeline/test_stage.py runs, on gloo."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.distributed.pipelining import Schedule1F1B, ScheduleZBVZeroBubble  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from helpers import build, text_batch  # noqa: E402
from hf_actcompress import parse_codec  # noqa: E402
from hf_actcompress.pipeline import CompressedPipelineStage, merge, split  # noqa: E402
from hf_actcompress.pipeline.launch import leave  # noqa: E402

STEPS, CHUNKS, ROWS = 20, 4, 8
CODECS = (("identity", None), ("block:bits=4", "block:bits=8,round=stochastic"), ("ef+topk:ratio=0.3", None))


def fresh() -> torch.nn.Module:
    model = build("bert").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    return [text_batch(rows=ROWS, seed=step) for step in range(STEPS)]


def alone() -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, the same micro-batches."""
    model, losses = fresh(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in batches():
        parts = [dict(zip(batch, values, strict=True)) for values in zip(*(v.chunk(CHUNKS) for v in batch.values()),
                                                                         strict=True)]  # fmt: skip
        total = 0.0
        for part in parts:
            labels = part.pop("labels")
            loss = cross_entropy(model(**part).logits, labels)
            (loss / CHUNKS).backward()
            total += float(loss.detach()) / CHUNKS
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {k: v.detach().clone() for k, v in model.state_dict().items()}


def together(kind: str, codec: str, grad_codec: str | None = None) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    count = size if kind == "linear" else 2 * size
    modules = split(fresh(), stages=count)
    own = [rank] if kind == "linear" else [rank, count - 1 - rank]
    stages = [
        CompressedPipelineStage(
            modules[k], k, count, torch.device("cpu"), codec=parse_codec(codec),
            grad_codec=None if grad_codec is None else parse_codec(grad_codec),
        )
        for k in own
    ]  # fmt: skip
    if kind == "linear":
        schedule: Any = Schedule1F1B(stages[0], n_microbatches=CHUNKS, loss_fn=cross_entropy)
    else:
        schedule = ScheduleZBVZeroBubble(stages, n_microbatches=CHUNKS, loss_fn=cross_entropy)
    optimizer = torch.optim.AdamW([p for k in own for p in modules[k].parameters()], lr=1e-3)
    first, last = 0 in own, count - 1 in own
    losses = []
    for batch in batches():
        side = {"attention_mask": batch["attention_mask"]}
        args = (batch["input_ids"],) if first else ()
        found: list[torch.Tensor] = []
        if last:
            schedule.step(*args, target=batch["labels"], losses=found, **side)
            losses.append(float(torch.stack(found).mean().detach()))
        else:
            schedule.step(*args, **side)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "losses": losses,
        "bytes": [sum(s.bytes.values()) for s in stages], "raw": [sum(s.raw_bytes.values()) for s in stages],
        "state": merge([modules[k].own_state_dict() for k in own]),
        "codec_state": sum(len(s.codec_state()["states"]) for s in stages),
    }  # fmt: skip


def main(folder: Path, codecs: Sequence[tuple[str, str | None]], kinds: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    losses, state = alone()
    found["alone"] = losses
    for kind in kinds:
        for codec, grad in codecs:
            result = together(kind, codec, grad)
            own = result.pop("state")
            result["weights"] = max(float((own[k] - state[k]).abs().max()) for k in own)
            result["names"] = sorted(own)
            found[f"{kind} {codec}"] = result
    found["all names"] = sorted(state)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # Codecs that follow the folder are run in place of the usual ones, in a line of stages only.
    chosen = [(spec, None) for spec in sys.argv[2:]]
    main(Path(sys.argv[1]), chosen or CODECS, ("linear",) if chosen else ("linear", "client-server"))
    leave()
