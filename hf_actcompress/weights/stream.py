"""The values of compressed files: one stream of each dtype, written and read in order.

What a file says is checked before anything is allocated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bitstream import nbytes, pack, unpack

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.bool, torch.complex64, torch.complex128,
)}  # fmt: skip


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    """The dtype that a file names."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype {name!r} is unknown")
    return DTYPES[name]


def whole(value: Any, least: int, most: int, field: str) -> int:
    """A whole number from a file, if it lies between `least` and `most`."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{field}={value!r} is no whole number from {least} to {most}")
    return value


class Writer:
    """Collects the stored form: one stream of values a dtype; codes of few bits go to that of uint8."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Tensor]] = {}

    def put(self, x: Tensor) -> None:
        self.streams.setdefault(name_of(x.dtype), []).append(x.detach().cpu().reshape(-1))

    def codes(self, codes: Any, width: int) -> None:
        self.put(torch.from_numpy(pack(np.asarray(codes, np.int64), width)))

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.streams.items()}


class Reader:
    """Hands out again, in order, what a Writer collected.  Raises ValueError beyond the end."""

    def __init__(self, streams: dict[str, Tensor]) -> None:
        self.streams, self.at = streams, dict.fromkeys(streams, 0)

    def take(self, count: int, dtype: str = "float32") -> Tensor:
        stream, start = self.streams.get(dtype), self.at.get(dtype, 0)
        left = 0 if stream is None else stream.numel() - start
        whole(count, 0, left, f"number of {dtype} values")
        if stream is None:
            return torch.zeros(0, dtype=dtype_of(dtype))
        self.at[dtype] = start + count
        return stream[start : start + count].clone()

    def codes(self, count: int, width: int, below: int, field: str) -> Any:
        """`count` codes of `width` bits, all less than `below`."""
        found = unpack(self.take(nbytes(count, width), "uint8").numpy(), count, width)
        if len(found) and int(found.max()) >= below:
            raise ValueError(f"{field}: the file holds {int(found.max())}, and there are {below}")
        return found

    def finish(self) -> None:
        rest = {name: s.numel() - self.at[name] for name, s in self.streams.items() if self.at[name] != s.numel()}
        if rest:
            raise ValueError(f"the file holds more values than the manifest names: {rest}")
