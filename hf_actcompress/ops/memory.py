"""Memory for what is decoded.

A large new tensor on a CPU costs more in page faults than in arithmetic: most of the time of x.clone() for 64 MiB is
the first touch of its 16384 pages.  On Linux pages of 2 MiB take less, where they are asked for and at hand
(benchmarks/operators.py).  Least of all takes memory that was touched before: a `Pool`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# From this size on glibc maps each tensor anew, whatever was freed before, and unmaps it afterwards: the advice goes
# with it.
MAPPED = 32 << 20
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE, MADV_NOHUGEPAGE = 14, 15
DEAR = 1e-3  # seconds for a huge page; usual are 0.1 to 0.3, of which most goes into filling it with zeros
PAUSE = 10.0  # seconds for which no huge pages are asked for after they were dear
POOLED = 1 << 20  # bytes; less comes from the heap
UNIT = 2 << 20  # the pool's pieces are multiples of this, so that tensors of about the same size fit into one

_active = threading.local()
_pause_until = 0.0


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def fresh(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty flat tensor: from the pool that is in use, else on huge pages where it is large enough to gain from
    them and the system has them."""
    size, pool = n * dtype.itemsize, getattr(_active, "pool", None)
    if pool is not None and size >= POOLED and device.type == "cpu":
        return pool.take(n, dtype)
    out = torch.empty(n, dtype=dtype, device=device)
    if size > MAPPED and out.device.type == "cpu":
        _touch(out.data_ptr(), size)
    return out


def _touch(address: int, size: int) -> None:
    """Puts new memory on huge pages, where the system has them at hand.

    One thread touches every page before several write: when they meet in one they wait for each other, which takes
    longer than small pages would.  Where memory is in pieces, or a virtual machine has given it back to its host, a
    huge page takes milliseconds, twenty times as long as usual: then the rest stays on small pages.
    """
    global _pause_until
    advise = _madvise()
    if advise is None or time.monotonic() < _pause_until:
        return
    begin, end = -(-address // HUGE_PAGE) * HUGE_PAGE, (address + size) // HUGE_PAGE * HUGE_PAGE
    if begin >= end:
        return
    advise(begin, end - begin, MADV_HUGEPAGE)  # where this is not taken, all goes on as before
    dear = 0
    for page in range(begin, end, HUGE_PAGE):
        began = time.perf_counter()
        ctypes.memset(page, 0, 1)
        dear += time.perf_counter() - began > DEAR
        if dear == 2:  # one alone may be another program's turn
            advise(page + HUGE_PAGE, end - page - HUGE_PAGE, MADV_NOHUGEPAGE)
            _pause_until = time.monotonic() + PAUSE
            return


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a CPU (where torch raises a plain RuntimeError) or elsewhere."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    cause = error.__cause__
    return "can't allocate memory" in str(error) or (cause is not None and is_out_of_memory(cause))


class Pool:
    """Memory on a CPU that tensors which do not live at the same time have in turn.

    A backward pass decodes dozens of tensors and needs one or two at a time.  malloc gives their pages back to the
    system in between, as it sees large pieces come and go.  What a tensor of the pool lies in is free again when
    neither it nor a view of it is left.  All memory goes with the pool.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[Tensor, weakref.ref[memoryview]]] = []
        self._lock = threading.Lock()  # several threads may go backward through one graph

    @property
    def nbytes(self) -> int:
        return sum(len(piece) for piece, _ in self._pieces)

    def take(self, n: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised flat tensor of `n` elements."""
        size = n * dtype.itemsize
        if not size:
            return torch.empty(0, dtype=dtype)
        with self._lock:
            free = sorted((entry for entry in self._pieces if entry[1]() is None), key=lambda entry: len(entry[0]))
            fitting = next((entry for entry in free if len(entry[0]) >= size), None)
            # A larger piece takes the place of the largest that is too small.
            old = fitting or (free[-1] if free else None)
            self._pieces = [entry for entry in self._pieces if entry is not old]
            piece = fitting[0] if fitting else torch.empty(-(-size // UNIT) * UNIT, dtype=torch.uint8)
            use = memoryview(piece.numpy())
            self._pieces.append((piece, weakref.ref(use)))
            return torch.frombuffer(use, dtype=dtype, count=n)  # keeps `use` as long as its storage lives

    @contextmanager
    def used(self) -> Iterator[None]:
        """While this lasts, `fresh` takes from here (in this thread)."""
        before = getattr(_active, "pool", None)
        _active.pool = self
        try:
            yield
        finally:
            _active.pool = before
