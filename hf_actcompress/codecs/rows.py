"""A tensor seen as rows of equal length, the last one shorter.

The row codecs (uniform, block) work on matrices whose rows are groups.  The full rows are a view of the tensor where
its memory allows; a short last row is padded to a multiple of 8 with its last value, which changes no minimum and
no maximum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .packing import ceil8

# An eager chain of elementwise operations on a tile of this many elements stays in the cache of a CPU core.  GPUs
# prefer one launch for all.
TILE = 1 << 17


def row_pieces(flat: Tensor, cols: int, pad_to: int = 0) -> list[Tensor]:
    """`flat` [n] -> [full rows [n // cols, cols]] + [tail [1, c]], c the tail rounded up to 8 (or `pad_to`)."""
    n = flat.numel()
    full = n // cols
    pieces = [flat[: full * cols].view(full, cols)] if full else []
    if n - full * cols:
        tail = flat[full * cols :]
        width = pad_to or ceil8(tail.numel())
        pieces.append(torch.cat([tail, tail[-1:].expand(width - tail.numel())]).view(1, width))
    return pieces


def piece_shapes(n: int, cols: int, pad_to: int = 0) -> list[tuple[int, int]]:
    """The shapes that `row_pieces` would give."""
    full, tail = divmod(n, cols)
    shapes = [(full, cols)] if full else []
    if tail:
        shapes.append((1, pad_to or ceil8(tail)))
    return shapes


def tiles(rows: int, cols: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """(start, stop) of row blocks that an eager chain should process at once."""
    step = max(1, TILE // cols) if device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
