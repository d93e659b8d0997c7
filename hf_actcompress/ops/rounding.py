"""Rounding: to nearest, or stochastically with noise from a counter hash.

The noise of element i is a hash of (i, key), and the key comes from (seed, site, step).  So the same run gives the
same bits on every device, nothing is drawn from torch's generators, and no random tensor is stored.
The mixing function is a 32-bit finalizer of the murmur family (constants: C. Wellons, "lowbias32", 2018).
"""

from __future__ import annotations

from torch import Tensor


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


_M1, _M2, _GOLDEN = _signed(0x7FEB352D), _signed(0x846CA68B), 0x9E3779B97F4A7C15


def noise_key(seed: int, site: int, step: int) -> int:
    """A signed 32-bit key from three integers (the splitmix64 finalizer)."""
    z = (seed * _GOLDEN + (site << 32) + step + _GOLDEN) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return _signed((z ^ (z >> 31)) >> 16)


def _mix(h: Tensor) -> Tensor:
    # int32 products wrap; torch's >> keeps the sign on int32, hence the masks.
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * _M1
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * _M2
    return h ^ ((h >> 16) & 0xFFFF)


def noise(index: Tensor, key: Tensor | int) -> Tensor:
    """int32 counters (any shape) and an int32 key -> fp32, uniform on [0, 1) in steps of 2**-24."""
    h = _mix(index ^ key)
    return ((h >> 8) & 0xFFFFFF).float() * 2.0**-24
