"""Where the time of one boundary goes: the activation after MobileNetV2's stem, 64 images of 96 px, channels last.

    python benchmarks/boundary_profile.py

Median milliseconds of 30 calls of each part of sites/boundary.py's `Channel`, and of whole calls.  Writes
benchmarks/results/boundary_profile.json.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_actcompress.boundary.channel import Channel
from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops.compiled import VARIABLE
from hf_actcompress.ops.reductions import representable
from hf_actcompress.workloads.results import environment

PATH = Path(__file__).parent / "results" / "boundary_profile.json"
CODECS = ("identity", "uniform:bits=8", "block:bits=8", "block:bits=4", "sort:bits=8", "kmeans:bits=4",
          "topk:ratio=0.1", "lowrank:rank=8", "float8")  # fmt: skip
SHAPE = (64, 32, 48, 48)


def median(call: Callable[[], Any], repeats: int = 30) -> float:
    call()
    call()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return 1e3 * statistics.median(found)


def main() -> None:
    os.environ.setdefault(VARIABLE, "1")
    x = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
    flat = x.contiguous()
    parts = {
        "clone": median(x.clone),
        "look for values that cannot be coded": median(lambda: representable(x)),
        "to the order of the codec": median(x.contiguous),
        "back to channels last": median(lambda: torch.empty_like(x).copy_(flat)),
    }
    rows = {}
    for spec in tqdm(CODECS, desc="codecs"):
        codec = parse_codec(spec)
        state, channel = codec.init_state("here"), Channel("here", "forward", codec)
        rows[spec] = {
            "roundtrip": median(lambda codec=codec, state=state: codec.roundtrip(flat, state, check=False)),
            "whole": median(lambda channel=channel: channel(x)),
        }
    result = {"command": "python benchmarks/boundary_profile.py", "shape": SHAPE, "ms": parts, "codecs": rows,
              "environment": environment()}  # fmt: skip
    PATH.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in parts.items():
        print(f"{name:40s} {value:6.2f} ms")
    for spec, row in rows.items():
        print(f"{spec:40s} roundtrip {row['roundtrip']:6.2f} ms, whole {row['whole']:6.2f} ms")


if __name__ == "__main__":
    main()
