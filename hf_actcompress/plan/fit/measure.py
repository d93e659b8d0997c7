"""One real training step, measured: the bytes that the allocator hands out.

On a CPU torch's profiler notes every allocation, those inside kernels too; on a GPU the caching allocator counts.  It
is no resident memory: libraries, and what malloc keeps for later, are not in it.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .step import forward, prepare, tensors_of
from .tracker import Tracker

PHASES = ("forward", "backward", "optimizer")


def measure(
    model: nn.Module, batch: dict[str, Any], method: Callable[[nn.Module, Tracker], Any], *, optimizer: str,
    autocast: bool, device: str, timed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """A step of `model` with real tensors: {"held", "peak", "always": bytes, "peak_in": phase, "seconds": median}.

    timed: steps that are timed, before the one that is counted.
    """
    made = prepare(model, optimizer)
    unused = Tracker(device)  # methods ask it for what only tensors without values need

    def step(mark: Callable[[str], Any]) -> None:
        with mark("forward"):
            loss = forward(model, batch, autocast, device)
        with mark("backward"):
            loss.backward()
        with mark("optimizer"):
            made.step()
        made.zero_grad()

    with method(model, unused):
        step(lambda _: nullcontext())  # what is made once
        seconds = []
        for _ in range(timed):
            began = time.perf_counter()
            step(lambda _: nullcontext())
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        gc.collect()
        kept = [*model.parameters(), *model.buffers(), *tensors_of(made.state.values()), *tensors_of([batch])]
        always = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())
        found = (_on_gpu if device == "cuda" else _on_cpu)(step)
    median = sorted(seconds)[len(seconds) // 2] if seconds else None
    return {"held": found["held"], "peak": always + found["peak"], "always": always, "peak_in": found["peak_in"],
            "seconds": median}  # fmt: skip


def _on_cpu(step: Callable[[Callable[[str], Any]], None]) -> dict[str, Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(torch.profiler.record_function)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    memory = [event for event in events if event.name() == "[memory]"]
    live = list(itertools.accumulate(event.nbytes() for event in memory))
    began = {event.name(): event.start_ns() for event in events if event.name() in PHASES}
    held = [n for event, n in zip(memory, live, strict=True) if event.start_ns() < began["backward"]]
    when = memory[live.index(max(live))].start_ns()
    return {"held": held[-1], "peak": max(live), "peak_in": [name for name in PHASES if began[name] <= when][-1]}


def _on_gpu(step: Callable[[Callable[[str], Any]], None]) -> dict[str, Any]:
    before, peaks, lives = torch.cuda.memory_allocated(), {}, {}

    class Mark:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            torch.cuda.reset_peak_memory_stats()

        def __exit__(self, *error: Any) -> None:
            peaks[self.name] = torch.cuda.max_memory_allocated() - before
            lives[self.name] = torch.cuda.memory_allocated() - before

    step(Mark)
    most = max(peaks, key=lambda name: peaks[name])
    return {"held": lives["forward"], "peak": peaks[most], "peak_in": most}
