"""What a new tensor costs beside the work on it, and kernels written by hand beside compiled ones.

    python benchmarks/kernels.py

Median milliseconds of 30 calls, in turn.  Writes benchmarks/results/kernels.json.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops.compiled import VARIABLE
from hf_actcompress.ops.cpu import native
from hf_actcompress.ops.memory import fresh
from hf_actcompress.saved.slopes import encode_slopes
from hf_actcompress.workloads.results import environment

PATH = Path(__file__).parent / "results" / "kernels.json"


def medians(calls: dict[str, Callable[[], Any]], repeats: int = 30) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-2, repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat >= 0:
                found[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def compiled(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with mock.patch.object(native, "_ready", lambda *args: None):
            return call()

    return run


def main() -> None:
    os.environ.setdefault(VARIABLE, "1")
    large, out, cpu = torch.randn(1 << 24), torch.empty(1 << 24), torch.device("cpu")
    pages = medians({
        "x.clone()": large.clone,
        "the same into memory that is in use": lambda: out.copy_(large),
        "the same into a new tensor on huge pages": lambda: fresh(1 << 24, torch.float32, cpu).copy_(large),
    })  # fmt: skip
    x, codec = torch.randn(4096, 1536), parse_codec("block:bits=4,equalize=none,round=stochastic")
    calls = {
        "groups of block, 4 bits, stochastic": lambda: codec.encode(x),
        "slopes of GELU, 3 bits": lambda: encode_slopes(x, "gelu", 3, None),
    }
    kernels = {name: medians({"by hand": call, "compiled": compiled(call)}) for name, call in calls.items()}
    result = {"command": "python benchmarks/kernels.py", "pages_ms": pages, "kernels_ms": kernels,
              "environment": environment()}  # fmt: skip
    PATH.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"pages_ms": pages, "kernels_ms": kernels}, indent=1))


if __name__ == "__main__":
    main()
