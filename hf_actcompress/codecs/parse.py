"""A codec from its spec, such as "block:bits=4,group=128", "topk:ratio=0.1|uniform:bits=8" or "ef+topk"."""

from __future__ import annotations

import re
from typing import Any

from .base import Codec
from .chain import Chain
from .delta import Delta
from .feedback import Feedback
from .registry import check_registered, codec_class, codec_names
from .spec import build, split_spec

# Options of block in version 0.1 that no measurement favoured, and those that made another algorithm of it.
GONE = ("clip", "scale")
ROTATING = ("rotate", "levels", "fit", "allocate", "patch", "prototypes")


def parse_codec(spec: str | dict[str, Any] | Codec) -> Codec:
    """A codec from its spec, a dict {"name": "block", "bits": 4, ...}, or a codec (returned as it is).

    Grammar: `name[:option=value,...]`, `a|b` (b compresses what a leaves), `ef+a` (error feedback around all that
    follows), `delta+a` (a compresses the change of each sample since it was last seen).
    Raises ValueError with the names and options that exist, and for a codec whose class is not registered.
    """
    if isinstance(spec, Codec):
        check_registered(spec)
        return spec
    if isinstance(spec, dict):
        options = dict(spec)
        name = options.pop("name", None)
        if name is None:
            known = ", ".join(codec_names())
            raise ValueError(f"A codec given as a dict needs a 'name'; got {spec!r}. Names: {known}.")
        return _build(str(name), options, repr(spec))
    if not isinstance(spec, str) or not spec.strip():
        raise ValueError(f"A codec is a spec such as 'block:bits=4', a dict or a Codec; got {spec!r}.")
    text = spec.strip()
    if found := re.match(r"ef\s*\+", text):
        return Feedback(parse_codec(_present(text[found.end() :], "after ef+, as in ef+block:bits=4", spec)))
    if re.match(r"delta\s*([:+]|$)", text):
        return _delta(text)
    if "|" in text:
        parts = [_present(part, "on each side of |, as in topk:ratio=0.1|uniform:bits=8", spec)
                 for part in text.split("|", 1)]  # fmt: skip
        return Chain(*map(parse_codec, parts))
    return _build(*split_spec(text), spec)


def _present(part: str, where: str, spec: str) -> str:
    if not part.strip():
        raise ValueError(f"'{spec}': a codec is missing; there has to be one {where}.")
    return part


def _build(name: str, options: dict[str, Any], spec: str) -> Codec:
    if name in ("block", "rotated", "trellis"):
        _refuse_old_spelling(name, options, spec)
    return build(codec_class(name, spec), name, options, spec)


def _refuse_old_spelling(name: str, options: dict[str, Any], spec: str) -> None:
    gone = [key for key in options if key in GONE]
    if gone:
        raise ValueError(
            f"'{spec}': the option {gone[0]} is gone, since nothing measured was better with it. Leave it out."
        )
    rotating = [key for key in options if key in ROTATING and not (key == "prototypes" and name != "block")]
    if not rotating:
        return
    if all(str(options[key]) in ("none", "None", "uniform", "0") for key in rotating) and name == "block":
        raise ValueError(f"'{spec}': block never rotates. Leave {' and '.join(rotating)} out.")
    new = "trellis" if "trellis" in (name, options.get("levels")) else "rotated"
    kept = {key: options[key] for key in ("bits", "group", "prototypes") if options.get(key, "none") != "none"}
    if new != name and new == "trellis":
        kept.setdefault("prototypes", 0)  # what such a block had
    text = f"{new}{':' * bool(kept)}" + ",".join(f"{key}={value}" for key, value in kept.items())
    remedy = f"Write '{text}'."
    try:
        build(codec_class(new, spec), new, kept, text)
    except ValueError as error:
        remedy = f"'{text}' would be it, but {error}"
    lost = [key for key in ("dim", "splits") if key in options]
    more = f" {' and '.join(lost)} cannot be combined with it." if lost else ""
    raise ValueError(f"'{spec}': rotation is a codec of its own. {remedy}{more}")


def _delta(spec: str) -> Codec:
    """`delta[:options]+codec`; the option `first` is a spec with `/` for `:` and `;` for `,`."""
    head, _, inner = spec.partition("+")
    name, options = split_spec(head)
    if name != "delta" or "inner" in options or not inner.strip():
        raise ValueError(f"'{spec}': delta stands before the codec of the changes, as in delta+block:bits=4.")
    values: dict[str, Any] = {"inner": parse_codec(inner), **options}
    if "first" in options:
        values["first"] = parse_codec(options["first"].replace("/", ":").replace(";", ","))
    return build(Delta, name, values, spec)
