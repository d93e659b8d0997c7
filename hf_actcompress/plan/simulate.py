"""A training step of a pipeline, simulated event by event.

Devices compute, encode and decode one thing at a time, in the order of the schedule; a link carries one message at a
time in each direction.  Where a schedule does not post its receives ahead, a message leaves only when its receiver has
told the sender that it is ready, and that notice waits behind the bytes that go the same way, as with gloo: so torch's
1F1B uses one direction of a link at a time.
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
    """Seconds that a stage takes for one micro-batch."""

    forward: float
    backward: float
    optimizer: float = 0.0  # once a step
    weight: float = 0.5  # share of the backward that computes gradients of parameters; zero-bubble schedules split it


@dataclass(frozen=True)
class Link:
    """Between two devices, the same in both directions."""

    bandwidth: float  # bytes per second
    latency: float = 0.0  # seconds


@dataclass(frozen=True)
class Traffic:
    """One direction of one cut, for one micro-batch."""

    nbytes: float  # of the message
    encode: float = 0.0  # seconds
    decode: float = 0.0


@dataclass(frozen=True)
class Cut:
    """What passes between a stage and the next."""

    forward: Traffic
    backward: Traffic


class Event(NamedTuple):
    """What occupied a device or a link for a time."""

    resource: int | tuple[int, int]  # a device's number, or (from, to) of a link
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
    def _occupied(self) -> dict[int | tuple[int, int], float]:
        occupied: dict[int | tuple[int, int], float] = defaultdict(float)
        for event in self.events:
            occupied[event.resource] += event.end - event.start
        return occupied

    def busy(self, resource: int | tuple[int, int]) -> float:
        """The share of the step for which a device works, or a link carries bytes in that direction."""
        return self._occupied.get(resource, 0.0) / self.seconds if self.seconds else 0.0

    @property
    def bubble(self) -> float:
        """The share of all devices' time in which they wait."""
        return 1 - sum(self.busy(device) for device in range(self.devices)) / self.devices

    @property
    def links(self) -> list[tuple[int, int]]:
        return sorted(resource for resource in self._occupied if isinstance(resource, tuple))


def bound(
    stages: Sequence[Stage], links: Mapping[tuple[int, int], Link], cuts: Sequence[Cut], chunks: int, schedule: str,
    devices: int | None = None,
) -> float:  # fmt: skip
    """Seconds that no order of the work can beat: the larger of the busiest device's computation (without codecs) and
    the bytes over the bandwidth of the busiest link, in one direction."""
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
    return _Step(stages, links, cuts, order, at, SCHEDULES[schedule].posts_receives).run()


@dataclass
class _Device:
    order: deque[Action]
    busy: bool = False
    unsent: int = 0  # messages that have to leave before the device goes on


@dataclass
class _Direction:
    """One direction of a link."""

    link: Link
    queue: deque[_Message] = field(default_factory=deque)
    busy: bool = False


class _Message(NamedTuple):
    key: tuple[str, int, int]  # kind, stage and micro-batch of the action that needs it
    traffic: Traffic
    sender: int
    receiver: int
    blocking: bool = False  # its sender waits until it has left


_NOTICE = Traffic(0)  # tells a sender that its receiver is ready


class _Step:
    """The state of one simulated step: a heap of things that end, and what may start then."""

    def __init__(
        self, stages: Sequence[Stage], links: Mapping[tuple[int, int], Link], cuts: Sequence[Cut],
        order: list[list[Action]], at: list[int], posts_receives: bool,
    ) -> None:  # fmt: skip
        self.stages, self.cuts, self.at, self.posts_receives = stages, cuts, at, posts_receives
        self.devices = [_Device(deque(actions)) for actions in order]
        self.directions: dict[tuple[int, int], _Direction] = {}
        for (a, b), link in links.items():
            self.directions[a, b], self.directions[b, a] = _Direction(link), _Direction(link)
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.ticket = itertools.count()  # ties end in the order in which they began
        self.now = 0.0
        self.arrived: set[tuple[str, int, int]] = set()  # messages, also those that stay on a device
        self.expected: set[tuple[str, int, int]] = set()  # messages for which a receive is posted
        self.noticed: set[tuple[str, int, int]] = set()  # those of which the sender knows that
        self.events: list[Event] = []

    def run(self) -> Timeline:
        for device in range(len(self.devices)):
            self._start_next(device)
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

    # -- messages --------------------------------------------------------------------------------------------------
    def _input(self, action: Action) -> _Message | None:
        """What an action needs from another stage."""
        return self._message(action, action.stage + (-1 if action.kind == FORWARD else 1), action.stage)

    def _output(self, action: Action) -> _Message | None:
        """What an action makes for another stage."""
        return self._message(action, action.stage, action.stage + (1 if action.kind == FORWARD else -1))

    def _message(self, action: Action, source: int, target: int) -> _Message | None:
        if action.kind == WEIGHT or not (0 <= source < len(self.stages) and 0 <= target < len(self.stages)):
            return None
        forward, cut = action.kind == FORWARD, self.cuts[min(source, target)]
        key = (FORWARD if forward else BACKWARD, target, action.chunk)
        traffic = cut.forward if forward else cut.backward
        return _Message(key, traffic, self.at[source], self.at[target], action.blocking)

    # -- devices ---------------------------------------------------------------------------------------------------
    def _start_next(self, number: int) -> None:
        """Start the device's next action, if the device is idle and what the action needs is there."""
        device = self.devices[number]
        if device.busy or not device.order:
            return
        action = device.order[0]
        needs, makes = self._input(action), self._output(action)
        received = needs is not None and needs.sender != number
        if needs is not None and needs.key not in self.expected:
            self.expected.add(needs.key)
            if received and not self.posts_receives:
                self._send(_Message(needs.key, _NOTICE, number, needs.sender))
        if device.unsent or (needs is not None and needs.key not in self.arrived):
            return
        device.order.popleft()
        device.busy = True
        time = self.now
        sent = makes is not None and makes.receiver != number
        for kind, seconds in (("decode", needs.traffic.decode if received else 0.0),
                              (action.kind, self._seconds(action)),
                              ("encode", makes.traffic.encode if sent else 0.0)):  # fmt: skip
            self._note(number, kind, action.stage, action.chunk, time, time + seconds)
            time += seconds
        self._after(time - self.now, lambda: self._finished(number, makes))

    def _seconds(self, action: Action) -> float:
        stage = self.stages[action.stage]
        if action.kind == FORWARD:
            return stage.forward
        return stage.backward * {BACKWARD: 1.0, INPUT: 1 - stage.weight, WEIGHT: stage.weight}[action.kind]

    def _finished(self, number: int, message: _Message | None) -> None:
        device = self.devices[number]
        device.busy = False
        if message is not None and message.receiver == number:
            self.arrived.add(message.key)
        elif message is not None:
            device.unsent += message.blocking
            self._send(message)
        self._start_next(number)

    # -- links -----------------------------------------------------------------------------------------------------
    def _send(self, message: _Message) -> None:
        self.directions[message.sender, message.receiver].queue.append(message)
        self._carry_next(message.sender, message.receiver)

    def _carry_next(self, a: int, b: int) -> None:
        """Put the first message that may leave onto the link, if the link is idle in that direction."""
        direction = self.directions[a, b]
        able = (m for m in direction.queue
                if self.posts_receives or m.traffic is _NOTICE or m.key in self.noticed)  # fmt: skip
        message = None if direction.busy else next(able, None)
        if message is None:
            return
        direction.queue.remove(message)
        direction.busy = True
        seconds = message.traffic.nbytes / direction.link.bandwidth
        kind, stage, chunk = message.key
        self._note((a, b), "send", stage, chunk, self.now, self.now + seconds)
        self._after(seconds, lambda: self._left(message))
        self._after(seconds + direction.link.latency, lambda: self._arrived(message))

    def _left(self, message: _Message) -> None:
        self.directions[message.sender, message.receiver].busy = False
        self._carry_next(message.sender, message.receiver)
        if message.blocking:
            self.devices[message.sender].unsent -= 1
            self._start_next(message.sender)

    def _arrived(self, message: _Message) -> None:
        if message.traffic is _NOTICE:
            self.noticed.add(message.key)
            self._carry_next(message.receiver, message.sender)
        else:
            self.arrived.add(message.key)
            self._start_next(message.receiver)
