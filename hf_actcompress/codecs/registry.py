"""Codecs by name, and specs such as "block:bits=4,group=128", "topk:ratio=0.1|uniform:bits=8", "ef+topk"."""

from __future__ import annotations

from typing import Any

from .base import Codec
from .block import Block
from .chain import Chain
from .delta import Delta
from .feedback import Feedback
from .float8 import Float8
from .identity import Identity
from .kmeans import KMeans
from .lowrank import LowRank
from .sort import Sort
from .spec import build, did_you_mean, split_spec
from .topk import TopK
from .uniform import Uniform

CODECS: dict[str, type[Codec]] = {c.name: c for c in (Identity, Uniform, Block, Sort, KMeans, TopK, LowRank, Float8)}

# Names for options that belong together.  A codec that was asked for by such a name prints as what it is.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "rotated": ("block", {"rotate": "hadamard", "levels": "gauss", "allocate": "energy", "patch": "dct"}),
    "trellis": ("block", {"rotate": "hadamard", "levels": "trellis", "allocate": "energy", "patch": "dct",
                          "prototypes": 3}),
}  # fmt: skip


def codec_names() -> list[str]:
    return list(CODECS)


def parse_codec(spec: str | dict[str, Any] | Codec) -> Codec:
    """A codec from its spec, a dict {"name": "block", "bits": 4, ...}, or a codec (returned as it is).

    Grammar: `name[:option=value,...]`, `a|b` (b compresses what a leaves), `ef+a` (error feedback around all that
    follows), `delta+a` (a compresses the change of each sample since it was last seen); `rotated:bits=2` is block
    with all that helps at few bits (PRESETS).
    Raises ValueError with the names and options that exist.
    """
    if isinstance(spec, Codec):
        return spec
    if isinstance(spec, dict):
        options = dict(spec)
        name = options.pop("name", None)
        if name is None:
            raise ValueError(f"A codec given as a dict needs a 'name'; got {spec!r}. Names: {', '.join(CODECS)}.")
        return _build(str(name), options, repr(spec))
    if not isinstance(spec, str) or not spec.strip():
        raise ValueError(f"A codec is a spec such as 'block:bits=4', a dict or a Codec; got {spec!r}.")
    text = spec.strip()
    if text.startswith("ef+"):
        return Feedback(parse_codec(text[3:]))
    if text.startswith("delta"):
        return _delta(text)
    if "|" in text:
        first, rest = text.split("|", 1)
        return Chain(parse_codec(first), parse_codec(rest))
    return _build(*split_spec(text), spec)


def _delta(spec: str) -> Codec:
    head, plus, inner = spec.partition("+")
    if not plus or not inner.strip():
        raise ValueError(f"'{spec}': delta stands before the codec of the changes, as in delta+block:bits=4.")
    name, options = split_spec(head)
    if name != "delta" or "inner" in options:
        raise ValueError(f"'{spec}': delta stands before the codec of the changes, as in delta+block:bits=4.")
    values: dict[str, Any] = {"inner": parse_codec(inner), **options}
    if "first" in options:
        values["first"] = parse_codec(options["first"].replace("/", ":").replace(";", ","))
    return build(Delta, name, values, spec)


def _build(name: str, options: dict[str, Any], spec: str) -> Codec:
    if name in PRESETS:
        name, preset = PRESETS[name]
        options = {**preset, **options}
    cls = CODECS.get(name)
    if cls is None:
        names = [*CODECS, *PRESETS]
        known = f"{', '.join(names)}; also a|b, ef+a and delta+a"
        raise ValueError(f"Unknown codec '{name}' in '{spec}'.{did_you_mean(name, names)} Codecs: {known}.")
    return build(cls, name, options, spec)
