"""A codec of another package: one byte a value, rounded up or down at random, its scale a running maximum."""

import math
from dataclasses import dataclass

import torch

from hf_actcompress.codecs import Codec, RoundingState, Traits


class DitherState(RoundingState):
    def __init__(self, site="", seed=0):
        super().__init__(site, seed)
        self.largest = torch.zeros(())


@dataclass(frozen=True)
class Dither(Codec):
    decay: float = 0.9
    traits = Traits(stateful=True, stochastic=True)

    def init_state(self, site="", seed=0):
        return DitherState(site, seed)

    def _encode(self, x, state):
        state = state or DitherState()
        state.largest = torch.maximum(x.float().abs().amax(), self.decay * state.largest)
        scale = (state.largest / 127).clamp_min(1e-30)
        noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(state.next_key()))
        return self._payload(x, {"codes": (x.float() / scale + noise).floor().to(torch.int8), "scale": scale.view(1)})

    def _decode(self, payload):
        return (payload.tensors["codes"] * payload.tensors["scale"]).to(payload.dtype)

    def _payload_nbytes(self, shape, dtype):
        return math.prod(shape) + 4
