"""What every rank of tests/reduce/test_reduce.py runs, on gloo.  Each rank writes what it found as JSON."""

from __future__ import annotations

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from helpers import build, text_batch  # noqa: E402
from helpers.trainers import make_trainer, weights  # noqa: E402
from hf_actcompress import ActCompressCallback, ActCompressConfig, compress_model, parse_codec  # noqa: E402
from hf_actcompress.pipeline.launch import leave  # noqa: E402
from hf_actcompress.reduce.exchange import Exchange  # noqa: E402

STEPS = 6
CODECS = ["identity", "ef+block:bits=4", "block:bits=8,round=stochastic", "ef+topk:ratio=0.1", "block:bits=4"]


def exchanges(found: dict, rank: int, size: int) -> None:
    """One tensor, the same in all steps: what error feedback leaves behind stays bounded, so means come out right."""
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(rank))
    parts = [torch.randn(10_000, generator=torch.Generator().manual_seed(k)) for k in range(size)]
    exact = torch.stack(parts).mean(0)
    for spec in CODECS:
        exchange, total, errors = Exchange(parse_codec(spec), seed=rank), torch.zeros_like(x), []
        for step in range(20):
            y = exchange.mean("x", x)
            total += y
            errors.append(float((total / (step + 1) - exact).norm() / exact.norm()))
        found[f"exchange {spec}"] = {
            "first": errors[0], "last": errors[-1], "sum": float(y.double().sum()),
            "ratio": exchange.plain / exchange.sent, "unchanged": torch.equal(x, parts[rank]),
        }
    small = exchange.mean("small", x[:100])
    found["small"] = float((small - exact[:100]).abs().max())
    x[5000] = torch.nan
    y = exchange.mean("x", x)
    found["nan"] = [int(y.isnan().sum()), bool(exchange.mean("x", parts[rank]).isfinite().all())]


def gradient(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    torch.manual_seed(1)
    model(**batch).loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat.detach().clone()


def wrapped(**options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(build("bert").eval(), bucket_cap_mb=0.03, **options)


def loops(found: dict, rank: int) -> None:
    batches = [text_batch(seed=10 * step + rank) for step in range(STEPS)]
    plain = wrapped().train()
    exact = [gradient(plain, batch) for batch in batches]
    for spec in (*CODECS, "powersgd:rank=2,start=2"):
        model = wrapped().train()
        with compress_model(model, ActCompressConfig(reduce=spec)) as handle:
            got = [gradient(model, batch) for batch in batches]
            row = handle.stats()[-1]
            with handle.disabled():
                off = gradient(model, batches[0])
        after = gradient(model, batches[0])
        found[f"ddp {spec}"] = {
            "error": float((sum(got) - sum(exact)).norm() / sum(exact).norm()), "sum": float(got[-1].double().sum()),
            "ratio": row["ratio"], "calls": row["calls"], "direction": row["direction"],
            "off": torch.allclose(off, exact[0], atol=1e-7), "after": torch.allclose(after, exact[0], atol=1e-7),
        }
    # torch's own hook gives the same; with gloo it hangs where there are several buckets.
    model = DistributedDataParallel(build("bert").eval()).train()
    model.register_comm_hook(powerSGD_hook.PowerSGDState(None, 2, start_powerSGD_iter=2,
                                                         orthogonalization_epsilon=1e-8),
                             powerSGD_hook.powerSGD_hook)  # fmt: skip
    theirs = [gradient(model, batch) for batch in batches]
    other = DistributedDataParallel(build("bert").eval()).train()
    with compress_model(other, ActCompressConfig(reduce="powersgd:rank=2,start=2")):
        got = [gradient(other, batch) for batch in batches]
    found["powersgd as torch's"] = float((theirs[-1] - got[-1]).abs().max())
    try:
        with compress_model(model, ActCompressConfig(reduce="block:bits=4")):
            gradient(model, batches[0])
    except ValueError as error:
        found["second hook"] = str(error)


def resuming(found: dict, rank: int) -> None:
    batches = [text_batch(seed=10 * step + rank) for step in range(STEPS)]
    for spec in ("ef+block:bits=2,round=stochastic", "powersgd:rank=2,start=2"):
        model = wrapped().train()
        with compress_model(model, ActCompressConfig(reduce=spec)) as handle:
            for batch in batches[:4]:
                gradient(model, batch)
            state = copy.deepcopy(handle.state_dict())
            expected = [gradient(model, batch) for batch in batches[4:]]
            clone = copy.deepcopy(model.module)  # a copy of the model compresses nothing, and can be made
            clone(**batches[0]).loss.backward()
        again = wrapped().train()
        for batch in batches[:2]:  # DDP has its buckets then
            gradient(again, batch)
        with compress_model(again, ActCompressConfig(reduce=spec)) as handle:
            missed = handle.load_state_dict(state)
            got = [gradient(again, batch) for batch in batches[4:]]
        apart = [float((a - b).abs().max()) for a, b in zip(expected, got, strict=True)]
        found[f"resumed {spec}"] = [missed, max(apart)]


def sharded(found: dict, rank: int) -> None:
    batch = text_batch(seed=rank)
    gradients: dict[str, torch.Tensor] = {}
    for spec in ("none", "identity", "ef+block:bits=8"):
        model = build("bert").eval()
        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
        model.train()
        if spec == "none":
            gradients[spec] = shards(model, batch)
            continue
        with compress_model(model, ActCompressConfig(reduce=spec)) as handle:
            gradients[spec] = shards(model, batch)
            found[f"sharded calls {spec}"] = handle.stats()[-1]["calls"]
            found[f"sharded ratio {spec}"] = handle.stats()[-1]["ratio"]
        found[f"sharded after {spec}"] = torch.allclose(shards(model, batch), gradients["none"], atol=1e-7)
        difference = (gradients[spec] - gradients["none"]).norm() / gradients["none"].norm()
        found[f"sharded {spec}"] = float(difference)


def shards(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    torch.manual_seed(1)
    model(**batch).loss.backward()
    flat = torch.cat([p.grad.to_local().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat.detach().clone()


def trainer_loop(found: dict, folder: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    config = ActCompressConfig(reduce="ef+block:bits=2,round=stochastic")
    trainer = make_trainer(folder, callback := ActCompressCallback(config), **options)
    trainer.train()
    found["trainer calls"] = callback.stats[-1]["calls"]
    found["steps"] = trainer.state.global_step
    found["whole"] = [float(value.double().sum()) for value in weights(trainer).values()]
    again = make_trainer(folder, ActCompressCallback(config), **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    found["resumed"] = [float(value.double().sum()) for value in weights(again).values()]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.ERROR)
    dist.init_process_group("gloo")
    rank, size, found = dist.get_rank(), dist.get_world_size(), {}
    exchanges(found, rank, size)
    if size == 2:
        loops(found, rank)
        resuming(found, rank)
        sharded(found, rank)
        trainer_loop(found, folder / "run")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
