"""Where the time of one boundary goes: the activation after MobileNetV2's stem, 64 images of 96 px, channels last.

    python benchmarks/boundary_profile.py

Median milliseconds of 30 calls of each part of a boundary's `Channel`, and of whole calls.  Writes
benchmarks/results/boundary_profile.json.
"""

from __future__ import annotations

import harness
import torch
from harness import median_ms
from tqdm import tqdm

from hf_actcompress.boundary.channel import Channel
from hf_actcompress.codecs import parse_codec

CODECS = ("identity", "uniform:bits=8", "block:bits=8", "block:bits=4", "sort:bits=8", "kmeans:bits=4",
          "topk:ratio=0.1", "lowrank:rank=8", "float8")  # fmt: skip
SHAPE = (64, 32, 48, 48)


def main() -> None:
    harness.arguments(__doc__).parse_args()
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    flat = x.contiguous()
    parts = median_ms({
        "clone": x.clone,
        "to the order of the codec": x.contiguous,
        "back to channels last": lambda: torch.empty_like(x).copy_(flat),
    })  # fmt: skip
    rows = {}
    for spec in tqdm(CODECS, desc="codecs"):
        codec = parse_codec(spec)
        state, channel = codec.init_state("here"), Channel("here", "forward", codec)
        rows[spec] = median_ms({
            "roundtrip": lambda codec=codec, state=state: codec.roundtrip(flat, state),
            "whole": lambda channel=channel: channel(x),
        })  # fmt: skip
    harness.save("boundary_profile", shape=SHAPE, ms=parts, codecs=rows)
    for name, value in parts.items():
        print(f"{name:40s} {value:6.2f} ms")
    for spec, row in rows.items():
        print(f"{spec:40s} roundtrip {row['roundtrip']:6.2f} ms, whole {row['whole']:6.2f} ms")


if __name__ == "__main__":
    main()
