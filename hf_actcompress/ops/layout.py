"""The order in which a tensor's values lie in memory.

Images run with channels last, codecs count elements in the order of the shape.  Where the order makes no difference to
what becomes of a value, going there and back would cost more than the codec.
"""

from __future__ import annotations

from torch import Tensor


def memory_order(x: Tensor) -> list[int]:
    """The dimensions from the one of the longest stride on."""
    return sorted(range(x.dim()), key=lambda d: -x.stride(d))


def in_memory_order(x: Tensor) -> Tensor:
    """A view of the same values in the order in which they lie; contiguous for a dense tensor."""
    return x if x.is_contiguous() else x.permute(memory_order(x))


def dense(x: Tensor) -> Tensor:
    """`x` itself if a permutation makes it contiguous, else (expanded, sliced) a contiguous copy.

    Only dense tensors have a memory order that a result with the same strides shares.
    """
    return x if in_memory_order(x).is_contiguous() else x.contiguous()


def elements(x: Tensor, index: Tensor) -> Tensor:
    """Values of `x` at flat positions in the order of its shape, without moving the others."""
    if x.is_contiguous():
        return x.view(-1)[index]
    places = []
    for size in reversed(x.shape):
        places.append(index % size)
        index = index // size
    return x[tuple(reversed(places))]
