"""The state of stochastic rounding: which call of a site this is, and so which noise it draws."""

from __future__ import annotations

from typing import Any

from ..ops.rounding import noise_key
from .base import CodecState, site_hash


class RoundingState(CodecState):
    """Counts the calls at one site, so that every step draws fresh noise."""

    def __init__(self, site: str = "", seed: int = 0) -> None:
        self.seed, self.site, self.step = seed, site_hash(site), 0

    def next_key(self) -> int:
        key = noise_key(self.seed, self.site, self.step)
        self.step += 1
        return key


def next_key(state: CodecState | None) -> int:
    """The key of this call; without state always the one of (0, 0, 0)."""
    return state.next_key() if isinstance(state, RoundingState) else noise_key(0, 0, 0)


def key_of(codec: Any, state: CodecState | None) -> int | None:
    """The key of this call of a codec that rounds stochastically, else None."""
    return next_key(state) if codec.round == "stochastic" else None
