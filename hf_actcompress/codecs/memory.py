"""Memory for what is decoded.

A large new tensor on a CPU costs more in page faults than in arithmetic: most of the time of x.clone() for 64 MiB is
the first touch of its 16384 pages.  On Linux pages of 2 MiB take less, where they are asked for
(benchmarks/kernels.py).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

# From this size on glibc maps each tensor anew, whatever was freed before, and unmaps it afterwards: the advice goes
# with it.  Smaller tensors come back from the heap with their pages in place.
MAPPED = 32 << 20
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14


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
    """An empty flat tensor, on huge pages where it is large enough to gain from them and the system has them."""
    out = torch.empty(n, dtype=dtype, device=device)
    size = n * out.element_size()
    if size > MAPPED and out.device.type == "cpu" and (advise := _madvise()) is not None:
        first = -out.data_ptr() % HUGE_PAGE
        # Only advice: where it is not taken, all goes on as before.
        advise(out.data_ptr() + first, (size - first) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
        # One thread touches every page before several write: when they meet in one they wait for each other, which
        # takes longer than small pages would.
        out[first // out.element_size() :: HUGE_PAGE // out.element_size()] = 0
    return out
