"""Pipeline training whose stages exchange payloads, on torch.distributed.pipelining."""

from .engine import EarlySchedule1F1B, Shapes, forward_only
from .links import LinkError
from .scaler import PipelineGradScaler
from .split import StageModule, merge, split
from .stage import CompressedPipelineStage

__all__ = [
    "CompressedPipelineStage", "EarlySchedule1F1B", "LinkError", "PipelineGradScaler", "Shapes", "StageModule",
    "forward_only", "merge", "split",
]  # fmt: skip
