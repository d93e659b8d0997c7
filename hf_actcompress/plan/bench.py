"""What `hf-actcompress bench` measures: size, error and time of a codec on one made-up tensor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec
from ..observe.measures import distance

TIMED = ("encode", "decode", "roundtrip")


def sample(shape: tuple[int, ...], dtype: torch.dtype, distribution: str, device: str, seed: int = 0) -> Tensor:
    """The same tensor on every machine: Gaussian, Student's t with 3 degrees of freedom, or a Gaussian after ReLU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if distribution == "heavy":
        x /= (torch.randn((3, *shape), generator=generator).square().mean(0)).sqrt_()
    elif distribution == "relu":
        x.relu_()
    elif distribution != "gaussian":
        raise ValueError(f"distribution={distribution!r} is not one of gaussian, heavy, relu.")
    return x.to(dtype).to(device)


def measure(codec: Codec, x: Tensor, repeats: int, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Ratio, error, and times of `codec` on `x`; `tick` is called after each repeat.

    Each repeat runs x.clone(), encode, decode and roundtrip in turn, so that other load on the machine slows all of
    them alike.  A time is the median in milliseconds, and the median, 10th and 90th percentile of the multiple of the
    clone in the same repeat.  Codecs with a state are timed after it was filled; ratio and error are those of a first
    call, because error feedback would change the same tensor at every repeat.
    Raises ValueError where the codec cannot take a tensor of that shape.
    """
    states = [codec.init_state("bench"), codec.init_state("bench")]
    synchronize = _synchronizer(x.device)

    def timed(function: Callable[[], Any]) -> tuple[float, Any]:
        synchronize()
        began = time.perf_counter()
        result = function()
        synchronize()
        return time.perf_counter() - began, result

    seconds: dict[str, list[float]] = {name: [] for name in ("clone", *TIMED)}
    for repeat in range(-1, repeats):
        clone, _ = timed(x.clone)
        encode, payload = timed(lambda: codec.encode(x, states[0]))
        decode, y = timed(lambda payload=payload: codec.decode(payload))
        roundtrip, _ = timed(lambda: codec.roundtrip(x, states[1]))
        if repeat < 0:  # warms up: fills caches
            error, cosine = distance(x.reshape(-1), y.reshape(-1))
            size = {"payload_bytes": payload.nbytes, "ratio": payload.ratio}
        else:
            for name, value in zip(seconds, (clone, encode, decode, roundtrip), strict=True):
                seconds[name].append(value)
            tick()
    result = {"codec": str(codec), **size, "rel_error": error, "cosine": cosine,
              "clone": {"ms": 1e3 * statistics.median(seconds["clone"])}}  # fmt: skip
    for name in TIMED:
        multiples = [value / clone for value, clone in zip(seconds[name], seconds["clone"], strict=True)]
        low, high = _percentiles(multiples)
        result[name] = {"ms": 1e3 * statistics.median(seconds[name]), "clones": statistics.median(multiples),
                        "clones_p10": low, "clones_p90": high}  # fmt: skip
    return result


def _percentiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[-1]


def _synchronizer(device: torch.device) -> Callable[[], None]:
    return (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
