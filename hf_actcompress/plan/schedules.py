"""The order in which each device works through a step, for every schedule that the simulator knows.

The orders are those of torch.distributed.pipelining (tests/plan/test_simulate.py compares them) and of
pipeline/engine.py.  Numbers only: no tensors, no processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

FORWARD, BACKWARD = "F", "B"
INPUT, WEIGHT = "I", "W"  # the two halves of a backward in zero-bubble schedules: gradients of inputs, of parameters


@dataclass(frozen=True)
class Action:
    """One piece of computation."""

    kind: str
    stage: int
    chunk: int  # micro-batch
    blocking: bool = False  # the device waits until the result has left

    def __str__(self) -> str:
        return f"{self.kind}{self.chunk}@{self.stage}"


@dataclass(frozen=True)
class Schedule:
    """How the devices of a pipeline order their work."""

    what: str
    per_device: int | None  # stages on each device, None for any number but one
    posts_receives: bool  # ahead, so that a message leaves when it is made; else when its receiver needs it
    make: Callable[[int, int, int, int, int], list[Action]]  # rank, devices, stages, micro-batches, ahead


def _gpipe(rank: int, devices: int, stages: int, chunks: int, ahead: int) -> list[Action]:
    return [Action(kind, rank, chunk) for kind in (FORWARD, BACKWARD) for chunk in range(chunks)]


def _one_each(rank: int, chunks: int, begun: int, blocking: bool) -> list[Action]:
    """`begun` forwards, then one backward and one forward in turn, then the backwards that are left."""
    begun = min(begun, chunks)
    order = [Action(FORWARD, rank, k, blocking and k == begun - 1) for k in range(begun)]
    for k in range(chunks):
        more = begun + k < chunks
        order.append(Action(BACKWARD, rank, k, blocking and more))
        if more:
            order.append(Action(FORWARD, rank, begun + k, blocking))
    return order


def _1f1b(rank: int, devices: int, stages: int, chunks: int, ahead: int) -> list[Action]:
    return _one_each(rank, chunks, stages - rank, blocking=True)


def _early(rank: int, devices: int, stages: int, chunks: int, ahead: int) -> list[Action]:
    return _one_each(rank, chunks, stages - rank + ahead * (stages - 1 - rank), blocking=False)


def _interleaved(rank: int, devices: int, stages: int, chunks: int, ahead: int) -> list[Action]:
    local = stages // devices
    rounds = max(1, chunks // devices)
    if chunks % rounds:
        raise ValueError(f"interleaved: {chunks} micro-batches are not a multiple of their {rounds} rounds.")
    each = chunks // rounds
    total = local * chunks
    begun = min((local - 1) * each + 2 * (devices - 1 - rank), total)
    seen: Counter[tuple[str, int]] = Counter()
    order: list[Action] = []

    def add(kind: str, place: int) -> None:
        stage = place * devices + rank
        order.append(Action(kind, stage, seen[kind, stage]))
        seen[kind, stage] += 1

    for k in range(total + begun):
        if k < total:
            add(FORWARD, k // each % local)
        if k >= begun:
            add(BACKWARD, local - 1 - (k - begun) // each % local)
    return order


def _zbv(rank: int, devices: int, stages: int, chunks: int, ahead: int) -> list[Action]:
    """Two stages per device, as a V: the first device has the first and the last."""
    down, up = rank, stages - 1 - rank
    seen: Counter[tuple[str, int]] = Counter()
    order: list[Action] = []

    def add(kind: str, stage: int, times: int = 1) -> None:
        for _ in range(times):
            order.append(Action(kind, stage, seen[kind, stage]))
            seen[kind, stage] += 1

    # The order is made for at least as many micro-batches as fill the V; those beyond the real number are left out.
    full = max(2 * devices - 1, chunks)
    add(FORWARD, down, 2 * (devices - rank) - 1)
    for _ in range(rank):
        add(FORWARD, up)
        add(FORWARD, down)
    for _ in range(devices - rank):
        for kind in (FORWARD, INPUT, WEIGHT):
            add(kind, up)
    while seen[FORWARD, up] < seen[FORWARD, down] or seen[FORWARD, down] < full:
        if seen[FORWARD, down] < full:
            add(FORWARD, down)
        for kind, stage in ((INPUT, down), (WEIGHT, down), (FORWARD, up), (INPUT, up), (WEIGHT, up)):
            add(kind, stage)
    for _ in range(rank):
        add(INPUT, down)
        add(INPUT, up)
    for _ in range(devices - rank):
        add(INPUT, down)
        add(WEIGHT, down)
    for stage in (up, down):
        add(WEIGHT, stage, seen[INPUT, stage] - seen[WEIGHT, stage])
    return [action for action in order if action.chunk < chunks]


SCHEDULES = {
    "early-1f1b": Schedule("EarlySchedule1F1B and CompressedPipelineStage (ahead 0: Schedule1F1B)", 1, True, _early),
    "1f1b": Schedule("Schedule1F1B and torch's own stage, which waits for its sends", 1, False, _1f1b),
    "gpipe": Schedule("ScheduleGPipe and torch's own stage: all forwards, then all backwards", 1, False, _gpipe),
    "interleaved": Schedule("ScheduleInterleaved1F1B: several stages per device", None, True, _interleaved),
    "zbv": Schedule("ScheduleZBVZeroBubble, also for client-server: two stages per device", 2, True, _zbv),
}


def place(schedule: str, stages: int, devices: int) -> list[int]:
    """The device of each stage.  Raises ValueError for a number of stages that the schedule cannot have."""
    per_device = SCHEDULES[schedule].per_device
    if stages % devices or per_device not in (None, stages // devices) or (per_device is None and stages == devices):
        wanted = {1: "as many stages as devices", 2: "two stages per device"}.get(
            per_device or 0, "twice, three times, ... as many stages as devices"
        )
        raise ValueError(f"The schedule {schedule!r} needs {wanted}; there are {stages} stages on {devices} devices.")
    return [stage if stage < devices else stages - 1 - stage for stage in range(stages)] if per_device == 2 else [
        stage % devices for stage in range(stages)
    ]  # fmt: skip


def orders(schedule: str, stages: int, devices: int, chunks: int, ahead: int = 2) -> list[list[Action]]:
    """What each device does, in order.

    Raises ValueError for an unknown schedule, or one that cannot have so many stages, devices or micro-batches.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"Unknown schedule {schedule!r}. Schedules: {', '.join(SCHEDULES)}.")
    place(schedule, stages, devices)
    if chunks < 1 or (schedule in ("1f1b", "early-1f1b") and chunks < stages):
        raise ValueError(f"{schedule}: {chunks} micro-batches; at least {max(1, stages)} are needed, one per stage.")
    return [SCHEDULES[schedule].make(rank, devices, stages, chunks, ahead) for rank in range(devices)]
