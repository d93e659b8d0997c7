"""What the first rank tells the others about a batch before a step: masks, sample ids, labels, how many rows count.

Only rank 0 reads data.  Everything else that a stage needs goes out in one small message, a step ahead: side inputs
(masks in one bit per value) and ids to all, labels to the rank of the last stage.  Inputs stay where they are.  It
knows neither stages nor codecs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .links import Links

FIRST, REST = 1, 2  # tags
CAPACITY = 4096
LENGTH = struct.Struct("<I")


@dataclass
class Batch:
    """One step's batch as a rank sees it.

    inputs, extra: of the first stage, on rank 0 alone; side: of every stage; labels: of the last stage.
    ids: of the samples, -1 for rows that only fill up; valid: rows that count; shape: of the inputs.
    """

    shape: tuple[int, ...]
    ids: Tensor
    valid: int
    side: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    inputs: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


class Feed:
    """The batches of rank 0 on every rank.

    labels_to: the rank of the last stage.
    """

    def __init__(self, links: Links, rank: int, size: int, labels_to: int) -> None:
        self.links, self.rank, self.size, self.labels_to = links, rank, size, labels_to
        self._rooms: dict[int, int] = {}
        self._sent: list[Tensor] = []

    def batches(self, source: Iterable[Batch] | None) -> Iterator[Batch]:
        """source: rank 0's batches; the other ranks give None and get what they need of the same ones."""
        if self.rank == 0:
            yield from self._giving(iter(source or ()))
        else:
            yield from self._taking()

    def _giving(self, source: Iterator[Batch]) -> Iterator[Batch]:
        following = next(source, None)
        self._send(following)
        while following is not None:
            batch, following = following, next(source, None)
            self._send(following)
            yield batch
        self.links.flush()

    def _taking(self) -> Iterator[Batch]:
        self._expect()
        while True:
            message = self._receive()
            if message is None:
                return
            self._expect()
            yield message

    # -- messages ------------------------------------------------------------------------------------------------
    def _send(self, batch: Batch | None) -> None:
        for peer in range(1, self.size):
            data = pack(batch, labels=peer == self.labels_to)
            room = self._rooms.get(peer, CAPACITY)
            what = f"Rank 0, a batch's side inputs to rank {peer}"
            self.links.send(_buffer(data[:room], room), peer, FIRST, what)
            if len(data) > room:
                self.links.send(_buffer(data[room:], len(data) - room), peer, REST, what)
            self._rooms[peer] = max(room, _room(len(data)))

    def _expect(self) -> None:
        self._what = f"Rank {self.rank}, a batch's side inputs from rank 0"
        buffer = torch.empty(self._rooms.get(0, CAPACITY), dtype=torch.uint8)
        self.links.expect(buffer, 0, FIRST, self._what)

    def _receive(self) -> Batch | None:
        data = bytes(self.links.collect(FIRST).numpy())
        (length,) = LENGTH.unpack_from(data)
        room = len(data)
        if length > room:
            self.links.expect(torch.empty(length - room, dtype=torch.uint8), 0, REST, self._what)
            data += bytes(self.links.collect(REST).numpy())
        self._rooms[0] = max(room, _room(length))
        return unpack(data)


def _room(length: int) -> int:
    """Both sides make room for a message as long as the longest so far."""
    return max(CAPACITY, 1 << (length - 1).bit_length())


def _buffer(data: bytes, size: int) -> Tensor:
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)


def pack(batch: Batch | None, labels: bool) -> bytes:
    """A message: its length, what it holds as JSON, and the tensors; an end if there is no batch."""
    if batch is None:
        head: dict[str, Any] = {"end": True}
        parts: list[bytes] = []
    else:
        tensors = {"ids": batch.ids, **{f"side/{name}": value for name, value in batch.side.items()}}
        if labels and batch.labels is not None:
            tensors["labels"] = batch.labels
        head, parts = {"shape": batch.shape, "valid": batch.valid, "tensors": []}, []
        for name, value in tensors.items():
            array = value.detach().cpu().contiguous().numpy()
            flags = array.size > 0 and array.dtype.kind in "biu" and bool(((array == 0) | (array == 1)).all())
            parts.append(np.packbits(array.astype(bool)).tobytes() if flags else array.tobytes())
            head["tensors"].append([name, array.dtype.str, array.shape, flags, len(parts[-1])])
    text = json.dumps(head).encode()
    body = LENGTH.pack(len(text)) + text + b"".join(parts)
    return LENGTH.pack(LENGTH.size + len(body)) + body


def unpack(data: bytes) -> Batch | None:
    (size,) = LENGTH.unpack_from(data, LENGTH.size)
    at = 2 * LENGTH.size + size
    head = json.loads(data[2 * LENGTH.size : at])
    if head.get("end"):
        return None
    found: dict[str, Tensor] = {}
    for name, kind, shape, flags, length in head["tensors"]:
        count = int(np.prod(shape))
        if flags:
            array = np.unpackbits(np.frombuffer(data, np.uint8, length, at), count=count).astype(kind)
        else:
            array = np.frombuffer(data, kind, count, at).copy()
        found[name], at = torch.from_numpy(array.reshape(shape)), at + length
    side = {name.removeprefix("side/"): value for name, value in found.items() if name.startswith("side/")}
    return Batch(tuple(head["shape"]), found["ids"], head["valid"], side, found.get("labels"))
