"""Low-rank factors, by truncated SVD or by warm-started power iteration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.ranges import tensor_scale
from ..ops.scales import to_dtype
from .base import Codec, CodecState, LeafShapes, Payload, check_choice, check_int, site_hash
from .registry import register_codec

PART = 1 << 20  # elements of a tensor of another dtype that are taken to fp32 at once


class BasisState(CodecState):
    """The right factor of the last step, from which power iteration goes on."""

    def __init__(self, site: str = "", seed: int = 0) -> None:
        self.seed = seed ^ site_hash(site)
        self.basis: Tensor | None = None


@register_codec("lowrank")
@dataclass(frozen=True)
class LowRank(Codec):
    """Folds the tensor to a matrix [m, n] (features last; [B, C, H, W] to [B*H*W, C]) and keeps rank-r factors.

    rank: at most the number of features n; a batch with fewer rows than that is kept at rank m.
    method: "power" (block power iteration, warm-started at each site) or "svd", which waits for the device on a GPU.
    iters: power iterations per call; a cold start runs at least 4.

    Payload: fp32 factors, 4 * r * (m + n) bytes.
    Sources: PowerSGD (Vogels et al., 2019) for the warm start; Eckart and Young, 1936.
    """

    counts_nonfinite: ClassVar[bool] = True
    rank: int = 8
    method: str = "power"
    iters: int = 1
    leaves: ClassVar[tuple[str, ...]] = ("left", "right")

    def __post_init__(self) -> None:
        check_int(self.name, "rank", self.rank, 1, 2**16)
        check_int(self.name, "iters", self.iters, 1, 10_000)
        check_choice(self.name, "method", self.method, ("power", "svd"))

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        return BasisState(site, seed) if self.method == "power" else None

    def _matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(m, n, effective rank)."""
        if not shape:
            return 1, 1, 1
        n = shape[1] if len(shape) == 4 else shape[-1]
        m = math.prod(shape) // n
        if self.rank > n:
            raise ValueError(
                f"lowrank: rank={self.rank} is above the {n} features of a tensor of shape {tuple(shape)}, folded "
                f"to [{m}, {n}]. Use rank <= {n}; factors save bytes only while rank * (m + n) < m * n."
            )
        return m, n, min(self.rank, m)

    def _encode(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Payload:
        m, n, r = self._matrix_shape(tuple(x.shape))
        matrix = Folded(x, m, n)
        # Products of large or tiny values would leave the range of fp32, so the factors are found at a scale of one.
        # It is a power of two, which is exact, in two parts: each factor carries one.  NaN where x is not finite.
        one, two = _parts_of_two(tensor_scale(x, 1.0, True, nonfinite)[1])
        if self.method == "svd":
            finite = (matrix.dense() / one / two).nan_to_num(0.0, 0.0, 0.0)
            u, s, vh = torch.linalg.svd(finite, full_matrices=False)  # on a GPU this waits for the device
            left, right = u[:, :r] * s[:r], vh[:r].T
        else:
            left, right = self._power(matrix, one, two, r, state)
        return self._payload(x, {"left": (left * one).contiguous(), "right": (right * two).contiguous()})

    def _power(
        self, matrix: "Folded", one: Tensor, two: Tensor, r: int, state: CodecState | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        state = state if isinstance(state, BasisState) else BasisState()
        basis = state.basis
        warm = basis is not None and basis.shape == (matrix.n, r)
        if not warm:
            generator = torch.Generator("cpu").manual_seed(state.seed)
            basis = torch.randn(matrix.n, r, generator=generator, dtype=torch.float32, device="cpu")
        right = basis = basis.to(matrix.device)
        for _ in range(self.iters if warm else max(self.iters, 4)):
            left = torch.linalg.qr(matrix.times(right / one) / two).Q
            right = matrix.transposed_times(left / one) / two
        # Strides, too, decide the last bits of a product: a basis that comes back from a checkpoint is contiguous.
        turned = torch.linalg.qr(right).Q
        state.basis = torch.where(turned.isfinite().all() & one.isfinite(), turned, basis).contiguous()
        return left, right

    def _decode(self, payload: Payload) -> Tensor:
        m, n, r = self._matrix_shape(payload.shape)
        return self._unfold(*self._sized(payload, left=(m, r, torch.float32), right=(n, r, torch.float32)), payload)

    def _roundtrip(self, x: Tensor, state: CodecState | None, nonfinite: Tensor | None = None) -> Tensor:
        return self._decode(self._encode(x, state, nonfinite))

    def _unfold(self, left: Tensor, right: Tensor, payload: Payload) -> Tensor:
        if len(payload.shape) == 4:
            b, c, h, w = payload.shape
            return to_dtype(right @ left.view(b, h * w, -1).transpose(1, 2), payload.dtype).view(payload.shape)
        return to_dtype(left @ right.T, payload.dtype).view(payload.shape)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        m, n, r = self._matrix_shape(shape)
        return 4 * r * (m + n)

    def leaf_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> LeafShapes:
        m, n, r = self._matrix_shape(shape)
        return {"left": ((m, r), torch.float32), "right": ((n, r), torch.float32)}


class Folded:
    """A tensor as a matrix [m, n] with its features as columns, multiplied where it lies: images are not moved."""

    def __init__(self, x: Tensor, m: int, n: int) -> None:
        self.m, self.n, self.device = m, n, x.device
        # [m, n], or [B, n, H * W]; contiguous, because strides decide the last bits of a product
        self.x = (x.reshape(x.shape[0], n, -1) if x.dim() == 4 else x.reshape(m, n)).contiguous()

    def dense(self) -> Tensor:
        x = self.x.transpose(1, 2) if self.x.dim() == 3 else self.x
        return x.reshape(self.m, self.n).float()

    def times(self, right: Tensor) -> Tensor:
        """fp32 [n, r] -> [m, r]"""
        out = torch.empty(self.m, right.shape[1], dtype=torch.float32, device=self.device)
        for at, x in self._tiles():
            out[at] = (right.T @ x).transpose(1, 2).reshape(-1, right.shape[1]) if x.dim() == 3 else x @ right
        return out

    def transposed_times(self, left: Tensor) -> Tensor:
        """fp32 [m, r] -> [n, r]"""
        total = torch.zeros(self.n, left.shape[1], dtype=torch.float32, device=self.device)
        for at, x in self._tiles():
            own = left[at]
            # (own.T @ x).T: torch takes eight times as long for x.T @ own on a CPU, where own is tall.
            total += (x @ own.view(x.shape[0], -1, left.shape[1])).sum(0) if x.dim() == 3 else (own.T @ x).T
        return total

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows of the matrix, a part of x in fp32); whole if x is fp32, for others are copied."""
        images = self.x.shape[2] if self.x.dim() == 3 else 1
        step = self.x.shape[0]
        if self.x.dtype != torch.float32 and self.device.type == "cpu":
            step = max(1, PART // (self.n * images))
        for start in range(0, self.x.shape[0], step):
            part = self.x[start : start + step].float()
            yield slice(start * images, (start + part.shape[0]) * images), part


def _parts_of_two(size: Tensor) -> tuple[Tensor, Tensor]:
    """Two powers of two whose product is the largest that is not above `size` (fp32 [], normal); NaN for NaN."""
    exponent = (size.view(torch.int32) >> 23) - 127
    half = exponent >> 1
    one, two = ((part + 127 << 23).view(torch.float32) for part in (half, exponent - half))
    return torch.where(size.isnan(), size, one), two
