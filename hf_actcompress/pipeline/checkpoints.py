"""The checkpoints of a rank: safetensors with JSON beside them, so that reading one runs no code.

They know the state that is written, and no trainer.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..codecs.states import load_states, save_states
from .launch import share

KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """This rank's `state` as step-N/rankR.safetensors below `folder`; the last two steps are kept.

    state: nested mappings of tensors and JSON values; keys become text.
    """
    rank = dist.get_rank()
    path = _path(folder, step, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_states(path, state)
    dist.barrier()  # older ones go when all have the new one
    for old in _steps(folder, rank)[:-KEPT]:
        _path(folder, old, rank).unlink(missing_ok=True)
        with suppress(OSError):  # another rank's part is still there, or it was the first to remove the folder
            _path(folder, old, rank).parent.rmdir()
    return path.parent


def load(folder: Path) -> tuple[dict[str, Any], Path]:
    """This rank's state of the last step that every rank has, and its path.

    Raises ValueError where there is no such step, and for a damaged file.
    """
    rank = dist.get_rank()
    found: list[Any] = [share(_steps(folder, rank), other) for other in range(dist.get_world_size())]
    common = set.intersection(*map(set, found))
    if not common:
        old = " Files that end in .pt are version 0.1's; they can hold code, and are not read." if any(
            folder.glob("step-*/rank*.pt")) else ""  # fmt: skip
        raise ValueError(
            f"--resume: there is no step of which all ranks have a checkpoint under {folder} (found {found}).{old} "
            "Train with --save_steps first, or leave --resume out."
        )
    path = _path(folder, max(common), rank)
    try:
        return load_states(path)[0], path
    except ValueError as error:
        raise ValueError(f"{error} It is damaged: remove its folder on every rank, and resume again.") from None


def _path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step-{step}" / f"rank{rank}.safetensors"


def _steps(folder: Path, rank: int) -> list[int]:
    names = (path.parent.name for path in folder.glob(f"step-*/rank{rank}.safetensors"))
    return sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))
