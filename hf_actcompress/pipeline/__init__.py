"""Pipeline training whose stages exchange payloads, on torch.distributed.pipelining."""

from .split import StageModule, merge, split
from .stage import CompressedPipelineStage

__all__ = ["CompressedPipelineStage", "StageModule", "merge", "split"]
