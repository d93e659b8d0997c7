"""What every rank of tests/test_ddp.py runs, on gloo.  Each rank writes what it found as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.nn.parallel import DistributedDataParallel  # noqa: E402

from helpers import build, differing, hooks_on, text_batch, train_steps  # noqa: E402
from helpers.trainers import STEPS, make_trainer, weights  # noqa: E402
from hf_actcompress import ActCompressCallback, ActCompressConfig, compress_model  # noqa: E402
from hf_actcompress.observe import read_records  # noqa: E402
from hf_actcompress.pipeline.launch import leave  # noqa: E402


def fingerprint(values: dict[str, torch.Tensor]) -> list[float]:
    return [float(value.double().sum()) for value in values.values()]


def plain_loop(found: dict, rank: int) -> None:
    """DistributedDataParallel by itself: identity changes nothing, a lossy codec does."""
    batches = [text_batch(seed=10 * step + rank) for step in range(3)]
    traces = {}
    for codec in ("none", "identity", "uniform:bits=2"):
        # A bucket of one parameter or so, so that reduction overlaps with the backward pass.
        model = DistributedDataParallel(build("bert"), bucket_cap_mb=0.001)
        if codec == "none":
            traces[codec] = train_steps(model, batches)
            continue
        with compress_model(model, ActCompressConfig(codec, first=2, last=2)) as handle:
            traces[codec] = train_steps(model, batches)
        found[f"calls {codec}"] = [row["calls"] for row in handle.stats()]
        found[f"changed {codec}"] = differing(traces["none"], traces[codec])
        found[f"hooks {codec}"] = hooks_on(model.module)


def trainer_loop(found: dict, folder: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2, "eval_strategy": "epoch"}
    config = ActCompressConfig("ef+block:bits=2,round=stochastic", "kmeans:bits=2", first=2, evaluate="both")
    trainer = make_trainer(folder, callback := ActCompressCallback(config), **options)
    trainer.train()
    found["whole"] = fingerprint(weights(trainer))
    found["calls"] = sorted({row["calls"] for row in callback.stats if row["direction"] == "backward"})
    found["steps"] = trainer.state.global_step
    found["expected steps"] = 2 * STEPS
    # The second run is analysed as well, which must not be seen in it.
    analysed = dataclasses.replace(config, analysis=True, analysis_every=2)
    again = make_trainer(folder, ActCompressCallback(analysed), **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    dist.barrier()
    found["analysed"] = sorted({row["step"] for row in read_records(folder)})
    found["resumed"] = fingerprint(weights(again))
    found["metrics"] = sorted({key for entry in trainer.state.log_history for key in entry if "loss" in key})
    found["hooks"] = hooks_on(trainer.model)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    plain_loop(found, rank)
    trainer_loop(found, folder / "run")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
    assert os.environ["WORLD_SIZE"] == "2"
