"""What a new tensor costs beside the work on it, and operators in C++ beside the same in plain torch.

    python benchmarks/operators.py

Median milliseconds of 30 calls, in turn.  Writes benchmarks/results/operators.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import harness
import torch
from harness import median_ms

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops.library import VARIABLE
from hf_actcompress.ops.memory import fresh


def with_kernels(choice: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        os.environ[VARIABLE] = choice
        return call()

    return run


def main() -> None:
    harness.arguments(__doc__).parse_args()
    large, out, cpu = torch.randn(1 << 24), torch.empty(1 << 24), torch.device("cpu")
    pages = median_ms({
        "x.clone()": large.clone,
        "the same into memory that is in use": lambda: out.copy_(large),
        "the same into a new tensor on huge pages": lambda: fresh(1 << 24, torch.float32, cpu).copy_(large),
    })  # fmt: skip
    x, codec = torch.randn(4096, 1536), parse_codec("block:bits=4,equalize=none,round=stochastic")
    calls = {
        "groups of block, 4 bits, stochastic": lambda: codec.encode(x),
    }
    ways = {"C++": "1", "plain torch": "0"}
    kernels = {name: median_ms({way: with_kernels(choice, call) for way, choice in ways.items()})
               for name, call in calls.items()}  # fmt: skip
    harness.save("operators", pages_ms=pages, kernels_ms=kernels)
    print(json.dumps({"pages_ms": pages, "kernels_ms": kernels}, indent=1))


if __name__ == "__main__":
    main()
