"""Memory for what is decoded.

A large new tensor on a CPU costs more in page faults than in arithmetic: most of the time of x.clone() for 64 MiB is
the first touch of its 16384 pages.  On Linux pages of 2 MiB take less, where they are asked for
(benchmarks/kernels.py).  Least of all takes memory that was touched before: a `Pool`.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

# From this size on glibc maps each tensor anew, whatever was freed before, and unmaps it afterwards: the advice goes
# with it.
MAPPED = 32 << 20
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14
PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
POOLED = 1 << 20  # bytes; less comes from the heap

_active = threading.local()


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
    if size > MAPPED and out.device.type == "cpu" and (advise := _madvise()) is not None:
        first = -out.data_ptr() % HUGE_PAGE
        # Only advice: where it is not taken, all goes on as before.
        # One thread touches every page before several write: when they meet in one they wait for each other, which
        # takes longer than small pages would.
        advise(out.data_ptr() + first, (size - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        out[first // out.element_size() :: HUGE_PAGE // out.element_size()] = 0
    return out


def _huge(size: int) -> mmap.mmap:
    """New memory on huge pages where there are some, touched."""
    # Private, as huge pages are rarely had for shared memory, which Python would make.
    piece = mmap.mmap(-1, size, flags=PRIVATE) if PRIVATE else mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            piece.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(piece, dtype=torch.uint8)[::HUGE_PAGE] = 0
    return piece


class Pool:
    """Memory on a CPU that tensors which do not live at the same time have in turn.

    A backward pass decodes dozens of tensors and needs one or two at a time.  malloc gives their pages back to the
    system in between, as it sees large pieces come and go.  What a tensor of the pool lies in is free again when
    neither it nor a view of it is left.  All memory goes with the pool.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[mmap.mmap, weakref.ref[memoryview]]] = []
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
            if fitting is not None:
                self._pieces.remove(fitting)
                piece = fitting[0]
            else:
                if free:  # too small: a larger one takes its place
                    self._pieces.remove(free[-1])
                piece = _huge(-(-size // HUGE_PAGE) * HUGE_PAGE)
            use = memoryview(piece)
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
