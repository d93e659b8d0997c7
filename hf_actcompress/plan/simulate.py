"""A training step of a pipeline, simulated event by event.

Devices compute, encode and decode one thing at a time, in the order of the schedule; a link carries one message at a
time in each direction.  Where receives are not posted ahead, a message leaves when its receiver has asked for it, and
what asks waits behind the bytes that go the same way, as with gloo: so torch's 1F1B uses one direction at a time.
Numbers in, times out: it knows no tensors, no codecs and no processes.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from .schedules import BACKWARD, FORWARD, INPUT, SCHEDULES, WEIGHT, Action, orders, place


@dataclass(frozen=True)
class Stage:
    """Seconds of one micro-batch; `optimizer` once a step.  weight: the share of the backward that only the stage's
    own parameters need, which zero-bubble schedules set apart."""

    forward: float
    backward: float
    optimizer: float = 0.0
    weight: float = 0.5


@dataclass(frozen=True)
class Link:
    """Between two devices, the same both ways.  bandwidth: bytes per second; latency: seconds."""

    bandwidth: float
    latency: float = 0.0


@dataclass(frozen=True)
class Traffic:
    """One direction of one cut: bytes of a micro-batch's message, and seconds to encode and to decode it."""

    nbytes: float
    encode: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Cut:
    """What passes between a stage and the next."""

    forward: Traffic
    backward: Traffic


class Event(NamedTuple):
    """Something that took a resource for a time.  resource: a device's number, or (from, to) for a link."""

    resource: int | tuple[int, int]
    kind: str  # F, B, I, W; encode, decode; send; optimizer
    stage: int
    chunk: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step."""

    seconds: float
    events: list[Event]
    devices: int

    @cached_property
    def _worked(self) -> dict[int | tuple[int, int], float]:
        worked: dict[int | tuple[int, int], float] = defaultdict(float)
        for event in self.events:
            worked[event.resource] += event.end - event.start
        return worked

    def busy(self, resource: int | tuple[int, int]) -> float:
        """The share of the step for which a device works, or a link carries bytes in that direction."""
        return self._worked.get(resource, 0.0) / self.seconds if self.seconds else 0.0

    @property
    def bubble(self) -> float:
        """The share of all devices' time in which they wait."""
        return 1 - sum(self.busy(device) for device in range(self.devices)) / self.devices

    @property
    def links(self) -> list[tuple[int, int]]:
        return sorted(resource for resource in self._worked if isinstance(resource, tuple))


def bound(
    stages: Sequence[Stage], links: Mapping[tuple[int, int], Link], cuts: Sequence[Cut], chunks: int, schedule: str,
    devices: int | None = None,
) -> float:  # fmt: skip
    """What no order of the work can beat: the larger of the busiest device's computation (without codecs) and the
    busiest link's bytes over its bandwidth, in one direction."""
    count = len(stages) if devices is None else devices
    at = place(schedule, len(stages), count)
    work, carried = defaultdict(float), defaultdict(float)
    for device, stage in zip(at, stages, strict=True):
        work[device] += chunks * (stage.forward + stage.backward) + stage.optimizer
    for k, cut in enumerate(cuts):
        a, b = at[k], at[k + 1]
        if a != b:
            bandwidth = _link(links, a, b).bandwidth
            carried[a, b] += chunks * cut.forward.nbytes / bandwidth
            carried[b, a] += chunks * cut.backward.nbytes / bandwidth
    return max([*work.values(), *carried.values()])


def _link(links: Mapping[tuple[int, int], Link], a: int, b: int) -> Link:
    pair = (min(a, b), max(a, b))
    if pair not in links:
        raise ValueError(f"No link between devices {pair[0]} and {pair[1]}, which exchange activations.")
    return links[pair]


def simulate(
    stages: Sequence[Stage], links: Mapping[tuple[int, int], Link], cuts: Sequence[Cut], chunks: int,
    schedule: str = "early-1f1b", *, devices: int | None = None, ahead: int = 2,
) -> Timeline:  # fmt: skip
    """One step.

    links: by pair of devices (the smaller number first); cuts: one between each stage and the next, ignored where
        both are on one device; chunks: micro-batches; devices: as many as stages by default.
    Raises ValueError for a schedule that cannot have these stages, devices and micro-batches, for a link that is not
    there, and for a number of cuts that does not fit.
    """
    if len(cuts) != len(stages) - 1:
        raise ValueError(f"{len(stages)} stages have {len(stages) - 1} cuts between them; got {len(cuts)}.")
    count = len(stages) if devices is None else devices
    order = orders(schedule, len(stages), count, chunks, ahead)
    at = place(schedule, len(stages), count)
    for k in range(len(cuts)):
        if at[k] != at[k + 1]:
            _link(links, at[k], at[k + 1])
    return _Step(stages, links, cuts, order, at, SCHEDULES[schedule].prompt).run()


@dataclass
class _Device:
    order: deque[Action]
    busy: bool = False
    waits: int = 0  # messages that have to leave before it goes on


@dataclass
class _Way:
    """One direction of a link."""

    link: Link
    queue: deque[_Message] = field(default_factory=deque)
    busy: bool = False


class _Message(NamedTuple):
    key: tuple[str, int, int]  # kind, stage and micro-batch of the action that needs it
    traffic: Traffic
    sender: int
    receiver: int
    waited_for: bool


_ASKING = Traffic(0)  # what tells a sender that its peer is ready


class _Step:
    """The state of one simulated step: a heap of things that end, and what may start then."""

    def __init__(
        self, stages: Sequence[Stage], links: Mapping[tuple[int, int], Link], cuts: Sequence[Cut],
        order: list[list[Action]], at: list[int], prompt: bool,
    ) -> None:  # fmt: skip
        self.stages, self.cuts, self.at, self.prompt = stages, cuts, at, prompt
        self.devices = [_Device(deque(actions)) for actions in order]
        self.ways: dict[tuple[int, int], _Way] = {}
        for (a, b), link in links.items():
            self.ways[a, b], self.ways[b, a] = _Way(link), _Way(link)
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.ticket = itertools.count()  # ties end in the order in which they began
        self.now = 0.0
        self.ready: set[tuple[str, int, int]] = set()  # what has arrived, or was made on the same device
        self.wanted: set[tuple[str, int, int]] = set()  # receives that are posted
        self.asked: set[tuple[str, int, int]] = set()  # those of which the sender knows
        self.events: list[Event] = []

    def run(self) -> Timeline:
        for device in range(len(self.devices)):
            self._go_on(device)
        while self.heap:
            self.now, _, then = heapq.heappop(self.heap)
            then()
        stuck = [f"device {k}: {device.order[0]}" for k, device in enumerate(self.devices) if device.order]
        assert not stuck, f"the schedule stands still at {', '.join(stuck)}"
        end = [0.0] * len(self.devices)
        for event in self.events:
            if isinstance(event.resource, int):
                end[event.resource] = max(end[event.resource], event.end)
        for stage, device in enumerate(self.at):
            seconds = self.stages[stage].optimizer
            if seconds:
                self._note(device, "optimizer", stage, 0, end[device], end[device] + seconds)
                end[device] += seconds
        return Timeline(max([self.now, *end]), self.events, len(self.devices))

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (self.now + seconds, next(self.ticket), then))

    def _note(
        self, resource: int | tuple[int, int], kind: str, stage: int, chunk: int, start: float, end: float
    ) -> None:
        if end > start:
            self.events.append(Event(resource, kind, stage, chunk, start, end))

    # -- devices ---------------------------------------------------------------------------------------------------
    def _needs(self, action: Action) -> tuple[tuple[str, int, int], int, Traffic] | None:
        """Key, sender and traffic of what an action waits for from another stage."""
        forward = action.kind == FORWARD
        other = action.stage + (-1 if forward else 1)
        if action.kind == WEIGHT or not 0 <= other < len(self.stages):
            return None
        cut = self.cuts[min(action.stage, other)]
        kind = FORWARD if forward else BACKWARD
        return (kind, action.stage, action.chunk), self.at[other], cut.forward if forward else cut.backward

    def _go_on(self, number: int) -> None:
        device = self.devices[number]
        if device.busy or not device.order:
            return
        action = device.order[0]
        needs = self._needs(action)
        if needs is not None and needs[0] not in self.wanted:
            self.wanted.add(needs[0])
            if needs[1] != number and not self.prompt:
                self.ways[number, needs[1]].queue.append(_Message(needs[0], _ASKING, number, needs[1], False))
                self._carry(number, needs[1])
        if device.waits or (needs is not None and needs[0] not in self.ready):
            return
        device.order.popleft()
        device.busy = True
        time = self.now
        stage, chunk = action.stage, action.chunk
        if needs is not None and needs[1] != number:
            self._note(number, "decode", stage, chunk, time, time + needs[2].decode)
            time += needs[2].decode
        seconds = self._seconds(action)
        self._note(number, action.kind, stage, chunk, time, time + seconds)
        time += seconds
        message = self._makes(action)
        if message is not None and message.receiver != number:
            self._note(number, "encode", stage, chunk, time, time + message.traffic.encode)
            time += message.traffic.encode
        self._after(time - self.now, lambda: self._finished(number, message))

    def _seconds(self, action: Action) -> float:
        stage = self.stages[action.stage]
        if action.kind == FORWARD:
            return stage.forward
        return stage.backward * {BACKWARD: 1.0, INPUT: 1 - stage.weight, WEIGHT: stage.weight}[action.kind]

    def _makes(self, action: Action) -> _Message | None:
        forward = action.kind == FORWARD
        other = action.stage + (1 if forward else -1)
        if action.kind == WEIGHT or not 0 <= other < len(self.stages):
            return None
        cut = self.cuts[min(action.stage, other)]
        key = (FORWARD if forward else BACKWARD, other, action.chunk)
        traffic = cut.forward if forward else cut.backward
        return _Message(key, traffic, self.at[action.stage], self.at[other], action.waits)

    def _finished(self, number: int, message: _Message | None) -> None:
        device = self.devices[number]
        device.busy = False
        if message is not None:
            if message.receiver == number:
                self.ready.add(message.key)
            else:
                device.waits += message.waited_for
                self.ways[number, message.receiver].queue.append(message)
                self._carry(number, message.receiver)
        self._go_on(number)

    # -- links -----------------------------------------------------------------------------------------------------
    def _carry(self, a: int, b: int) -> None:
        way = self.ways[a, b]
        able = (m for m in way.queue if self.prompt or m.traffic is _ASKING or m.key in self.asked)
        message = None if way.busy else next(able, None)
        if message is None:
            return
        way.queue.remove(message)
        way.busy = True
        seconds = message.traffic.nbytes / way.link.bandwidth
        kind, stage, chunk = message.key
        self._note((a, b), "send", stage, chunk, self.now, self.now + seconds)
        self._after(seconds, lambda: self._left(message))
        self._after(seconds + way.link.latency, lambda: self._arrived(message))

    def _left(self, message: _Message) -> None:
        self.ways[message.sender, message.receiver].busy = False
        self._carry(message.sender, message.receiver)
        if message.waited_for:
            self.devices[message.sender].waits -= 1
            self._go_on(message.sender)

    def _arrived(self, message: _Message) -> None:
        if message.traffic is _ASKING:
            self.asked.add(message.key)
            self._carry(message.receiver, message.sender)
        else:
            self.ready.add(message.key)
            self._go_on(message.receiver)
