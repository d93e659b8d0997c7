"""The checkpoints of a rank: safetensors with JSON beside them, so that reading one runs no code, and a manifest.

    step-N/rankR.safetensors    the state
    step-N/rankR.manifest       {"files": {name: {"bytes", "sha256"}}, ...} and the sha256 of that line

The manifest comes last: a checkpoint without one, or whose files are not those in it, is not used.
They know the state that is written, and no trainer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from ..codecs.states import load_states, save_states
from .launch import share

logger = logging.getLogger(__name__)

KEPT = 2
PROBE = "write-test"


def check_folder(folder: Path, nbytes: int) -> None:
    """Raise ValueError, before training, where checkpoints of `nbytes` each could not be written to `folder`."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    probe = folder / f"{PROBE}-rank{rank}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_states(probe, {"probe": rank})
        load_states(probe)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except (OSError, SafetensorError, ValueError) as error:  # ValueError: a null byte, or not UTF-8
        with suppress(OSError, ValueError):
            Path(f"{probe}.tmp").unlink(missing_ok=True)
        raise ValueError(
            f"Rank {rank} cannot write to {str(folder)!r} ({_why(error)}). Give another --output_dir, or make this "
            "one writable."
        ) from error
    needed = nbytes * (KEPT + 1)  # the next one is written before the oldest goes
    if free < needed:
        raise ValueError(
            f"Rank {rank}: {str(folder)!r} has {free / 1e9:.2f} GB free, and {KEPT + 1} checkpoints of "
            f"{nbytes / 1e9:.2f} GB need {needed / 1e9:.2f}. Free some, or give another --output_dir."
        )


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """This rank's `state` as step-N/rankR.safetensors below `folder`; the last two steps are kept.

    state: nested mappings of tensors and JSON values; keys become text.
    Raises ValueError where it cannot be written; earlier checkpoints are then still there.
    """
    rank = dist.get_rank()
    path = _path(folder, step, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _manifest(path).unlink(missing_ok=True)
        save_states(path, state)
        _sync(path)
        write_manifest(path, step)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            Path(f"{path}.tmp").unlink(missing_ok=True)
        raise ValueError(
            f"Rank {rank} could not write the checkpoint of step {step} to {str(path.parent)!r} ({_why(error)}). "
            "Earlier ones are as they were: mend the cause and start again with --resume."
        ) from error
    dist.barrier()  # older ones go when all have the new one
    for old in _steps(folder, rank)[:-KEPT]:
        for each in (_manifest(_path(folder, old, rank)), _path(folder, old, rank)):
            each.unlink(missing_ok=True)
        with suppress(OSError):  # another rank's part is still there, or it was the first to remove the folder
            path.parent.with_name(f"step-{old}").rmdir()
    return path.parent


def load(folder: Path) -> tuple[dict[str, Any], Path]:
    """This rank's state of the last step that every rank has undamaged, and its path.

    Says so where that is not the newest.  Raises ValueError where there is no such step.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    flaws = {step: flaw(_path(folder, step, rank), step) for step in _steps(folder, rank)}
    every: list[dict[str, str | None]] = [share({str(k): v for k, v in flaws.items()}, other) for other in range(size)]
    whole = [{int(step) for step, why in one.items() if why is None} for one in every]
    common = set.intersection(*whole)
    newest = max((int(step) for one in every for step in one), default=-1)
    why = "; ".join(
        f"step {step} of rank {other} {text}"
        for other, one in enumerate(every) for step, text in one.items()
        if text is not None and int(step) > max(common, default=-1)
    ) or "the newest step is not there on every rank"  # fmt: skip
    if not common:
        old = " Files that end in .pt are version 0.1's; they can hold code, and are not read." if any(
            folder.glob("step-*/rank*.pt")) else ""  # fmt: skip
        reason = f" ({why})" if newest >= 0 else ""
        raise ValueError(
            f"--resume: there is no step of which all ranks have a whole checkpoint under {folder} (found "
            f"{[sorted(one) for one in whole]}){reason}.{old} Train with --save_steps first, or leave --resume out."
        )
    if max(common) < newest and rank == 0:
        logger.warning("resuming from step %d, and not from step %d: %s", max(common), newest, why)
    path = _path(folder, max(common), rank)
    return load_states(path)[0], path


# -- the manifest -----------------------------------------------------------------------------------------------
def write_manifest(path: Path, step: int) -> None:
    """Beside `path`: its size and checksum, and that of the manifest itself."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}}
    text = json.dumps({"step": step, "files": files}).encode()
    part = Path(f"{_manifest(path)}.tmp")
    part.write_bytes(_signed(text))
    _sync(part)
    os.replace(part, _manifest(path))


def flaw(path: Path, step: int) -> str | None:
    """What is wrong with the checkpoint at `path`, or None."""
    try:
        data = _manifest(path).read_bytes()
        text = data.partition(b"\n")[0]
        if data != _signed(text):
            return "has a damaged manifest"
        said = json.loads(text)
        if said["step"] != step:
            return f"is that of step {said['step']}"
        for name, entry in said["files"].items():
            file = path.with_name(name)
            if file.stat().st_size != entry["bytes"]:
                return f"is damaged: {name} has {file.stat().st_size} bytes, of {entry['bytes']}"
            if _sha256(file) != entry["sha256"]:
                return f"is damaged: {name} has another checksum than its manifest"
        return None
    except FileNotFoundError as error:
        return f"is not complete: no {Path(error.filename).name}"
    except OSError as error:
        return f"cannot be read ({_why(error)})"


def _signed(text: bytes) -> bytes:
    return text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n"


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            total.update(part)
    return total.hexdigest()


def _sync(path: Path) -> None:
    """On the disk, not only in memory: a rename must not outlive the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return text[:200]


def _manifest(path: Path) -> Path:
    return path.with_suffix(".manifest")


def _path(folder: Path, step: int, rank: int) -> Path:
    return folder / f"step-{step}" / f"rank{rank}.safetensors"


def _steps(folder: Path, rank: int) -> list[int]:
    """Steps of which this rank has something, in ascending order; folders of other names are others' business."""
    paths = [*folder.glob(f"step-*/rank{rank}.safetensors"), *folder.glob(f"step-*/rank{rank}.manifest")]
    names = {path.parent.name for path in paths}
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-(0|[1-9]\d*)", name, re.ASCII))
