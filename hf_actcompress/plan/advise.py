"""Which codec a pipeline should send with: what each costs here, put into the simulator.

Measures the stages of a model (forward, backward, optimizer) and codecs (bytes on the link, encoding, decoding) in
this process; `predict` and `choose` only calculate.  It starts no other process and sends nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..codecs import parse_codec
from ..pipeline.wire import WireFormat
from .cluster import BF16, Cluster
from .schedules import place
from .simulate import Cut, Stage, Timeline, Traffic, bound, simulate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEAR = 0.03  # a more faithful codec is taken if it is at most this much slower than the fastest


@dataclass(frozen=True)
class Prediction:
    """A step under one codec.  limit: what compute and bytes over bandwidth allow, whatever the order of the work."""

    label: str
    codecs: tuple[str, str]
    timeline: Timeline
    rows: int
    nbytes: tuple[int, int]  # of a step on the first link, forward and backward
    limit: float

    @property
    def seconds(self) -> float:
        return self.timeline.seconds

    @property
    def samples_per_second(self) -> float:
        return self.rows / self.seconds


def measure_stages(
    modules: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, repeats: int = 3,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[Stage], list[tuple[int, ...]], list[str]]:
    """Times of each stage for a micro-batch with these inputs, and shape and dtype of what the stages hand on.

    modules: of `split`; kwargs go to each of them.  Medians of `repeats`, after one that warms up.
    """
    stages, shapes, dtypes = [], [], []
    names = {dtype: name for name, dtype in DTYPES.items()}
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
    """Bytes on the link of one tensor, header included, and seconds to encode and decode it; with `delta`, of samples
    that were seen before.

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


def predict(
    cluster: Cluster, *, measure: Callable[..., Traffic] = measure_codec,
    tick: Callable[[str], None] = lambda label: None,
) -> list[Prediction]:  # fmt: skip
    """A step of `cluster` under each of its codecs, in their order.

    measure: (spec, shape, dtype) -> Traffic on a device of codec_speed 1; each is asked for once.
    Raises ValueError for a codec that cannot take what a stage hands on.
    """
    known: dict[tuple, Traffic] = {}
    at = place(cluster.schedule, len(cluster.stages), len(cluster.devices))

    def traffic(spec: str, number: int, sender: int, receiver: int) -> Traffic:
        key = (spec, cluster.shapes[number], cluster.dtypes[number])
        if key not in known:
            known[key] = measure(*key)
        found = known[key]
        return replace(found, encode=found.encode / cluster.codec_speed[at[sender]],
                       decode=found.decode / cluster.codec_speed[at[receiver]])  # fmt: skip

    predictions = []
    for label, (forward, backward) in cluster.codecs.items():
        tick(label)
        cuts = [Cut(traffic(forward, k, k, k + 1), traffic(backward, k, k + 1, k)) for k in range(len(cluster.shapes))]
        places = (cluster.stages, cluster.links, cuts, cluster.microbatches, cluster.schedule)
        timeline = simulate(*places, devices=len(cluster.devices), ahead=cluster.ahead)
        sent = [cluster.microbatches * int(t.nbytes) for t in (cuts[0].forward, cuts[0].backward)] if cuts else [0, 0]
        predictions.append(
            Prediction(label, (forward, backward), timeline, cluster.rows * cluster.microbatches, (sent[0], sent[1]),
                       bound(*places, devices=len(cluster.devices)))
        )  # fmt: skip
    return predictions


def choose(seconds: Mapping[str, float], near: float = NEAR) -> str:
    """The label to take: the first, hence most faithful, of those that are nearly as fast as the fastest."""
    fastest = min(seconds.values())
    return next(label for label, value in seconds.items() if value <= fastest * (1 + near))


def verdict(predictions: Sequence[Prediction]) -> str:
    """The choice and its reason, in words."""
    times = {p.label: p.seconds for p in predictions}
    chosen = next(p for p in predictions if p.label == choose(times))
    fastest = min(predictions, key=lambda p: p.seconds)
    plain = next((p for p in predictions if p.codecs == ("identity", "identity")), None)
    if chosen is plain:
        gain = plain.seconds / fastest.seconds - 1
        return (
            f"Do not compress: no codec makes a step more than {100 * NEAR:.0f} % faster (the best, {fastest.label}, "
            f"by {100 * gain:.1f} %), for the links keep up with the computation."
        )
    if plain is None:
        return f"Take {chosen.label}: {chosen.seconds:.3g} s a step."
    words = f"Take {chosen.label}: {plain.seconds / chosen.seconds:.2f} times as fast as without compression."
    if chosen is not fastest:
        more = 100 * (chosen.seconds / fastest.seconds - 1)
        words += f" {fastest.label} gains {more:.1f} % more, and loses more of the values."
    return words
