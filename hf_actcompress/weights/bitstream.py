"""Integers of few bits as bytes, and ascending positions as gaps.

Counted bits and stored bytes both come from here, so that they agree.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
RUN = 1 << 20  # codes that are expanded at once; a multiple of 8, so that runs end at whole bytes


def width_of(k: int) -> int:
    """Bits of a code with k values: ceil(log2 k)."""
    return max(k - 1, 0).bit_length()


def nbytes(count: int, width: int) -> int:
    return -(-count * width // 8)


def pack(codes: Ints, width: int) -> NDArray[np.uint8]:
    """codes [n] below 2**width -> ceil(n * width / 8) bytes, low bits first."""
    shifts = np.arange(width)
    runs = [np.packbits((codes[i : i + RUN, None] >> shifts & 1).astype(np.uint8), bitorder="little")
            for i in range(0, len(codes), RUN)]  # fmt: skip
    return np.concatenate(runs) if runs and width else np.zeros(0, np.uint8)


def unpack(packed: NDArray[np.uint8], count: int, width: int) -> Ints:
    """Inverse of `pack`.  Raises ValueError where `packed` is too short."""
    if count < 0 or len(packed) < nbytes(count, width):
        raise ValueError(f"{count} codes of {width} bits do not fit into {len(packed)} bytes")
    out, shifts = np.zeros(count, np.int64), np.arange(width)
    for i in range(0, count if width else 0, RUN):
        m = min(RUN, count - i)
        bits = np.unpackbits(packed[i * width // 8 :][: nbytes(m, width)], count=m * width, bitorder="little")
        out[i : i + m] = (bits.reshape(m, width).astype(np.int64) << shifts).sum(1)
    return out


# A position is stored as the number of places skipped since the one before.  In a field of w bits the largest code,
# 2**w - 1, is an escape: skip as many places and read on.


def gap_width(positions: Ints) -> tuple[int, int]:
    """(field width, number of fields) of the fewest bits.  Width 0: nothing is ever skipped."""
    skips = np.diff(positions, prepend=-1) - 1
    if not skips.any():
        return 0, len(positions)
    fields = {w: len(positions) + int((skips // (2**w - 1)).sum()) for w in range(1, 33)}
    best = min(fields, key=lambda w: w * fields[w])
    return best, fields[best]


def to_gaps(positions: Ints, width: int) -> Ints:
    skips = np.diff(positions, prepend=-1) - 1
    if width == 0:
        return np.zeros(len(positions), np.int64)
    top = 2**width - 1
    escapes = skips // top
    codes = np.full(len(positions) + int(escapes.sum()), top, np.int64)
    codes[np.cumsum(escapes + 1) - 1] = skips - escapes * top
    return codes


def from_gaps(codes: Ints, width: int) -> Ints:
    if width == 0:
        return np.arange(len(codes))
    escape = codes == 2**width - 1
    return np.cumsum(codes + ~escape)[~escape] - 1
