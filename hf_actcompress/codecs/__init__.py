"""Pure codecs: tensor -> payload -> tensor.  Nothing here knows modules, ranks or transports."""

from ..ops.cpu.malloc import KeptMemory, keep_freed_memory
from ..ops.memory import Pool, fresh
from ..ops.reductions import representable
from .base import Codec, CodecState, Payload, raw_nbytes
from .block import Block
from .chain import Chain
from .delta import Delta, sample_ids
from .feedback import Feedback
from .float8 import Float8
from .identity import Identity
from .kmeans import KMeans
from .lowrank import LowRank
from .masks import pack_flags, pack_two_values, unpack_flags
from .registry import CODECS, codec_names, parse_codec
from .slopes import decode_slopes, encode_slopes
from .sort import Sort
from .topk import TopK
from .uniform import Uniform

__all__ = [
    "CODECS", "Block", "Chain", "Codec", "CodecState", "Delta", "Feedback", "Float8", "Identity", "KMeans",
    "KeptMemory", "LowRank", "Payload", "Pool", "Sort", "TopK", "Uniform", "codec_names", "decode_slopes",
    "encode_slopes", "fresh", "keep_freed_memory", "pack_flags", "pack_two_values", "parse_codec", "raw_nbytes",
    "representable", "sample_ids", "unpack_flags",
]  # fmt: skip
