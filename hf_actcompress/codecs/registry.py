"""Codecs by name, and specs such as "block:bits=4,group=128", "topk:ratio=0.1|uniform:bits=8", "ef+topk"."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
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
    name, _, tail = text.partition(":")
    options = {}
    for item in filter(None, (t.strip() for t in tail.split(","))):
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise ValueError(f"'{item}' in the codec spec '{spec}' is not option=value. Example: block:bits=4.")
        if key.strip() in options:
            raise ValueError(f"The codec spec '{spec}' gives {key.strip()} twice.")
        options[key.strip()] = value.strip()
    return _build(name.strip(), options, spec)


def _delta(spec: str) -> Codec:
    head, plus, inner = spec.partition("+")
    if not plus or not inner.strip():
        raise ValueError(f"'{spec}': delta stands before the codec of the changes, as in delta+block:bits=4.")
    name, _, tail = head.partition(":")
    options: dict[str, Any] = {"inner": parse_codec(inner)}
    for item in filter(None, (t.strip() for t in tail.split(","))):
        key, equals, value = item.partition("=")
        if name != "delta" or not equals or key not in ("first", "cache", "evict"):
            raise ValueError(f"'{item}' in '{spec}' is not an option of delta: first=, cache=, evict=.")
        if key == "first":
            options[key] = parse_codec(value.replace("/", ":").replace(";", ","))
        else:
            options[key] = _convert("delta", key, value, int if key == "cache" else str)
    return Delta(**options)


def _build(name: str, options: dict[str, Any], spec: str) -> Codec:
    if name in PRESETS:
        name, preset = PRESETS[name]
        options = {**preset, **options}
    cls = CODECS.get(name)
    if cls is None:
        names = [*CODECS, *PRESETS]
        close = difflib.get_close_matches(name, names, 1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        known = f"{', '.join(names)}; also a|b, ef+a and delta+a"
        raise ValueError(f"Unknown codec '{name}' in '{spec}'.{hint} Codecs: {known}.")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for key, value in options.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            options_text = ", ".join(known) or "none"
            raise ValueError(f"{name} has no option '{key}' (in '{spec}').{hint} Options: {options_text}.")
        values[key] = _convert(name, key, value, hints[key]) if isinstance(value, str) else value
    return cls(**values)


def _convert(codec: str, key: str, text: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                raise ValueError(
                    f"{codec}: {key}={text!r} is not {'an integer' if kind is int else 'a number'}."
                ) from None
    return text
