"""Company for a measurement: processes that train the same stages meanwhile, as the ranks of one machine do.

Cores of one machine share caches, memory and power, and "processors" may be two halves of one core: what a stage takes
alone it does not take beside others.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .advise import measure_stages

# Stages, positional inputs of the first, keyword inputs of all.
Work = tuple[Sequence[nn.Module], tuple[Any, ...], Mapping[str, Any]]


@contextlib.contextmanager
def company(count: int, build: Callable[[], Work]) -> Iterator[None]:
    """`count` processes that run the stages of `build()` forward and backward until the block ends.

    build: picklable.  Raises RuntimeError if one of them ends before it has run its stages once.
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
                    raise RuntimeError(f"A process beside the measurement ended with exit code {other.exitcode}.")
        yield
    finally:
        for other in others:
            if other.pid is not None:
                other.terminate()
                other.join()


def _work(build: Callable[[], Work], threads: int, ready: Any) -> None:
    torch.set_num_threads(threads)
    stages, args, kwargs = build()
    while True:
        measure_stages(stages, args, kwargs, repeats=1)
        ready.set()
