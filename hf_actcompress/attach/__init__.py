"""Compression on a model: compress_model, the Handle that it returns, remove_compression."""

from .handle import Handle
from .model import compress_model, remove_compression, unwrap

__all__ = ["Handle", "compress_model", "remove_compression", "unwrap"]
