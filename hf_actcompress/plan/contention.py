"""Background load while timing: processes that run the same stages meanwhile, as the ranks of one machine do.

Cores of one machine share caches, memory and power, and two "processors" may be two halves of one core: a stage takes
longer while other ranks compute than it takes alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .measure import Work, measure_stages


@contextlib.contextmanager
def background_load(count: int, build: Callable[[], Work]) -> Iterator[None]:
    """`count` processes that run the stages of `build()` forward and backward until the block ends.

    build: picklable.  Raises RuntimeError if one of the processes ends before it has run its stages once.
    """
    context = multiprocessing.get_context("spawn")
    ready = [context.Event() for _ in range(count)]
    others = [
        context.Process(target=_work, args=(build, torch.get_num_threads(), event), daemon=True) for event in ready
    ]
    try:
        for other in others:
            other.start()
        for other, event in zip(others, ready, strict=True):
            while not event.wait(0.2):
                if not other.is_alive():
                    raise RuntimeError(f"A process of the background load ended with exit code {other.exitcode}.")
        yield
    finally:
        for other in others:
            if other.pid is not None:
                other.terminate()
                other.join()


def _work(build: Callable[[], Work], threads: int, ready: Any) -> None:
    torch.set_num_threads(threads)
    work = build()
    while True:
        measure_stages(work, repeats=1)
        ready.set()
