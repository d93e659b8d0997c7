"""The frame of every message between ranks: a header of 64 bytes in front of the body, in one uint8 buffer.

    magic, version, flags, fingerprint, number, bytes of the body, crc32 of all of it

The number is made of step and micro-batch, the fingerprint of what both sides must have in common (codec, shape,
dtype).  The checksum covers the header, too.
"""

from __future__ import annotations

import os
import struct
import zlib

import torch
from torch import Tensor

MAGIC = b"hfac"
VERSION = 2
LAYOUT = struct.Struct("<4sHHIIQI")
HEADER = 64  # so that the tensors behind it are aligned
CHUNKS = 4096


class WireError(RuntimeError):
    """A message that is not the expected one: damaged, out of order, or of another codec or shape."""


def number_of(step: int, chunk: int = 0) -> int:
    return (step * CHUNKS + chunk) & 0xFFFFFFFF


def framed(body: bytes | Tensor, size: int | None = None) -> Tensor:
    """A buffer with room for a header in front of `body` (bytes, or a uint8 tensor), filled up to `size` bytes."""
    length = len(body) if isinstance(body, bytes) else body.numel()
    buffer = torch.zeros(HEADER + (length if size is None else size), dtype=torch.uint8)
    if length:
        buffer[HEADER : HEADER + length] = (
            torch.frombuffer(bytearray(body), dtype=torch.uint8) if isinstance(body, bytes) else body
        )
    return buffer


def seal(buffer: Tensor, number: int, fingerprint: int = 0, flags: int = 0, checksum: bool = True) -> None:
    """Write the header of `buffer` (uint8, in host memory) in front of its body."""
    head = LAYOUT.pack(MAGIC, VERSION, flags, fingerprint, number, buffer.numel() - HEADER, 0).ljust(HEADER, b"\0")
    if checksum:
        head = _with_sum(head, _sum(head, buffer))
    buffer[:HEADER] = torch.frombuffer(bytearray(head), dtype=torch.uint8)


def unseal(buffer: Tensor, number: int, fingerprint: int = 0, where: str = "link", checksum: bool = True,
           what: str = "") -> int:  # fmt: skip
    """The flags of the message in `buffer`, once it is known to be the expected one.

    what: what this side expects, for the error.  Raises WireError, which begins with `where`.
    """
    head = bytes(buffer[:HEADER].numpy())
    magic, version, flags, theirs, found, length, total = LAYOUT.unpack(head[: LAYOUT.size])
    if magic != MAGIC:
        raise WireError(
            f"{where}: the message does not begin as a payload does ({magic!r}). The peer sends something else, or "
            "the two sides are out of step."
        )
    if version != VERSION:
        raise WireError(f"{where}: the peer uses version {version} of the format, this side {VERSION}.")
    if theirs != fingerprint or length != buffer.numel() - HEADER:
        raise WireError(
            f"{where}: the peer uses another codec, shape or dtype than this side ({what or f'{length} bytes'}). Give "
            "both sides the same configuration and model."
        )
    if found != number:
        raise WireError(f"{where}: message {found} arrived instead of {number}: the sides are out of step.")
    if checksum and (own := _sum(_with_sum(head, 0), buffer)) != total:
        raise WireError(f"{where}: the payload was damaged on its way (checksum {own:#010x}, {total:#010x} was sent).")
    return flags


def over_network() -> bool:
    """Whether messages leave this machine, by the launcher's address: checksums are then on by default."""
    address = os.environ.get("MASTER_ADDR", "")
    return not (address == "localhost" or address.startswith("127.") or address == "::1")


def _with_sum(head: bytes, total: int) -> bytes:
    return head[: LAYOUT.size - 4] + struct.pack("<I", total) + head[LAYOUT.size :]


def _sum(head: bytes, buffer: Tensor) -> int:
    return zlib.crc32(buffer[HEADER:].numpy(), zlib.crc32(head))
