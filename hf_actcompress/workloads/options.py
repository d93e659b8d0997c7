"""The options of compression on a script's command line, made from the fields of ActCompressConfig."""

from __future__ import annotations

import re
from dataclasses import field, fields, make_dataclass
from typing import Any

from hf_actcompress.config import ActCompressConfig

# Field -> option.  Their names must not meet those of TrainingArguments (`seed`).
OPTIONS = {f.name: option for f in fields(ActCompressConfig) if (option := f.metadata.get("option", f.name))}


def _as_typed(text: str) -> str:
    """An error's text with options as they stand on a command line: `--first` for `first=`."""
    either = "|".join(OPTIONS)
    text = re.sub(rf"^({either})(?=[:\[])", lambda m: f"--{OPTIONS[m[1]]}", text)
    return re.sub(rf"(?<![\w:,'-])({either})=(?=(\S?))", lambda m: f"--{OPTIONS[m[1]]}" + " " * (m[2] != ""), text)


def _to_config(self: Any, default: str | None = None) -> ActCompressConfig | None:
    """The configuration, or None for `--codec none` without `--saved` or `--reduce`.

    default: the codec where none of `--codec`, `--saved` and `--reduce` is given.
    Raises ValueError, which names options as they are typed.
    """
    values = {name: getattr(self, option) for name, option in OPTIONS.items()}
    codec = values["codec"].strip().lower() if isinstance(values["codec"], str) else values["codec"]
    others = values["saved"] if values["saved"] is not None else values["reduce"]
    if codec == "none":
        values["codec"] = None
        if others is None:
            return None
    elif codec is None and others is None:
        values["codec"] = default
    try:
        return ActCompressConfig(**values)
    except ValueError as error:
        raise ValueError(_as_typed(str(error))) from None


# For HfArgumentParser.
CompressionArguments = make_dataclass(
    "CompressionArguments",
    [(OPTIONS[f.name], f.type, field(default=f.default, metadata={"help": f.metadata["help"]}))
     for f in fields(ActCompressConfig) if f.name in OPTIONS],
    namespace={"__doc__": "Command-line options, made from the fields of ActCompressConfig.", "__module__": __name__,
               "to_config": _to_config},
)  # fmt: skip
CompressionArguments.__module__ = __name__
