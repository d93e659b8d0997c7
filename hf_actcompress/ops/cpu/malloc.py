"""What glibc's malloc does with large pieces that are freed.

By default it gives them back to the system, and the next tensor touches new pages, each for the price of a fault.  A
training step on a CPU frees and takes gigabytes, and takes up to twice as long for it (docs/memory.md).  With
compressed saved tensors it frees its activations one by one, instead of all at its end, and pays at least as much.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
from typing import Any

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of mallopt(3)
# Where glibc's own adjustment of its thresholds ends once large tensors were freed; mallopt turns it off for good.
USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 64 << 20}
TUNED = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")

_lock = threading.Lock()
_holders = 0
_for_good = False


def keep_freed_memory() -> bool:
    """Lets glibc's malloc keep what this process frees, for its next tensors, instead of giving it back to the system.

    A training step on a CPU frees and takes gigabytes, and each page given back costs a fault: a plain step of
    MobileNetV2 takes a third longer with them (docs/memory.md).  Holds until the process ends, whatever else runs
    in it; what lies free is counted as the process's own by the system.  `malloc_trim(0)` of libc gives it back once.
    `ActCompressConfig(keep_freed_memory=True)` does the same for as long as compression is attached.  Settings of
    malloc in the environment (`TUNED`, GLIBC_TUNABLES) stand: then nothing is done.

    Returns whether malloc took it: not then, nor where there is no glibc (musl, macOS), where nothing changes.  A
    malloc that was preloaded may take it without effect.
    """
    global _for_good
    with _lock:
        _for_good = _keep() or _for_good
        return _for_good


class KeptMemory:
    """The same until `remove()`, which gives back what lies free; malloc is then about as it was.

    Several may be there at a time: the last one that goes ends it.
    """

    def __init__(self) -> None:
        global _holders
        with _lock:
            self.held = _keep()
            _holders += self.held
        if self.held:
            logger.info("malloc keeps freed memory until compression is removed")

    def remove(self) -> None:
        """Calling it again does nothing."""
        global _holders
        with _lock:
            if not self.held:
                return
            self.held = False
            _holders -= 1
            if _holders or _for_good or (libc := _glibc()) is None:
                return
            for option, value in USUAL.items():
                libc.mallopt(option, value)
            libc.malloc_trim(0)


def _set_by_environment() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(name in os.environ for name in TUNED) or "glibc.malloc." in tunables


def _keep() -> bool:
    libc = None if _set_by_environment() else _glibc()
    # No tensor has a mapping of its own, and the top of the heap is not cut off.
    return libc is not None and bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))


def _glibc() -> Any | None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version, libc.mallopt  # noqa: B018  musl has neither
        return libc
    return None
