"""What rank 0 sends to the others about each batch: side inputs, sample ids, labels, the number of valid rows.

Only rank 0 reads data.  The other ranks get what their stages need in one small message, one step ahead: side inputs
(masks in one bit a value) and ids go to all, labels to the rank of the last stage.  The inputs themselves are not
sent.  It knows neither stages nor codecs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import Batch
from .frames import HEADER, framed, number_of, seal, unseal
from .links import Links

FIRST, REST = 1, 2  # tags
CAPACITY = 4096
LENGTH = struct.Struct("<I")


class BatchLink:
    """Brings the batches of rank 0 to every rank.

    labels_to: the rank of the last stage.
    checksum: whether messages are protected by a crc32; alike on all ranks.
    """

    def __init__(self, links: Links, rank: int, size: int, labels_to: int, checksum: bool = True) -> None:
        self.links, self.rank, self.size, self.labels_to, self.checksum = links, rank, size, labels_to, checksum
        self._capacities: dict[int, int] = {}
        self._batches = 0

    def batches(self, source: Iterable[Batch] | None) -> Iterator[Batch]:
        """Rank 0 gives its batches as `source`, the others None; they get the same batches without the inputs."""
        if self.rank == 0:
            yield from self._send_all(iter(source or ()))
        else:
            yield from self._receive_all()

    def _send_all(self, source: Iterator[Batch]) -> Iterator[Batch]:
        following = next(source, None)
        self._send(following)
        while following is not None:
            batch, following = following, next(source, None)
            self._send(following)
            yield batch
        self.links.flush()

    def _receive_all(self) -> Iterator[Batch]:
        self._expect()
        while True:
            message = self._receive()
            if message is None:
                return
            self._expect()
            yield message

    # -- messages ------------------------------------------------------------------------------------------------
    def _send(self, batch: Batch | None) -> None:
        self._batches += 1
        for peer in range(1, self.size):
            data = pack(batch, labels=peer == self.labels_to)
            capacity = self._capacities.get(peer, CAPACITY)
            what = f"Rank 0, side inputs of batch {self._batches} to rank {peer}"
            self._send_part(data[:capacity], capacity, peer, FIRST, what)
            if len(data) > capacity:
                self._send_part(data[capacity:], len(data) - capacity, peer, REST, what)
            self._capacities[peer] = max(capacity, _capacity(len(data)))

    def _send_part(self, data: bytes, size: int, peer: int, tag: int, what: str) -> None:
        buffer = framed(data, size)
        seal(buffer, number_of(self._batches, tag), checksum=self.checksum)
        self.links.send(buffer, peer, tag, what)

    def _expect(self) -> None:
        self._batches += 1
        self._expect_part(self._capacities.get(0, CAPACITY), FIRST)

    def _expect_part(self, size: int, tag: int) -> None:
        self._what = f"Rank {self.rank}, side inputs of batch {self._batches} from rank 0"
        self.links.expect(torch.empty(HEADER + size, dtype=torch.uint8), 0, tag, self._what)

    def _collect(self, tag: int) -> bytes:
        buffer = self.links.collect(tag)
        unseal(buffer, number_of(self._batches, tag), where=self._what, checksum=self.checksum)
        return bytes(buffer[HEADER:].numpy())

    def _receive(self) -> Batch | None:
        data = self._collect(FIRST)
        (length,) = LENGTH.unpack_from(data)
        if length > len(data):
            self._expect_part(length - len(data), REST)
            data += self._collect(REST)
        self._capacities[0] = max(len(data), _capacity(length))
        return unpack(data)


def _capacity(length: int) -> int:
    """Bytes of the next buffer: both sides are prepared for a message as long as the longest so far."""
    return max(CAPACITY, 1 << (length - 1).bit_length())


def pack(batch: Batch | None, labels: bool) -> bytes:
    """A message: its length, a description in JSON, the tensors; without a batch it says that there are no more."""
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
