"""The description of a cluster, which need not exist, as YAML: devices, stages, links, and what is to be sent.

    microbatches: 16
    rows: 4                               # samples in a micro-batch, for samples per second
    schedule: early-1f1b                  # also 1f1b, gpipe, interleaved, zbv
    devices:
      - {name: laptop, flops: 200G, codec_speed: 0.5}      # codecs run at half the speed of this machine
      - {name: server, count: 7, flops: 8T}                # server 1, server 2, ...
    stages:
      - {flops: 14G, activation: [4, 128, 384]}            # the forward of a micro-batch; or forward: 40ms
      - {count: 7, forward: 40ms, backward: 80ms, activation: [4, 128, 384]}
    links: {bandwidth: 100mbit, latency: 20ms}             # all alike; or a list
    codecs: {none: identity, block 4/8: [block:bits=4, "block:bits=8,round=stochastic"]}

Errors name the key, what was received and what is allowed.  Nothing is measured or simulated here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .schedules import SCHEDULES, orders, place
from .simulate import Link, Stage

PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "m": 1e6, "M": 1e6, "g": 1e9, "G": 1e9, "t": 1e12, "T": 1e12}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "": 1.0}
FLOPS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
BYTES = {f"{prefix}{unit}{per}": factor * size for prefix, factor in PREFIXES.items()
         for unit, size in (("bit", 1 / 8), ("bps", 1 / 8), ("B", 1.0)) for per in ("", "/s")}  # fmt: skip
DTYPES = ("fp32", "bf16", "fp16")
BF16 = "bf16"  # no codec: cast, send, cast back
CODECS: dict[str, tuple[str, str]] = {
    "none": ("identity", "identity"), BF16: (BF16, BF16),
    "block 8": ("block:bits=8", "block:bits=8,round=stochastic"), "sort 8": ("sort:bits=8", "sort:bits=8"),
    "block 4/8": ("block:bits=4", "block:bits=8,round=stochastic"),
    "topk 10 %, 8 bits": ("topk:ratio=0.1|uniform:bits=8", "topk:ratio=0.1|uniform:bits=8"),
}  # fmt: skip  # the most faithful first
NEAR = 0.03  # the first codec is taken that makes a step at most this much slower than the fastest one


@dataclass(frozen=True)
class Cluster:
    """Devices, stages and links, and what is to be sent."""

    devices: list[str]  # names
    codec_speed: list[float]  # of each device; 1 is this machine
    stages: list[Stage]
    shapes: list[tuple[int, ...]]  # of the activation of a micro-batch after each stage but the last
    dtypes: list[str]  # of the same, of DTYPES
    links: dict[tuple[int, int], Link]  # by the numbers of two devices, the smaller first
    microbatches: int
    rows: int  # samples in a micro-batch
    schedule: str
    ahead: int
    codecs: dict[str, tuple[str, str]]  # label -> specs of activations and gradients


# Values


def bandwidth(text: Any, key: str = "bandwidth") -> float:
    """Bytes per second of '100mbit', '1gbit' or '12.5MB' (bytes with a capital B, per second)."""
    return _quantity(text, key, BYTES, "a bandwidth above 0 such as 100mbit, 1gbit or 12.5MB", positive=True)


def seconds(text: Any, key: str) -> float:
    """Seconds of '40ms', '5us', '1.5s' or a number."""
    return _quantity(text, key, SECONDS, "a time such as 40ms, 5us or 1.5s")


def _flops(text: Any, key: str) -> float:
    what = "a number of floating-point operations above 0 such as 14G or 8T"
    return _quantity(text, key, FLOPS, what, positive=True)


def _quantity(text: Any, key: str, units: Mapping[str, float], what: str, positive: bool = False) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*([A-Za-z/]*)", str(text).strip())
    value = float(match[1] + (match[2] or "")) * units.get(match[3], -1.0) if match else -1.0
    if value < 0 or (positive and value == 0):
        raise ValueError(f"{key}: {text!r} is not {what}.")
    return value


def _whole(value: Any, key: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key}: {value!r} is not a whole number of {least} or more.")
    return value


def _mapping(value: Any, where: str, allowed: Iterable[str], needed: Iterable[str] = ()) -> Mapping[str, Any]:
    """`value` as a mapping that has no other keys than `allowed` and all that are `needed`."""
    allowed = tuple(allowed)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {value!r} is not a mapping with the keys {', '.join(allowed)}.")
    for key in value:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"{where} has no key {key!r}.{hint} Keys: {', '.join(allowed)}.")
    missing = [key for key in needed if key not in value]
    if missing:
        raise ValueError(f"{where} lacks {' and '.join(repr(key) for key in missing)}.")
    return value


def _repeated(entries: Any, where: str, allowed: tuple[str, ...]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each entry of a list as often as its `count` says, with its place in the file ("stages[2]")."""
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}: {entries!r} is not a list with at least one entry.")
    found = []
    for number, entry in enumerate(entries):
        here = f"{where}[{number}]"
        entry = _mapping(entry, here, allowed)
        found += [(here, entry)] * _whole(entry.get("count", 1), f"{here}.count", 1)
    return found


# The file


def read_cluster(path: str | Path) -> Cluster:
    """The cluster that a YAML file describes.  Raises ValueError for a file that is not there or not understood."""
    import yaml

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is no text")
        raise ValueError(f"The description of the cluster {str(path)!r} cannot be read: {reason}.") from None
    try:
        return parse_cluster(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]} ({at}).") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_cluster(value: Any) -> Cluster:
    """The cluster of what a YAML file holds.  Raises ValueError, which names the key."""
    names = ("microbatches", "rows", "schedule", "ahead", "devices", "stages", "links", "codecs")
    top = _mapping(value, "The description", names, ("stages", "links", "microbatches"))
    microbatches = _whole(top["microbatches"], "microbatches", 1)
    schedule = top.get("schedule", "early-1f1b")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: {schedule!r} is unknown. Schedules: {', '.join(SCHEDULES)}.")
    entries = _repeated(top["stages"], "stages", _STAGE)
    devices, flops, speed = _devices(top.get("devices"), len(entries))
    try:
        at = place(schedule, len(entries), len(devices))
        ahead = _whole(top.get("ahead", 2), "ahead", 0)
        orders(schedule, len(entries), len(devices), microbatches, ahead)
    except ValueError as error:
        raise ValueError(f"stages, devices and schedule do not fit: {error}") from None
    stages, shapes, dtypes = [], [], []
    for number, (where, entry) in enumerate(entries):
        stages.append(_stage(where, entry, flops[at[number]], devices[at[number]]))
        if number < len(entries) - 1:
            shapes.append(_shape(where, entry))
            dtypes.append(_dtype(entry.get("dtype", "fp32"), f"{where}.dtype"))
    rows = _whole(top.get("rows", shapes[0][0] if shapes else 1), "rows", 1)
    pairs = {tuple(sorted(pair)) for pair in zip(at, at[1:], strict=False) if pair[0] != pair[1]}
    links = _links(top["links"], devices, pairs)
    return Cluster(devices, speed, stages, shapes, dtypes, links, microbatches, rows, schedule, ahead,
                   parse_codecs(top.get("codecs", CODECS)))  # fmt: skip


_STAGE = ("count", "flops", "forward", "backward", "optimizer", "weight", "activation", "dtype")
_DEVICE = ("count", "name", "flops", "codec_speed")


def _devices(value: Any, stages: int) -> tuple[list[str], list[float | None], list[float]]:
    """Names, operations per second and codec speeds; a device for each stage if none are given."""
    if value is None:
        return [f"device {k}" for k in range(stages)], [None] * stages, [1.0] * stages
    names: list[str] = []
    flops, speed = [], []
    for where, entry in _repeated(value, "devices", _DEVICE):
        base = str(entry.get("name", "device"))
        same = sum(name == base or name.startswith(f"{base} ") for name in names)
        names.append(f"{base} {same + 1}" if entry.get("count", 1) > 1 or same else base)
        flops.append(_flops(entry["flops"], f"{where}.flops") if "flops" in entry else None)
        relative = entry.get("codec_speed", 1.0)
        if isinstance(relative, bool) or not isinstance(relative, (int, float)) or not relative > 0:
            raise ValueError(f"{where}.codec_speed: {relative!r} is not a number above 0 (1 is this machine).")
        speed.append(float(relative))
    return names, flops, speed


def _stage(where: str, entry: Mapping[str, Any], flops: float | None, device: str) -> Stage:
    if ("forward" in entry) == ("flops" in entry):
        raise ValueError(f"{where}: give either 'forward' (a time such as 40ms) or 'flops' (of the forward).")
    if "forward" in entry:
        forward = seconds(entry["forward"], f"{where}.forward")
    elif flops is None:
        raise ValueError(f"{where}.flops needs the speed of its device: give {device!r} 'flops' under devices.")
    else:
        forward = _flops(entry["flops"], f"{where}.flops") / flops
    backward = seconds(entry["backward"], f"{where}.backward") if "backward" in entry else 2 * forward
    weight = entry.get("weight", 0.5)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise ValueError(f"{where}.weight: {weight!r} is not a share from 0 to 1 of the backward.")
    return Stage(forward, backward, seconds(entry.get("optimizer", 0), f"{where}.optimizer"), weight)


def _shape(where: str, entry: Mapping[str, Any]) -> tuple[int, ...]:
    shape = entry.get("activation")
    if not isinstance(shape, list) or not shape or any(type(k) is not int or k < 1 for k in shape):
        raise ValueError(f"{where}.activation: {shape!r} is not the shape of the stage's output for a micro-batch, "
                         "such as [4, 128, 384].")  # fmt: skip
    return tuple(shape)


def _dtype(value: Any, key: str) -> str:
    if value not in DTYPES:
        raise ValueError(f"{key}: {value!r} is not one of {', '.join(DTYPES)}.")
    return value


def _links(value: Any, devices: list[str], pairs: set[tuple[int, int]]) -> dict[tuple[int, int], Link]:
    """A mapping is every link; a list has one entry for each two neighbours, or for what its `between` names."""

    def link(entry: Any, where: str, allowed: tuple[str, ...]) -> Link:
        entry = _mapping(entry, where, allowed, ("bandwidth",))
        return Link(bandwidth(entry["bandwidth"], f"{where}.bandwidth"),
                    seconds(entry.get("latency", 0), f"{where}.latency"))  # fmt: skip

    if isinstance(value, Mapping):
        return dict.fromkeys(pairs, link(value, "links", ("bandwidth", "latency")))
    found: dict[tuple[int, int], Link] = {}
    following = 0
    for where, entry in _repeated(value, "links", ("count", "between", "bandwidth", "latency")):
        if "between" in entry:
            ends = entry["between"]
            if not isinstance(ends, list) or len(ends) != 2 or any(end not in devices for end in ends):
                raise ValueError(f"{where}.between: {ends!r} does not name two devices of: {', '.join(devices)}.")
            pair = tuple(sorted(devices.index(end) for end in ends))
        else:
            pair, following = (following, following + 1), following + 1
        found[pair] = link(entry, where, ("count", "between", "bandwidth", "latency"))
    for a, b in sorted(pairs):
        if (a, b) not in found:
            raise ValueError(f"links: none between {devices[a]!r} and {devices[b]!r}, which exchange activations.")
    return {pair: found[pair] for pair in pairs}


def parse_codecs(value: Any, key: str = "codecs") -> dict[str, tuple[str, str]]:
    """Label -> specs of activations and gradients.  A list of specs labels itself; one spec serves both.

    Raises ValueError, which names `key`, for what is no codec.
    """
    if isinstance(value, list):
        value = {str(spec): spec for spec in value}
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{key}: {value!r} is neither a list of specs nor a mapping from labels to them.")
    found = {}
    for label, specs in value.items():
        pair = tuple(specs) if isinstance(specs, (list, tuple)) else (specs, specs)
        if len(pair) != 2:
            raise ValueError(f"{key}.{label}: {specs!r} is neither one spec nor two, for activations and gradients.")
        for spec in pair:
            _check(spec, key if key.startswith("-") else f"{key}.{label}")
        found[str(label)] = pair
    return found


def _check(spec: Any, key: str) -> None:
    if spec == BF16:
        return
    from ..codecs import parse_codec  # imports torch, which the help texts of `advise` need not wait for

    try:
        parse_codec(spec)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
