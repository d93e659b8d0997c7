"""What is held of a run of memory in place of a saved tensor: itself, a codec's payload, bits, or a way to make it.

Every kind has `get()`, the values as a flat tensor in the order of memory, which may be called any number of times,
and `nbytes`, what is held for it.  This file knows tensors and codecs, not autograd.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..codecs import Codec, CodecState, Payload
from ..ops.bitmaps import pack_flags
from ..ops.memory import fresh
from .masks import unpack_flags
from .rules import Bits, Sides

# Elements; smaller tensors are a thousandth of the bytes.  What a pooler or a classifier takes is among them, and half
# of the error of all gradients would come from there.
SMALLEST = 1 << 14
SHORT = 32  # values; a shorter row is joined with its neighbours, since a scale takes as much as 8 codes of 4 bits


@dataclass(frozen=True)
class Layout:
    """Shape and strides of a tensor, to make it again of its values in memory order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        return cls(tuple(x.shape), x.stride())

    def restore(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.shape, self.stride)


def flatten(x: Tensor) -> tuple[Tensor, Layout, bool]:
    """The values of `x` in the order in which they lie, contiguous; their layout; whether `x` has gaps in its memory,
    so that the values are a copy without them.

    Expanded dimensions (stride 0) are one value long.  The layout keeps the order of the dimensions, on which that of
    the results of operations depends.
    """
    if x.is_contiguous():
        return x, Layout.of(x), False
    own = x[tuple(slice(0, 1) if stride == 0 and size > 1 else slice(None)
                  for size, stride in zip(x.shape, x.stride(), strict=True))]  # fmt: skip
    order = sorted(range(own.dim()), key=lambda d: (-own.stride(d), -own.shape[d]))
    run, stride, gaps = own.permute(order), list(x.stride()), False
    if not run.is_contiguous():
        run, gaps = run.contiguous(), True
        for place, d in enumerate(order):
            stride[d] = 0 if x.stride(d) == 0 and x.shape[d] > 1 else run.stride(place)
    if order != sorted(order) and run.dim() == 4:  # channels_last: codecs take four dimensions for [B, C, H, W]
        run = run.view(-1, run.shape[-1])
    return run, Layout(tuple(x.shape), tuple(stride)), gaps


class Exact:
    """The memory itself."""

    how, codec = "exactly", None

    def __init__(self, run: Tensor) -> None:
        self.run = run

    def get(self) -> Tensor:
        return self.run.reshape(-1)

    @property
    def nbytes(self) -> int:
        return self.run.numel() * self.run.element_size()


class Encoded:
    """Values as a codec's payload.

    row: values of a row, where the codec took rows that were filled up to a multiple of 8.
    place: the name of the place where the tensor was saved.
    """

    how, place = "codes", ""

    def __init__(self, codec: Codec, payload: Payload, row: int | None = None) -> None:
        self.codec, self.payload, self.row = codec, payload, row

    def get(self) -> Tensor:
        y = self.codec.decode(self.payload)
        return (y if self.row is None else y[:, : self.row]).reshape(-1)

    @property
    def nbytes(self) -> int:
        return self.payload.nbytes


def encode(
    codec: Codec, run: Tensor, state: CodecState | None, nonfinite: Tensor | None, rows: bool = True
) -> Encoded:
    """Codes of a contiguous tensor.

    rows: groups of values that share a scale are parts of a row, which is its last dimension, or several of the last
        where that is short.
    """
    width = row_of(tuple(run.shape)) if rows else None
    codec, padded = codec.in_rows(width) if width else (codec, None)
    if padded is None:
        return Encoded(codec, codec.encode(run, state, nonfinite=nonfinite))
    table = run.view(-1, width)
    filled = torch.cat([table, table[:, -1:].expand(-1, padded - width)], 1)
    return Encoded(codec, codec.encode(filled, state, nonfinite=nonfinite), width)


def row_of(shape: tuple[int, ...]) -> int:
    """Values of a row of a contiguous tensor of that shape."""
    row, dims = 1, list(shape)
    while dims and row < SHORT:
        row *= dims.pop()
    return row


class Flags:
    """One bit for each value.

    exact: the two values are all that there were, as in a mask; else they stand for two sides of a bound.
    """

    how, codec = "one bit", None

    def __init__(
        self, bits: Tensor, n: int, low: float, high: float, dtype: torch.dtype, *, exact: bool = False
    ) -> None:
        self.bits, self.n, self.low, self.high, self.dtype, self.exact = bits, n, low, high, dtype, exact

    @classmethod
    def of(cls, run: Tensor, rule: Bits, *, exact: bool = False) -> Flags:
        bits = pack_flags(run, rule.low, rule.high)
        return cls(bits, run.numel(), rule.below, rule.above, run.dtype, exact=exact)

    def get(self) -> Tensor:
        return unpack_flags(self.bits, (self.n,), self.low, self.high, self.dtype)

    @property
    def nbytes(self) -> int:
        return self.bits.numel()


class Sided:
    """Values that stay on their side of a bound, where a slope jumps: whatever keeps them, and one bit for each.

    flags: of what lies above the low bound, and below the high one if there is one.
    """

    def __init__(self, values: Any, run: Tensor, rule: Sides) -> None:
        self.values, self.rule = values, rule
        self.flags = Flags.of(run, Bits(rule.low, rule.high, 0.0, 1.0))
        self.codes, self.how, self.codec = getattr(values, "codes", values), values.how, values.codec

    @property
    def place(self) -> str:
        return self.values.place

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.flags.nbytes

    def get(self) -> Tensor:
        y, inside, low, high = self.values.get(), self.flags.get().bool(), self.rule.low, self.rule.high
        near = max(abs(low) * 2**-7, least(y.dtype))  # a bound itself is outside
        if high is None:
            return torch.where(inside, y.clamp_min(low + near), y.clamp_max(low))
        outside = torch.where(y < (low + high) / 2, y.clamp_max(low), y.clamp_min(high))
        return torch.where(inside, y.clamp(low + near, high - near), outside)


def least(dtype: torch.dtype) -> float:
    """A positive number for values that are above 0 and were rounded to it: small, but products with gradients are no
    subnormal numbers, which CPUs are slow with."""
    return max(torch.finfo(dtype).tiny, 2.0**-60)


class Narrow:
    """Integers in a smaller dtype."""

    how, codec = "integers", None

    def __init__(self, run: Tensor, narrow: torch.dtype) -> None:
        self.values, self.dtype = run.reshape(-1).to(narrow), run.dtype

    def get(self) -> Tensor:
        return fresh(self.values.numel(), self.dtype, self.values.device).copy_(self.values)

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()


class Empty:
    """Nothing: only the shape is needed."""

    how, codec, nbytes = "shape", None, 0

    def __init__(self, run: Tensor) -> None:
        self.n, self.dtype, self.device = run.numel(), run.dtype, run.device

    def get(self) -> Tensor:
        return torch.zeros(self.n, dtype=self.dtype, device=self.device)


class Again:
    """Values that an operation makes of others that are kept.

    run: returns its result.
    layout: of the first result, which fills its memory.
    shared: whether several operations saved it.
    """

    how, codec, nbytes = "made again", None, 0

    def __init__(self, run: Callable[[], Tensor], layout: Layout, shared: bool = True) -> None:
        self.run, self.layout, self.shared = run, layout, shared

    def get(self) -> Tensor:
        y, (shape, stride) = self.run(), (self.layout.shape, self.layout.stride)
        if tuple(y.shape) != shape:
            raise RuntimeError(f"an operation that ran again gave the shape {tuple(y.shape)} in place of {shape}")
        if y.stride() != stride or y.storage_offset():  # the first one wrote into memory that was there
            y = torch.empty_strided(shape, stride, dtype=y.dtype, device=y.device).copy_(y)
        return y.as_strided((y.numel(),), (1,))


def narrowest(x: Tensor) -> torch.dtype | None:
    """The smallest integer dtype that holds all of `x`, if it is smaller than its own.  Waits for the device."""
    low, high = (int(v) for v in torch.aminmax(x))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        info = torch.iinfo(dtype)
        if info.min <= low and high <= info.max:
            return dtype if dtype.itemsize < x.dtype.itemsize else None
    return None


class Memory:
    """What is held of each storage, so that what lies in the same memory is held once."""

    def __init__(self) -> None:
        self._storages: dict[int, tuple[StorageWeakRef, Held]] = {}

    def of(self, x: Tensor) -> Held:
        storage = x.untyped_storage()
        entry = self._storages.get(storage._cdata)
        if entry is None or entry[0].expired():  # the reference keeps the address from being used again meanwhile
            entry = self._storages[storage._cdata] = (StorageWeakRef(storage), Held())
        return entry[1]

    def clear(self) -> None:
        self._storages.clear()


class Held:
    """Contents that stand for places of one storage, by a place and how it is kept."""

    def __init__(self) -> None:
        self._contents: dict[tuple, weakref.ref] = {}
        self._counted: set[tuple] = set()

    def get(self, how: Any, place: tuple) -> Any:
        reference = self._contents.get((how, place))
        return None if reference is None else reference()

    def put(self, how: Any, place: tuple, content: Any, run: Tensor) -> int:
        """Returns the bytes that autograd would hold for the place, the first time."""
        self._contents[how, place] = weakref.ref(content)
        if place in self._counted:
            return 0
        self._counted.add(place)
        return run.numel() * run.element_size()


def place_of(x: Tensor, run: Tensor, gaps: bool) -> tuple:
    """A key of the memory of `x` within its storage.  One with gaps is told by its strides too."""
    strides = (tuple(x.shape), x.stride()) if gaps else None
    return x.storage_offset(), run.numel(), x.dtype, x._version, strides
