"""Trellis-coded quantization: each value is coded with regard to its neighbours, at the same number of bits.

The levels are those of one bit more, dealt out to four subsets in turn.  A shift register of the last three path bits
says which two subsets the next value may use, the path bit which one of them, the other bits which level of the
subset.  So `bits` bits per value choose among 2**(bits + 1) levels, and the Viterbi algorithm finds the path of least
squared error (ops/trellis.py): a quarter less than the best levels for single values at 2 bits, a third less at 4.
Sources: Marcellin and Fischer, "Trellis coded quantization", 1990; the 8-state code of Ungerboeck, 1982 (its parity
check polynomials 13 and 04, octal, here as a feedforward encoder, which a decoder undoes without recursion).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import trellis
from ..ops.packing import pack, unpack
from ..ops.scales import safe_inverse
from .registry import register_codec
from .rotated import Rotated
from .transforms.levels import gauss_levels

# What the Lloyd-Max levels of one bit more are multiplied by: the least squared error on a unit Gaussian in rows of
# 128, to two digits; and that error (both: tests/codecs/test_trellis.py).
STRETCH = {1: 0.80, 2: 0.85, 3: 0.88, 4: 0.90, 5: 0.91, 6: 0.92, 7: 0.93, 8: 0.94}
DISTORTION = {1: 0.3083, 2: 0.0880, 3: 0.02424, 4: 0.00645, 5: 0.00166, 6: 0.000425, 7: 0.000108, 8: 0.0000275}


@register_codec("trellis")
@dataclass(frozen=True)
class Trellis(Rotated):
    """Rotated groups in trellis-coded levels: less error than `rotated` at the same bits, for several times the time.

    bits, group, prototypes: as of `rotated`; here three prototypes are the default.
    Payload: as of `rotated`.
    """

    prototypes: int = 3

    def _distortion(self, bits: int) -> float:
        return DISTORTION[bits]

    def _level_codes(self, y: Tensor, spread: Tensor, bits: int) -> Tensor:
        z = (y * safe_inverse(spread))[:, 0]
        return pack(trellis.encode(z, bits, subset_edges(bits, y.device), level_table(bits, 1.0, y.device)), bits)

    def _level_values(self, packed: Tensor, spread: Tensor, bits: int) -> Tensor:
        levels = level_table(bits, self._gain(bits), packed.device)
        return trellis.decode(unpack(packed[:, 0], bits, self.group), levels) * spread[:, 0]


@functools.cache
def trellis_levels(bits: int) -> tuple[float, ...]:
    """2**(bits + 1) levels for a unit Gaussian, ascending; subset s holds every fourth from s on."""
    return tuple(STRETCH[bits] * level for level in gauss_levels(bits + 1))


@functools.cache
def subset_edges(bits: int, device: torch.device) -> Tensor:
    """fp32 [4, 2**(bits - 1) - 1]: halfway between neighbouring levels of each subset."""
    levels = torch.tensor(trellis_levels(bits), dtype=torch.float32, device="cpu").view(-1, 4).T
    return ((levels[:, 1:] + levels[:, :-1]) / 2).contiguous().to(device)


@functools.cache
def level_table(bits: int, gain: float, device: torch.device) -> Tensor:
    """fp32 [2**(bits + 1)]: the levels times `gain`; the one at 2 * code with the path bit taken out + subset."""
    return torch.tensor([gain * v for v in trellis_levels(bits)], dtype=torch.float32, device="cpu").to(device)
