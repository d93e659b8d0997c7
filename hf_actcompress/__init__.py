"""hf_actcompress: compress what training keeps and moves."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attach import Handle, compress_model, remove_compression
    from .callback import ActCompressCallback
    from .codecs import Codec, CodecState, Payload, codec_names, parse_codec, register_codec
    from .config import ActCompressConfig
    from .models.layers import Layer, find_layers
    from .ops.cpu.malloc import keep_freed_memory
    from .saved.rules import register_saved_rule
    from .workloads.options import CompressionArguments

__version__ = "0.2.0.dev0"
# Where each public name lives.  They are loaded when first asked for, so that `hf-actcompress --help` needs no torch
# and a loop without a Trainer no transformers.
_HOMES = {
    "ActCompressCallback": "callback", "ActCompressConfig": "config", "Codec": "codecs", "CodecState": "codecs",
    "CompressionArguments": "workloads.options", "Handle": "attach", "Layer": "models.layers", "Payload": "codecs",
    "codec_names": "codecs", "compress_model": "attach", "find_layers": "models.layers",
    "keep_freed_memory": "ops.cpu.malloc", "parse_codec": "codecs", "register_codec": "codecs",
    "register_saved_rule": "saved.rules", "remove_compression": "attach",
}  # fmt: skip
__all__ = [
    "ActCompressCallback", "ActCompressConfig", "Codec", "CodecState", "CompressionArguments", "Handle", "Layer",
    "Payload", "codec_names", "compress_model", "find_layers", "keep_freed_memory", "parse_codec",
    "register_codec", "register_saved_rule", "remove_compression",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
