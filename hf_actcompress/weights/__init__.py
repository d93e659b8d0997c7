"""Smaller weights: Learning-Compression, compressed checkpoints, structured pruning, distillation, quantization.

    from hf_actcompress.weights import LCCallback, load_compressed

Names are loaded when they are first used, so that none costs what another needs.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Compression": "base", "parse_compression": "compressions",
    "find_tasks": "scheme", "parse_scheme": "scheme",
    "LearningCompression": "learning",
    "LCCallback": "lc",
    "StructuredPruner": "structured", "PruningCallback": "structured", "prune": "structured",
    "drop_layers": "depth",
    "save_pruned": "manifest", "load_pruned": "manifest", "shape_manifest": "manifest",
    "DistillationTrainer": "distillation", "distillation_loss": "distillation",
    "quantize_static": "quantize", "prepare_qat": "quantize", "convert": "quantize", "save_quantized": "quantize",
    "load_quantized": "quantize",
    "quantize_weights": "weight_only", "binarize": "weight_only", "finish_binarize": "weight_only",
    "save_few_bits": "weight_only", "load_few_bits": "weight_only",
    "count_bits": "checkpoint", "load_compressed": "checkpoint", "read_manifest": "checkpoint",
    "save_compressed": "checkpoint",
}  # fmt: skip
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
