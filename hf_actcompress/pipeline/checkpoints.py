"""What a rank of a PipelineTrainer writes down, so that a later run goes on exactly."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .launch import share

if TYPE_CHECKING:
    from .training import PipelineTrainer


def save(trainer: PipelineTrainer) -> Path:
    """This rank's part, as step-N/rankR.pt under checkpoints; the last two steps are kept."""
    folder = trainer.folder / "checkpoints" / f"step-{trainer.step}"
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "step": trainer.step, "own": trainer.own,
        "modules": {k: module.own_state_dict() for k, module in trainer.modules.items()},
        "top": {k: module.state_dict() for k, module in trainer.modules.items()},
        "optimizer": trainer.optimizer.state_dict(), "rates": trainer.rates.state_dict(),
        "codecs": {stage.stage_index: stage.codec_state() for stage in trainer.stages},
        "rng": torch.get_rng_state(), "history": json.dumps(trainer.history),
    }  # fmt: skip
    path = folder / f"rank{trainer.rank}.pt"
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    dist.barrier()  # older ones go when all have the new one
    for step in _saved(trainer)[:-2]:
        old = trainer.folder / "checkpoints" / f"step-{step}"
        (old / path.name).unlink(missing_ok=True)
        with suppress(OSError):  # another rank's part is still there, or it was the first to remove the folder
            old.rmdir()
    return folder


def _saved(trainer: PipelineTrainer) -> list[int]:
    found = (trainer.folder / "checkpoints").glob(f"step-*/rank{trainer.rank}.pt")
    return sorted(int(re.sub(r"\D", "", path.parent.name)) for path in found)


def resume(trainer: PipelineTrainer) -> None:
    """From the last step of which every rank has a checkpoint; ValueError where there is none, or of other stages."""
    every: list[Any] = [share(_saved(trainer), rank) for rank in range(trainer.size)]
    common = set.intersection(*map(set, every))
    if not common:
        raise ValueError(
            f"--resume: there is no step of which all ranks have a checkpoint under {trainer.folder}/checkpoints "
            f"(found {every}). Train with --save_steps first, or leave --resume out."
        )
    step = max(common)
    path = trainer.folder / "checkpoints" / f"step-{step}" / f"rank{trainer.rank}.pt"
    state = torch.load(path, map_location=trainer.device, weights_only=True)
    if state["own"] != trainer.own:
        raise ValueError(
            f"{path} holds the stages {state['own']}, this rank runs {trainer.own}: resume with the same topology."
        )
    for k, module in trainer.modules.items():
        module.load_state_dict(state["top"][k])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.rates.load_state_dict(state["rates"])
    for stage in trainer.stages:
        stage.load_codec_state(state["codecs"][stage.stage_index])
    torch.set_rng_state(state["rng"].cpu())
    trainer.step, trainer.history = state["step"], json.loads(state["history"])
