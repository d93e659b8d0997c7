"""The mean of a tensor over processes, with payloads of a codec on the links.

    rank 0   [a0 b0] ─encode─▶ a0│b0 ╲╱ a0│a1 ─decode, add─▶ A ─encode─▶ A ═▶ A│B ─decode─▶ [A B]
    rank 1   [a1 b1] ─encode─▶ a1│b1 ╱╲ b0│b1 ─decode, add─▶ B ─encode─▶ B ═▶ A│B ─decode─▶ [A B]
                                 all-to-all                            all-gather

Each rank adds up one chunk.  It sends 2 (W - 1) / W payloads of the tensor, as a ring sends of the raw one, where an
all-gather of every rank's payload would send W - 1.  All ranks decode the same bytes, so they get the same mean to the
last bit.  The codec's state is kept for each chunk on its way there, and for the own chunk on its way back: error
feedback makes up for both roundings.

It knows tensors and a process group, and neither modules nor DDP.
Source: the two-sided compression of 1-bit Adam (Tang et al., 2021) with a codec of one's choice.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..codecs import Codec, CodecState, Payload
from ..codecs.payload import all_tensors
from .transport import Transport

Steps = Generator[Future, None, None]  # yields what it waits for
END: Any = object()

ACTIVE = 3  # pieces under way
PIECE = 1 << 22  # values of a piece
ALIGNED = 1024  # chunks are multiples of it, so that groups and packed codes fill them
LEAST = 4096  # a smaller tensor is sent as it is


class Exchange:
    """Means over the processes of `group`.

    codec: of the tensors; error feedback (`ef+...`) and stochastic rounding keep their state here.
    seed: of stochastic rounding, another on every rank.
    `sent` and `plain` count the bytes that this rank has sent, and what a ring all-reduce would have.
    """

    def __init__(self, codec: Codec, group: dist.ProcessGroup | None = None, seed: int = 0) -> None:
        self.codec, self.group, self.seed = codec, group, seed
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.sent = self.plain = 0
        self.transport = Transport(group, ACTIVE)
        self._states: dict[str, CodecState | None] = {}
        self._waiting: dict[str, Any] = {}  # of a checkpoint, for states that are not there yet

    def mean(self, name: str, x: Tensor) -> Tensor:
        """The mean over ranks of `x` [n], which stays as it is.

        name: of the tensor, alike on all ranks and in all steps.
        """
        y = torch.empty_like(x)
        run(self.pieces(name, x, y))
        return y

    def pieces(self, name: str, x: Tensor, y: Tensor) -> Iterator[Steps]:
        """The work of `mean` into `y`, in pieces of which several can be under way: one is coded while another is on
        the link."""
        if x.numel() < LEAST or self.size == 1:
            yield self._plain_mean(name, x, y)
            return
        for number, (part, into) in enumerate(zip(x.split(PIECE), y.split(PIECE), strict=True)):
            yield self._mean(f"{name}/{number}", part, into)

    def scatter(self, name: str, x: Tensor) -> Tensor:
        """The sum over ranks of chunk `rank` of `x` [size * m]: [m].  Only the way there."""
        self._count(x, 1)
        found: list[Tensor] = []
        run(iter([self._sum(name, x, found, x.numel() // self.size)]))
        return found[0]

    def _plain_mean(self, name: str, x: Tensor, y: Tensor) -> Steps:
        self._count(x, 2)
        every = x.new_empty(self.size, x.numel())
        data = x.contiguous().view(torch.uint8)
        yield self.transport.swap([data] * self.size, list(every.view(torch.uint8)), _tag(name, 0))
        self.sent += (self.size - 1) * x.nbytes
        torch.mean(every, 0, out=y)

    def _mean(self, name: str, x: Tensor, y: Tensor) -> Steps:
        self._count(x, 2)
        found: list[Tensor] = []
        yield from self._sum(name, x, found)
        payload = self.codec.encode(found[0].div_(self.size), self._state(f"{name}/back"))
        buffer = _packed(payload)
        every = buffer.new_empty(self.size, buffer.numel())
        yield self.transport.swap([buffer] * self.size, list(every), _tag(name, 1))
        self.sent += (self.size - 1) * buffer.numel()
        for part, into in zip(every, y.split(found[0].numel()), strict=False):
            into.copy_(self.codec.decode(_unpacked(payload, part))[: into.numel()])

    def _sum(self, name: str, x: Tensor, found: list[Tensor], length: int | None = None) -> Steps:
        """Append the sum over ranks of the chunk of this rank: `length` values, or as many as fill whole groups."""
        if length is None:
            length = -(-x.numel() // (self.size * ALIGNED)) * ALIGNED
        fill = self.size * length - x.numel()
        chunks = (torch.cat([x, x.new_zeros(fill)]) if fill else x).chunk(self.size)
        payloads = [self.codec.encode(c, self._state(f"{name}/{k}")) for k, c in enumerate(chunks)]
        outgoing = [_packed(payload) for payload in payloads]
        incoming = [torch.empty_like(one) for one in outgoing]
        yield self.transport.swap(outgoing, incoming, _tag(name, 0))
        self.sent += outgoing[0].numel() * (self.size - 1)
        parts = [self.codec.decode(_unpacked(payloads[0], part)) for part in incoming]
        for part in parts[1:]:
            parts[0] += part
        found.append(parts[0])

    def _count(self, x: Tensor, ways: int) -> None:
        self.plain += ways * (self.size - 1) * x.nbytes // self.size

    def close(self) -> None:
        self.transport.close()

    # -- state -------------------------------------------------------------------------------------------------
    def _state(self, name: str) -> CodecState | None:
        if name not in self._states:
            state = self._states[name] = self.codec.init_state(name, self.seed)
            if state is not None and name in self._waiting:
                state.load_state_dict(self._waiting.pop(name))
        return self._states[name]

    def state_dict(self) -> dict[str, Any]:
        """What the codec remembers, by tensor and chunk: with error feedback as many values as the gradient has."""
        found = {name: state.state_dict() for name, state in self._states.items() if state is not None}
        return {**self._waiting, **found}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._states.clear()
        self._waiting = dict(values)


def run(pieces: Iterator[Steps | None], done: Callable[[Steps], None] = lambda steps: None) -> None:
    """Carry out pieces of work, of which ACTIVE are under way at a time.

    pieces: None stands for a piece that is not there yet; it is asked for only where others can go on.
    done: called with each piece that has ended.
    """
    active: deque[tuple[Steps, Future[None]]] = deque()
    more = True
    while more or active:
        if more and len(active) < ACTIVE:
            steps = next(pieces, END)
            more = steps is not END
            if more and steps is not None:
                _advance(steps, active, done)
                continue
        if active:
            steps, swap = active.popleft()
            swap.result()
            _advance(steps, active, done)


def _advance(steps: Steps, active: deque, done: Callable[[Steps], None]) -> None:
    swap = next(steps, None)
    if swap is None:
        done(steps)
    else:
        active.append((steps, swap))


def _tag(name: str, way: int) -> int:
    """Of an exchange, alike on all ranks."""
    return zlib.crc32(f"{name} {way}".encode()) & 0x3FFFFFFF


def _packed(payload: Payload) -> Tensor:
    """The payload's tensors as bytes, one after the other."""
    return torch.cat([x.contiguous().reshape(-1).view(torch.uint8) for x in all_tensors(payload)])


def _unpacked(template: Payload, data: Tensor) -> Payload:
    """A payload like `template`, of the bytes in `data`."""
    at = 0

    def like(one: Payload) -> Payload:
        nonlocal at
        tensors = {}
        for name, x in one.tensors.items():
            part = data[at : at + x.nbytes]
            if part.storage_offset() % x.element_size():
                part = part.clone()
            tensors[name], at = part.view(x.dtype).view(x.shape), at + x.nbytes
        parts = {name: like(inner) for name, inner in one.parts.items()}
        return Payload(one.codec, one.shape, one.dtype, tensors, parts)

    return like(template)
