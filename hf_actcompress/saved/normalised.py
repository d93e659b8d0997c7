"""The input of a norm, kept as codes of its normalised value."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..codecs import Codec
from .kept import Encoded, Layout, flatten

Statistic = Callable[[], Tensor]


class Normalised:
    """The normalised value, whose statistics are kept exactly.

    codes: of the normalised values, a flat run in the memory order of the input.
    layout: of the input, to whose shape the statistics broadcast.
    """

    how = "normalised"

    def __init__(self, codes: Encoded, layout: Layout, mean: Statistic, rstd: Statistic) -> None:
        self.codes, self.layout, self.mean, self.rstd = codes, layout, mean, rstd

    @classmethod
    def of(cls, x: Tensor, mean: Statistic, rstd: Statistic, encode: Callable[[Tensor], Encoded]) -> Normalised:
        normal = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        torch.sub(x, mean(), out=normal).mul_(rstd())
        return cls(encode(flatten(normal)[0]), Layout.of(x), mean, rstd)

    @property
    def codec(self) -> Codec | None:
        return self.codes.codec

    @property
    def place(self) -> str:
        return self.codes.place

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes

    def normalised(self) -> Tensor:
        """With shape and strides of the input."""
        return self.layout.restore(self.codes.get())

    def get(self) -> Tensor:
        flat = self.codes.get()
        x = self.layout.restore(flat)
        x.div_(self.rstd()).add_(self.mean())
        return flat


def statistic(value: Statistic, operation: str, shape: tuple[int, ...]) -> Statistic:
    """A mean or deviation as the node of a norm holds it, in a shape that broadcasts to its input [B, C, ...]."""
    ones = [1] * (len(shape) - 2)
    if "Batch" in operation:
        return lambda: value().view(1, -1, *ones)
    if "Group" not in operation:
        return value

    def by_channel() -> Tensor:
        groups = value()
        return groups.repeat_interleave(shape[1] // groups.shape[-1], dim=-1).view(shape[0], -1, *ones)

    return by_channel
