"""Which codec the gradients of data-parallel processes should be sent with: measured parts, added up.

    step = computation + bytes over bandwidth + encoding and decoding

DistributedDataParallel sends while the backward pass goes on, but most of a gradient comes at its end (embeddings),
so the parts are added.  An all-reduce of W processes sends 2 (W - 1) / W of the payload from each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .advise import choose
from .measure import measure_codec
from .simulate import Link, Traffic

PIECE = 1 << 22  # values that are coded at once (hf_actcompress.reduce.exchange)
CODECS = {"none": None, "8 bits": "ef+block:bits=8", "4 bits": "ef+block:bits=4",
          "2 bits": "ef+block:bits=2,round=stochastic"}  # fmt: skip


@dataclass(frozen=True)
class ReducePrediction:
    """A data-parallel step with one codec; times in seconds, nbytes sent by each process."""

    label: str
    codec: str | None
    compute: float
    link: float
    coding: float
    nbytes: float

    @property
    def seconds(self) -> float:
        return self.compute + self.link + self.coding


def predict_reduce(
    parameters: int, processes: int, link: Link, compute: float, codecs: Mapping[str, str | None] = CODECS,
    measure: Callable[..., Traffic] = measure_codec,
) -> list[ReducePrediction]:  # fmt: skip
    """A step of `processes` that train `parameters` values in fp32, for each codec.

    link: between each process and the others, in each direction.  compute: seconds of a step without communication.
    """
    share, found = (processes - 1) / processes, []
    for label, spec in codecs.items():
        if spec is None:
            nbytes, coding = 2 * share * 4.0 * parameters, 0.0
        else:
            chunk = max(1024, min(PIECE, parameters) // processes)
            one = measure(spec, (chunk,), "fp32")
            count = parameters / chunk
            nbytes = 2 * share * one.nbytes * count
            # There: every chunk, and back the sum of one; the others' chunks, and then all sums.
            coding = count * (one.encode * (1 + 1 / processes) + 2 * one.decode)
        way = nbytes / link.bandwidth + 2 * link.latency
        found.append(ReducePrediction(label, spec, compute, way, coding, nbytes))
    return found


def verdict_reduce(predictions: list[ReducePrediction]) -> tuple[str, str]:
    """(the label to take, the reason in words)"""
    times = {p.label: p.seconds for p in predictions}
    label = choose(times)
    chosen, plain = next(p for p in predictions if p.label == label), predictions[0]
    if chosen is plain:
        return label, "Do not compress: the link keeps up with the computation."
    return label, f"Take reduce={chosen.codec!r}: {plain.seconds / chosen.seconds:.2f} times as fast as without."
