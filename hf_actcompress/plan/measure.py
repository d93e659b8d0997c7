"""Times of a pipeline's stages and codecs in this process.  It starts no other process and sends nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..codecs import parse_codec
from ..pipeline.wire import WireFormat
from .cluster import BF16
from .simulate import Stage, Traffic

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Work(NamedTuple):
    """What a pipeline computes for one micro-batch."""

    stages: Sequence[nn.Module]
    args: tuple[Any, ...]  # positional inputs of the first stage
    kwargs: Mapping[str, Any]  # keyword inputs of every stage


def measure_stages(
    work: Work, *, repeats: int = 3, tick: Callable[[], None] = lambda: None
) -> tuple[list[Stage], list[tuple[int, ...]], list[str]]:
    """Times of each stage for one micro-batch, and shape and dtype of each stage's output but the last one's.

    Medians of `repeats`, after one that warms up; `tick` is called after each.
    """
    stages, shapes, dtypes = [], [], []
    names = {dtype: name for name, dtype in DTYPES.items()}
    modules, args, kwargs = work
    for number, module in enumerate(modules):
        module.train()
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.0) if parameters else None
        times: list[tuple[float, float, float]] = []
        for _ in range(repeats + 1):
            inputs = args if number == 0 else (args[0].detach().requires_grad_(),)
            began = time.perf_counter()
            output = module(*inputs, **kwargs)
            middle = time.perf_counter()
            output.backward(torch.ones_like(output))
            end = time.perf_counter()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            times.append((middle - began, end - middle, time.perf_counter() - end))
            tick()
        stages.append(Stage(*(statistics.median(column) for column in zip(*times[1:], strict=True))))
        args = (output.detach(),)
        if number < len(modules) - 1:
            shapes.append(tuple(output.shape))
            dtypes.append(names[output.dtype])
    return stages, shapes, dtypes


def measure_codec(spec: str, shape: tuple[int, ...], dtype: str, *, repeats: int = 5) -> Traffic:
    """Bytes on the link of one tensor, header included, and seconds to encode and decode it.

    dtype: a key of DTYPES.  Of `delta`, what samples take that were sent before.

    Raises ValueError for a codec that cannot take such a tensor.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    cast = spec == BF16
    codec = parse_codec("identity" if cast else spec)
    here, there = codec.init_state("advise"), codec.init_state("advise")
    times = []
    for turn in range(repeats + 1):
        if not turn or codec.traits.per_sample:  # what was seen is sent in another form
            new = (0 if turn else shape[0]) if codec.traits.per_sample else None
            wire = WireFormat(codec, shape, torch.bfloat16 if cast else x.dtype, new=new)
            buffer = wire.buffer()
        if codec.traits.per_sample:
            here.current, there.current = (state.plan(range(shape[0]), shape) for state in (here, there))
        began = time.perf_counter()
        wire.encode(x.bfloat16() if cast else x, here, buffer)
        middle = time.perf_counter()
        y = wire.decode(buffer, state=there if codec.traits.per_sample else None)
        if cast:
            y = y.to(x.dtype)
        times.append((middle - began, time.perf_counter() - middle))
    return Traffic(wire.nbytes, *(statistics.median(column) for column in zip(*times[1:], strict=True)))
