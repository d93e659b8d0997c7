"""How long a step takes, estimated from what it computes and moves, by the speed of a device.

`fit --calibrate` takes the speeds of this machine and keeps them; without, those of a data-centre GPU are assumed.
Only ratios of estimates mean anything: kernels overlap, and few run at these speeds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...codecs import parse_codec
from .counts import Count

FILE = "fit.json"


@dataclass(frozen=True)
class Speed:
    """Per second: floating point operations in a matrix product, bytes that an operation reads and writes, bytes that
    a codec does, bytes to the host and back.  where: the device, for the reader."""

    flops: float
    moved: float
    codec: float
    link: float
    where: str

    def seconds(self, count: Count, offloaded: float = 0.0) -> float:
        """offloaded: bytes that go to the host and come back."""
        return (count.flops / self.flops + count.moved / self.moved + count.codec / self.codec
                + 2 * offloaded / self.link)  # fmt: skip


# An A100 at about half of what its data sheet promises.
GPU = {
    "bf16": Speed(1.5e14, 1.2e12, 8e11, 2e10, "assumed: an A100-like GPU"),
    "fp16": Speed(1.5e14, 1.2e12, 8e11, 2e10, "assumed: an A100-like GPU"),
    "fp32": Speed(6e13, 1.2e12, 8e11, 2e10, "assumed: an A100-like GPU"),
}
CPU = Speed(1e11, 1e10, 2e9, 1e10, "assumed: a CPU with two cores")


def speed_of(device: str, dtype: str) -> Speed:
    """As measured on this machine and kept, else assumed."""
    try:
        found = json.loads(_file().read_text())[f"{device} {dtype}"]
        return Speed(**{key: found[key] for key in Speed.__dataclass_fields__})
    except (OSError, ValueError, KeyError, TypeError):
        return GPU[dtype] if device == "cuda" else CPU


def calibrate(device: str, dtype: str) -> Speed:
    """The speeds of this machine, measured within seconds and kept in the user's cache folder."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    n, width = (4096, 4096) if device == "cuda" else (512, 1024)
    a, b = torch.randn(n, width, device=device).to(kind), torch.randn(width, width, device=device).to(kind)
    x = torch.randn(n * width, device=device).to(kind)
    codec = parse_codec("block:bits=4,round=stochastic")
    state = codec.init_state("fit")
    shaped = x.view(n, width)

    def both_ways() -> None:
        codec.decode(codec.encode(shaped, state))

    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"this machine's CPU, {threads} threads"
    found = Speed(
        2 * n * width * width / _seconds(lambda: a @ b, device),
        2 * x.nbytes / _seconds(lambda: x + 1, device),
        # As the counts have it: tensor and codes, there and back.
        2 * (x.nbytes + codec.encode(shaped, state).nbytes) / _seconds(both_ways, device),
        GPU["fp32"].link, f"measured: {name}",
    )  # fmt: skip
    path = _file()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, f"{device} {dtype}": asdict(found)}, indent=1) + "\n")
    return found


def _seconds(run: Callable[[], object], device: str, repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times)[repeats // 2]


def _file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "hf_actcompress" / FILE
