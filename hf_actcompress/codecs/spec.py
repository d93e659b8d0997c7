"""The grammar of all specs: `name:option=value,option=value`.

Codecs, targets, budgets, compressions of weights and clusters are all written this way.  `split_spec` takes a spec
apart, `build` makes a dataclass of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def split_spec(spec: str, what: str = "codec spec", example: str = "block:bits=4") -> tuple[str, dict[str, str]]:
    """"block:bits=4,group=64" -> ("block", {"bits": "4", "group": "64"}); spaces around words are dropped.

    what, example: how error messages name such a spec, and one that is right.
    Raises ValueError for an item that is not option=value, and for an option that is given twice.
    """
    name, _, tail = spec.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"'{item}' in the {what} '{spec}' is not option=value. Example: {example}.")
        if key in options:
            raise ValueError(f"The {what} '{spec}' gives {key} twice.")
        options[key] = value
    return name.strip(), options


def build(cls: type[T], name: str, options: Mapping[str, Any], spec: str) -> T:
    """The dataclass `cls` with `options`; those that are text are converted to the type of their field.

    name: of what is built, and spec: as the user wrote it, for error messages.
    Raises ValueError for an option that `cls` does not have, and for a value that is not of its type.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    values = {}
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f"{name} has no option '{key}' (in '{spec}').{did_you_mean(key, known)} Options: "
                f"{', '.join(known) or 'none'}."
            )
        values[key] = convert(name, key, value, hints[key]) if isinstance(value, str) else value
    return cls(**values)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """" Did you mean 'block'?" for a word near one of the known ones, else nothing."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" Did you mean '{close[0]}'?" if close else ""


def convert(name: str, key: str, text: str, hint: Any) -> Any:
    """Text as the type that an annotation names: int, float, bool, str, a Literal, or one of these or None."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    if text in words:
        return text
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name}: {key}={text!r} is neither true nor false.")
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                what = "an integer" if kind is int and float not in kinds else "a number"
            if str not in kinds and (kind is float or float not in kinds):
                raise ValueError(f"{name}: {key}={text!r} is not {what}.")
    return text


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union
