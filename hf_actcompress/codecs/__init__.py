"""Pure codecs: tensor -> payload -> tensor.  Nothing here knows modules, ranks or transports."""

from .base import Codec, CodecState, Payload, Traits, raw_nbytes
from .block import Block
from .chain import Chain
from .delta import Delta, sample_ids
from .feedback import Feedback
from .float8 import Float8
from .identity import Identity
from .kmeans import KMeans
from .lowrank import LowRank
from .registry import CODECS, codec_names, parse_codec
from .sort import Sort
from .topk import TopK
from .uniform import Uniform

__all__ = [
    "CODECS", "Block", "Chain", "Codec", "CodecState", "Delta", "Feedback", "Float8", "Identity", "KMeans", "LowRank",
    "Payload", "Sort", "TopK", "Traits", "Uniform", "codec_names", "parse_codec", "raw_nbytes", "sample_ids",
]  # fmt: skip
