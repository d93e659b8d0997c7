"""A tensor seen as rows of equal length, the last one shorter.

The row codecs (uniform, block) work on matrices whose rows are groups.  The full rows are a view of the tensor where
its memory allows; a short last row is padded to a multiple of 8 with its last value, which changes no minimum and
no maximum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .compiled import Kernel
from .layout import in_memory_order, restored
from .packing import ceil8

# An eager chain of elementwise operations on a tile of this many elements stays in the cache of a CPU core.  GPUs
# prefer one launch for all.
TILE = 1 << 17
COLS = 128  # elements per row where rows are only a unit of packing and share no scale; few tensors leave a tail


@dataclass(frozen=True)
class Part:
    """Groups that one call of a kernel takes: a run of a flat tensor as a grid [N, K, C].

    K groups make a period, after which a table of features repeats.  A tensor has up to three parts: whole periods,
    the groups of a last broken period [1, r, C], and a last short group [1, 1, c], which is padded.
    """

    shape: tuple[int, int, int]
    start: int  # of its first element in the tensor
    numel: int  # of the tensor's elements in it
    table: int  # where in the period it begins

    @property
    def groups(self) -> int:
        return self.shape[0] * self.shape[1]

    def take(self, flat: Tensor) -> Tensor:
        """Its elements of `flat` as [N, K, C]; a short group is filled with its last value."""
        return _filled(flat[self.start : self.start + self.numel], self.shape)

    def features(self, table: Tensor | None) -> Tensor | None:
        """Its piece [K, C] of a period's table (flat)."""
        if table is None:
            return None
        _, k, c = self.shape
        return _filled(table[self.table : self.table + min(k * c, self.numel)], (k, c))


def _filled(run: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = -run.numel() % shape[-1]
    return (torch.cat([run, run[-1:].expand(missing)]) if missing else run).view(shape)


@functools.lru_cache(4096)  # the same shapes come every step
def parts(n: int, cols: int, period: int = 1, pad_to: int = 0) -> tuple[Part, ...]:
    """How `n` elements fall into groups of `cols` and periods of `period` groups.

    A last short group is padded to a multiple of 8, or to `pad_to`.
    """
    full, result = n // cols, []
    whole, rest = divmod(full, period)
    if whole:
        result.append(Part((whole, period, cols), 0, whole * period * cols, 0))
    if rest:
        result.append(Part((1, rest, cols), whole * period * cols, rest * cols, 0))
    if n % cols:
        result.append(Part((1, 1, pad_to or ceil8(n % cols)), full * cols, n % cols, rest * cols))
    return tuple(result)


def codes_nbytes(n: int, bits: int) -> int:
    """Bytes of `n` packed codes in rows of COLS."""
    return sum(part.groups * part.shape[2] * bits // 8 for part in parts(n, COLS))


def encode_parts(
    kernel: Kernel, x: Tensor, shared: Sequence[Tensor], native_form: Callable[[Tensor], Tensor | None] | None = None,
    **static: Any,
) -> list[Tensor]:  # fmt: skip
    """The kernel's first result for every part of `x` in rows of COLS, flat.

    native_form: does the same where it can, else gives None.
    """
    flat, pieces = x.reshape(-1), []
    for part in parts(x.numel(), COLS):
        run = part.take(flat)
        found = None if native_form is None else native_form(run)
        pieces.append((apply(kernel, run, shared=shared, **static)[0] if found is None else found).view(-1))
    return pieces


def roundtrip_parts(kernel: Kernel, x: Tensor, shared: Sequence[Tensor], **static: Any) -> Tensor:
    """What the kernel makes of each value by itself, as `x`, in whatever order that lies in memory."""
    return restored(join(encode_parts(kernel, in_memory_order(x), shared, **static))[: x.numel()], x)


def decode_parts(
    kernel: Kernel, codes: Tensor, shape: tuple[int, ...], width: int, shared: Sequence[Tensor],
    per_byte: Sequence[Tensor] = (), native_form: Callable[[Tensor], Tensor | None] | None = None, **static: Any,
) -> Tensor:  # fmt: skip
    """Codes in rows of COLS -> what the kernel makes of them, as a tensor of that shape.

    width: bits per code.  per_byte: tensors with one entry for each byte of the codes.
    native_form: does the same where it can, else gives None.
    """
    pieces, at, total = [], 0, math.prod(shape)
    for part in parts(total, COLS):
        n, k, c = part.shape
        nbytes = c * width // 8
        own, *rows = (t[at : at + n * k * nbytes].view(n, k, nbytes) for t in (codes, *per_byte))
        found = None if native_form is None else native_form(own)
        if found is None:
            found, = apply(kernel, own, rows, shared=shared, cols=c, **static)
        pieces.append(found.view(-1))
        at += n * k * nbytes
    return join(pieces)[:total].view(shape)


def join(pieces: list[Tensor]) -> Tensor:
    """One after another; a single piece without a copy."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def counters(part: Part, device: torch.device) -> Tensor:
    """int32 [N, K, 1]: the index of each group's first element in the tensor, modulo 2**32."""
    n, k, c = part.shape
    first = part.start + torch.arange(n * k, device=device, dtype=torch.int64) * c
    return (first & 0xFFFFFFFF).to(torch.int32).view(n, k, 1)  # int64 -> int32 keeps the low bits


def blocks(
    n: int, k: int, cols: int, device: torch.device, size: int | None = None
) -> Iterator[tuple[slice, slice]]:
    """Consecutive runs of groups, about `size` elements (TILE) each, that are best processed at once on a CPU."""
    if device.type != "cpu":
        yield slice(0, n), slice(0, k)
        return
    wide = max(1, (size or TILE) // cols)
    high = max(1, wide // k)
    for i in range(0, n, high):
        for j in range(0, k, wide):
            yield slice(i, min(n, i + high)), slice(j, min(k, j + wide))


def apply(
    kernel: Kernel, x: Tensor, rows: Sequence[Tensor | None] = (), tables: Sequence[Tensor | None] = (),
    shared: Sequence[Tensor | None] = (), cols: int | None = None, compilable: bool = True, **static: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """kernel(x, *rows, *tables, *shared): in one compiled call, or eager in tiles that fit a cache.

    x and rows are [N, K, ...], tables [K, ...]; so are the results, which do not depend on which way was taken.
    cols: elements per group where x holds codes.  compilable: False where a compiled kernel would be no better.
    """
    tag = tuple(arg is None for arg in (*rows, *tables, *shared))
    compiled = kernel.choose(x, *tag, **static) if compilable else None
    if compiled is not None:
        return compiled(x, *rows, *tables, *shared)
    results: list[Tensor] = []
    for n, k in blocks(*x.shape[:2], cols or x.shape[2], x.device):
        own = [None if row is None else row[n, k] for row in rows]
        own += [None if table is None else table[k] for table in tables]
        part = kernel(x[n, k], *own, *shared, **static)
        if part[0].shape[:2] == x.shape[:2]:
            return part
        results = results or [piece.new_empty(*x.shape[:2], *piece.shape[2:]) for piece in part]
        for whole, piece in zip(results, part, strict=True):
            whole[n, k] = piece
    return tuple(results)
