"""What every rank of tests/saved/test_distributed.py runs, on gloo."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402
from torch.distributed.tensor.parallel import (  # noqa: E402
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from helpers import build, differing, hooks_on, text_batch, train_steps  # noqa: E402
from helpers.trainers import make_trainer, weights  # noqa: E402
from hf_actcompress import ActCompressCallback, ActCompressConfig, compress_model  # noqa: E402
from hf_actcompress.pipeline.launch import leave  # noqa: E402
from hf_actcompress.saved import kept  # noqa: E402

CODECS = ("identity", "block:bits=4", "auto:budget=0.2")


def only(codec: str) -> ActCompressConfig:
    return ActCompressConfig(first=0, last=0, saved=codec)


def replicated(found: dict, rank: int) -> None:
    batches, traces = [text_batch(seed=10 * step + rank) for step in range(3)], {}
    traces["none"] = train_steps(DistributedDataParallel(build("bert"), bucket_cap_mb=0.001), batches)
    for codec in CODECS:
        model = DistributedDataParallel(build("bert"), bucket_cap_mb=0.001)
        with compress_model(model, only(codec)) as handle:
            traces[codec] = train_steps(model, batches)
            found[f"ddp share {codec}"] = 1 / handle.meters["saved"].record()["ratio"]
        found[f"ddp changed {codec}"] = bool(differing(traces["none"], traces[codec]))
        weight = next(iter(model.module.parameters())).detach()
        total = weight.clone()
        dist.all_reduce(total)
        found[f"ddp in step {codec}"] = torch.equal(total, 2 * weight)
        found["ddp hooks"] = hooks_on(model.module)


def sharded(found: dict, rank: int) -> None:
    batches, traces = [text_batch(seed=10 * step + rank) for step in range(3)], {}

    def make() -> nn.Module:
        model = build("bert")
        for block in model.bert.encoder.layer:
            fully_shard(block)
        return fully_shard(model)

    def steps(model: nn.Module) -> list[float]:
        torch.manual_seed(1)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05), []
        for batch in batches:
            loss = model.train()(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    traces["none"] = steps(make())
    for codec in CODECS[:2]:
        with compress_model(model := make(), only(codec)) as handle:
            traces[codec] = steps(model)
            found[f"fsdp share {codec}"] = 1 / handle.meters["saved"].record()["ratio"]
    found["fsdp losses"] = traces
    with compress_model(model := make(), only("auto:budget=0.2")):
        try:
            steps(model)
        except ValueError as error:
            found["fsdp auto"] = str(error)


def tensor_parallel(found: dict) -> None:
    """Saved DTensors: packed by their local shards."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 8))
    x = torch.randn(128, 64)
    gradients = {}
    for codec in ("none", "identity", "block:bits=8"):
        plan = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
        model = parallelize_module(copy.deepcopy(plain), mesh, plan)
        shard = distribute_tensor(x, mesh, [Replicate()])
        if codec == "none":
            model(shard).square().sum().backward()
        else:
            with compress_model(model, only(codec)) as handle:
                model(shard).square().sum().backward()
                found[f"dtensor share {codec}"] = 1 / handle.meters["saved"].record()["ratio"]
        gradients[codec] = model[0].weight.grad.full_tensor()
    found["dtensor identity"] = torch.equal(gradients["none"], gradients["identity"])
    found["dtensor error"] = float((gradients["block:bits=8"] - gradients["none"]).norm() / gradients["none"].norm())
    y = distribute_tensor(torch.randn(64, 32), mesh, [Shard(0)]).requires_grad_()
    with compress_model(nn.Sequential(nn.Tanh()), only("block:bits=8")) as handle:
        handle.model(y).sum().backward()
    found["dtensor kind"] = [type(y.grad).__name__, list(y.grad.shape), str(y.grad.placements[0])]


def trained(found: dict, folder: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2}
    results = []
    for resume in (None, str(folder / "checkpoint-3")):
        trainer = make_trainer(folder, ActCompressCallback(only("auto:budget=0.2")), **options)
        trainer.train(resume_from_checkpoint=resume)
        results.append([float(value.double().sum()) for value in weights(trainer).values()])
    found["trained"], found["resumed"] = results


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    kept.SMALLEST = 16  # tiny models have tiny tensors
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    replicated(found, rank)
    sharded(found, rank)
    tensor_parallel(found)
    trained(found, folder / "run")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
