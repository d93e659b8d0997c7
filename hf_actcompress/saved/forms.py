"""What the graph holds in place of a saved tensor: the tensor itself, a codec's payload, or a packed tensor.

Every class has `unpack()`, which may be called any number of times.  Those that hold values have `nbytes`.
This file knows tensors and codecs, not autograd's hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, CodecState, Payload
from ..ops.memory import Pool, fresh
from .masks import unpack_flags
from .slopes import decode_slopes, encode_slopes


class Passthrough:
    """The tensor itself.  Like autograd, it refuses one that was changed in place since."""

    def __init__(self, x: Tensor) -> None:
        # Not x, whose grad_fn would make a cycle of an output and the node that saved it.
        self.tensor, self.version = x.detach(), x._version

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"saved tensor of shape {tuple(self.tensor.shape)} is at version {self.tensor._version}, expected "
                f"version {self.version}. Use the operation's version that is not in place, or clone its input first."
            )
        return self.tensor


@dataclass(frozen=True)
class Layout:
    """Shape and strides of a tensor, to make it again of its values in memory order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def restore(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride)


def flatten(x: Tensor) -> tuple[Tensor, Layout] | None:
    """A contiguous view of the memory of `x`, and its layout; None if `x` leaves gaps in that memory.

    Expanded dimensions (stride 0) are one value long in the view.
    """
    if x.is_contiguous():
        return x, Layout(tuple(x.shape), x.stride())
    own = x[tuple(slice(0, 1) if stride == 0 and size > 1 else slice(None)
                  for size, stride in zip(x.shape, x.stride(), strict=True))]  # fmt: skip
    order = sorted(range(own.dim()), key=lambda d: (-own.stride(d), -own.shape[d]))
    run = own.permute(order)
    if not run.is_contiguous():
        return None
    if order != sorted(order) and run.dim() == 4:  # channels_last: codecs take four dimensions for [B, C, H, W]
        run = run.view(-1, run.shape[-1])
    return run, Layout(tuple(x.shape), x.stride())


class Encoded:
    """Values as a codec's payload."""

    def __init__(self, codec: Codec, payload: Payload) -> None:
        self.codec, self.payload, self.bits = codec, payload, codec.traits.bits

    def unpack(self) -> Tensor:
        return self.codec.decode(self.payload)

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes


class Packed:
    """Values as another, smaller tensor.

    decode: makes of `values` a contiguous tensor.  bits: of an element, where they were chosen.
    """

    codec = None

    def __init__(self, values: Tensor, decode: Callable[[Tensor], Tensor], bits: int | None = None) -> None:
        self.values, self.decode, self.bits = values, decode, bits

    def unpack(self) -> Tensor:
        return self.decode(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()


def two_valued(bits: Tensor, shape: tuple[int, ...], low: float, high: float, dtype: torch.dtype) -> Packed:
    """A tensor of two different values, one bit for each element."""
    return Packed(bits, partial(unpack_flags, shape=shape, low=low, high=high, dtype=dtype))


def slopes(x: Tensor, function: str, bits: int, state: CodecState | None, nonfinite: Tensor | None = None) -> Packed:
    """The input of an activation function as the function's slope there."""
    codes = encode_slopes(x, function, bits, state, nonfinite)
    return Packed(codes, partial(decode_slopes, shape=tuple(x.shape), dtype=x.dtype, name=function, bits=bits), bits)


def integers(x: Tensor) -> Packed | None:
    """Integers in the smallest dtype that holds them; None if that is their own, and on a GPU, which would have to be
    waited for to find out."""
    narrow = narrowest(x) if x.device.type == "cpu" else None
    return None if narrow is None else Packed(x.to(narrow), partial(_widened, dtype=x.dtype))


def _widened(values: Tensor, dtype: torch.dtype) -> Tensor:
    return fresh(values.numel(), dtype, values.device).view(values.shape).copy_(values)


class Shared:
    """One of the saved tensors that are views of the same memory, whose values are stored once, as `content`.

    pool: scratch memory for decoding, shared by all tensors of one forward pass.
    """

    def __init__(self, content: Any, layout: Layout | None, shape: tuple[int, ...], pool: Pool) -> None:
        self.content, self.layout, self.shape, self.pool = content, layout, shape, pool

    def unpack(self) -> Tensor:
        with self.pool.used():
            x = self.content.unpack()
        return x.view(self.shape) if self.layout is None else self.layout.restore(x)


class Sharded:
    """A DTensor: its packed local shard and its sharding."""

    def __init__(self, packed: Any, x: Tensor) -> None:
        self.packed, self.kind, self.spec = packed, type(x), x._spec

    def unpack(self) -> Tensor:
        return self.kind(self.packed.unpack(), self.spec, requires_grad=False)


def narrowest(x: Tensor) -> torch.dtype | None:
    """The smallest integer dtype that holds all of `x`, if it is smaller than its own."""
    low, high = (int(v) for v in torch.aminmax(x))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return dtype if dtype.itemsize < x.dtype.itemsize else None
    return None
