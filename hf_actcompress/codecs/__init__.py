"""Codecs: tensor -> payload -> tensor.  Nothing here knows modules, ranks or transports.

The import of a codec's class is its line in the registry: each module registers its own (registry.py).
"""

from .base import Codec, CodecState, Traits
from .block import Block
from .chain import Chain
from .delta import Delta
from .feedback import Feedback
from .float8 import Float8
from .identity import Identity
from .kmeans import KMeans
from .lowrank import LowRank
from .parse import parse_codec
from .payload import Payload, raw_nbytes
from .registry import CODECS, codec_names, register_codec
from .rotated import Rotated
from .rounding import RoundingState
from .sample_cache import sample_ids
from .sign import Sign
from .sort import Sort
from .topk import TopK
from .trellis import Trellis
from .uniform import Uniform
