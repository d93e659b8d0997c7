"""Signs, and the mean magnitude of each group: one bit a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.packing import pack, unpack
from ..ops.scales import to_dtype
from .base import Codec, CodecState, Payload, check_int
from .registry import register_codec


@register_codec("sign")
@dataclass(frozen=True)
class Sign(Codec):
    """Each value becomes plus or minus the mean magnitude of its group, which has the least squared error of all such.

    group: elements per group, a multiple of 8; the last one may be shorter.
    Payload: 1 bit per element (rounded up to whole groups) + 2 bytes per group.
    Meant for gradients with error feedback: `ef+sign`.
    Sources: signSGD (Bernstein et al., 2018); 1-bit Adam (Tang et al., 2021); the scale of Karimireddy et al., 2019.
    """

    group: int = 128

    def __post_init__(self) -> None:
        check_int(self.name, "group", self.group, 8, 2**20)
        if self.group % 8:
            raise ValueError(f"sign: group={self.group} is not a multiple of 8, so its signs would not pack.")

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        flat = x.float().reshape(-1)
        rows = torch.nn.functional.pad(flat, (0, -flat.numel() % self.group)).view(-1, self.group)
        count = torch.full((len(rows),), float(self.group), dtype=torch.float32, device=x.device)
        count[-1:] = flat.numel() - (len(rows) - 1) * self.group
        scales = (rows.abs().sum(1) / count).bfloat16()
        scales = scales.fmod(math.inf)  # NaN for an infinite one, which would be finite again in fp16
        return self._payload(x, {"codes": pack((rows >= 0).to(torch.uint8), 1), "scales": scales})

    def _decode(self, payload: Payload) -> Tensor:
        n = math.prod(payload.shape)
        groups = -(-n // self.group)
        forms = {"codes": (groups, self.group // 8, torch.uint8), "scales": (groups, torch.bfloat16)}
        codes, scales = self._sized(payload, **forms)
        signs = unpack(codes, 1, self.group).float() * 2 - 1
        return to_dtype((signs * scales.float().view(-1, 1)).view(-1)[:n], payload.dtype).view(payload.shape)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return -(-math.prod(shape) // self.group) * (self.group // 8 + 2)
