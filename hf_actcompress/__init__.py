"""hf_actcompress: compress what training keeps and moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .attach import Handle, compress_model, remove_compression
from .codecs import Codec, CodecState, Payload, codec_names, parse_codec
from .config import ActCompressConfig, CompressionArguments
from .models.layers import Layer, find_layers
from .ops.cpu.malloc import keep_freed_memory

if TYPE_CHECKING:
    from .callback import ActCompressCallback

__version__ = "0.1.0"
__all__ = [
    "ActCompressCallback", "ActCompressConfig", "Codec", "CodecState", "CompressionArguments", "Handle", "Layer",
    "Payload", "codec_names", "compress_model", "find_layers", "keep_freed_memory", "parse_codec",
    "remove_compression",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; loops without a Trainer do not need it.
    if name == "ActCompressCallback":
        from .callback import ActCompressCallback

        return ActCompressCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
