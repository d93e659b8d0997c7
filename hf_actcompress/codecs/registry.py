"""Codecs by name: those of this package, those that a program registers, and those of installed packages.

A package that brings a codec names it in its `pyproject.toml`; it is imported when somebody uses the name:

    [project.entry-points."hf_actcompress.codecs"]
    mine = "my_package.codec:Mine"
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from .base import Codec
from .spec import did_you_mean

ENTRY_POINTS = "hf_actcompress.codecs"
# Words that mean something else where a codec is named, and what to write there.
RESERVED = {
    "auto": "codec='auto:ratio=8' and saved='auto:budget=0.15' choose codecs; nothing else takes auto",
    "chain": "write a|b, such as topk:ratio=0.1|uniform:bits=8",
    "codec": "write the name of one, such as block:bits=4",
    "delta": "write delta+ before the codec of the changes, such as delta+block:bits=4",
    "ef": "write ef+ before a codec, such as ef+block:bits=4",
    "none": "write identity for tensors that stay as they are, or leave the option out",
}
CODECS: dict[str, type[Codec]] = {}
C = TypeVar("C", bound=type[Codec])


def register_codec(name: str) -> Callable[[C], C]:
    """Make a codec known to specs, configurations, commands, checkpoints and every site.

        @register_codec("mine")
        @dataclass(frozen=True)
        class Mine(Codec):
            bits: int = 4
            ...

    name: letters, digits, `-`, `_` and `.`, beginning with a letter.
    Raises ValueError for a name that is taken, and for a class that is not a frozen dataclass derived from Codec.
    """

    if not isinstance(name, str):
        raise ValueError('register_codec needs the codec\'s name: write @register_codec("name") above the class.')

    def add(cls: C) -> C:
        where = f"register_codec({name!r}) of {cls.__qualname__}"
        parameters = cls.__dict__.get("__dataclass_params__")
        if not issubclass(cls, Codec) or parameters is None or not parameters.frozen:
            raise ValueError(
                f"{where}: a codec is a frozen dataclass derived from hf_actcompress.Codec. Write "
                "@dataclass(frozen=True) between @register_codec and the class."
            )
        if not re.fullmatch(r"[A-Za-z][\w.-]*", name) or name in RESERVED:
            raise ValueError(
                f"{where}: the name begins with a letter, goes on with letters, digits, '-', '_' or '.', and is none "
                f"of {', '.join(RESERVED)}."
            )
        taken = CODECS.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{where}: the name belongs to {taken.__module__}.{taken.__qualname__}. Choose another.")
        cls.name = name
        CODECS[name] = cls
        return cls

    return add


def codec_names() -> list[str]:
    """All names that a spec may use, those of installed packages included."""
    return list(dict.fromkeys([*CODECS, *(point.name for point in _entry_points())]))


def codec_class(name: str, spec: str) -> type[Codec]:
    """The class of that name.  Raises ValueError with the names that exist, and if its package cannot be imported."""
    if (word := name.lower()) in RESERVED:
        raise ValueError(f"There is no codec '{name}': {RESERVED[word]}.")
    if name not in CODECS:
        for point in _entry_points():
            if point.name == name:
                _load(point)
                break
        else:
            names = codec_names()
            raise ValueError(
                f"Unknown codec '{name}' in '{spec}'.{did_you_mean(name, names)} Codecs: {', '.join(names)}; also "
                "a|b, ef+a and delta+a. A codec of your own is made known by @register_codec, in a module that is "
                "imported before its name is used."
            )
    return CODECS[name]


def _entry_points() -> list[EntryPoint]:
    return sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


def _load(point: EntryPoint) -> None:
    where = f"The codec '{point.name}' of the installed package {point.dist.name if point.dist else point.value}"
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{where} cannot be imported from {point.value}: {error}") from error
    if point.name not in CODECS:
        if not isinstance(found, type):
            raise ValueError(f"{where}: {point.value} is no codec class, and registers none of that name.")
        register_codec(point.name)(found)


def check_registered(codec: Codec) -> None:
    """Raise ValueError for a codec, or one inside it, whose class has no name by which a spec could tell it."""
    if not dataclasses.is_dataclass(codec):
        raise ValueError(
            f"The class {type(codec).__qualname__} is no frozen dataclass. Put @register_codec(\"name\") and "
            "@dataclass(frozen=True) above it."
        )
    inner = [v for f in dataclasses.fields(codec) if isinstance(v := getattr(codec, f.name), Codec)]  # type: ignore
    for part in inner:
        check_registered(part)
    cls = type(codec)
    if not inner and CODECS.get(codec.name) is not cls:
        raise ValueError(
            f"The class {cls.__qualname__} has no name that a spec, a configuration or a checkpoint could give. Put "
            f"@register_codec(\"{cls.__name__.lower()}\") above its @dataclass(frozen=True)."
        )
