"""Which codec a pipeline should send with: measured parts, put into the simulator.

`predict`, `choose` and `verdict` only calculate; `measured_cluster` measures the stages of a model on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from .cluster import CODECS, NEAR, Cluster
from .contention import background_load
from .measure import Work, measure_codec, measure_stages
from .schedules import orders, place
from .simulate import Cut, Link, Stage, Timeline, Traffic, bound, simulate


@dataclass(frozen=True)
class Prediction:
    """A training step with one codec."""

    label: str
    codecs: tuple[str, str]  # of activations and gradients
    timeline: Timeline
    rows: int  # samples of the step
    nbytes: tuple[int, int]  # of the step on the first link, forward and backward
    limit: float  # seconds that no order of the work can beat (simulate.bound)

    @property
    def seconds(self) -> float:
        return self.timeline.seconds

    @property
    def samples_per_second(self) -> float:
        return self.rows / self.seconds


def measured_cluster(
    build: Callable[[], Work], link: Link, *, microbatches: int, rows: int, schedule: str = "early-1f1b",
    devices: int | None = None, ahead: int = 2, background: int = 0, given: Sequence[Stage] = (),
    tick: Callable[[int], None] = lambda total: None,
) -> Cluster:  # fmt: skip
    """The cluster of devices like this machine on which a model's stages would run, all links alike.

    build: picklable; makes the stages and what goes into them for a micro-batch of `rows` samples.
    devices: as many as stages by default.  background: processes that compute the same meanwhile.
    given: times of the stages, instead of those that are measured.  tick: told the number of measurements at each.
    Raises ValueError where stages, devices, schedule and micro-batches do not fit.
    """
    work = build()
    count = len(work.stages)
    devices = count if devices is None else devices
    at = place(schedule, count, devices)
    orders(schedule, count, devices, microbatches, ahead)  # raises before time is spent on measurements
    if given and len(given) != count:
        raise ValueError(f"there are times of {len(given)} stages; the model has {count}.")
    repeats = 1 if given else 3
    with background_load(0 if given else background, build):
        stages, shapes, dtypes = measure_stages(work, repeats=repeats, tick=lambda: tick(count * (repeats + 1)))
    links = {(min(a, b), max(a, b)): link for a, b in zip(at, at[1:], strict=False) if a != b}
    return Cluster([f"device {k}" for k in range(devices)], [1.0] * devices, list(given) or stages, shapes, dtypes,
                   links, microbatches, rows, schedule, ahead, CODECS)  # fmt: skip


def predict(
    cluster: Cluster, *, measure: Callable[..., Traffic] = measure_codec,
    tick: Callable[[str], None] = lambda label: None,
) -> list[Prediction]:  # fmt: skip
    """A step of `cluster` under each of its codecs, in their order.

    measure: (spec, shape, dtype) -> Traffic on a device of codec_speed 1; called once for each combination.
    Raises ValueError for a codec that cannot take a stage's output.
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
