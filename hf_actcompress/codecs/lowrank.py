"""Low-rank factors, by truncated SVD or by warm-started power iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, CodecState, LeafShapes, Payload, check_choice, check_int, site_hash


class BasisState(CodecState):
    """The right factor of the last step, from which power iteration goes on."""

    def __init__(self, site: str = "", seed: int = 0) -> None:
        self.seed = seed ^ site_hash(site)
        self.basis: Tensor | None = None


@dataclass(frozen=True)
class LowRank(Codec):
    """Folds the tensor to a matrix [m, n] (features last; [B, C, H, W] to [B*H*W, C]) and keeps rank-r factors.

    rank: at most the number of features n; a batch with fewer rows than that is kept at rank m.
    method: "power" (block power iteration, warm-started at each site) or "svd".
    iters: power iterations per call; a cold start runs at least 4.

    Payload: fp32 factors, 4 * r * (m + n) bytes.
    Sources: PowerSGD (Vogels et al., 2019) for the warm start; Eckart and Young, 1936.
    """

    rank: int = 8
    method: str = "power"
    iters: int = 1
    name: ClassVar[str] = "lowrank"
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

    def _fold(self, x: Tensor) -> Tensor:
        m, n, _ = self._matrix_shape(tuple(x.shape))
        x = x.movedim(1, -1) if x.dim() == 4 else x
        return x.reshape(m, n).float()

    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        m, n, r = self._matrix_shape(tuple(x.shape))
        matrix = self._fold(x)
        # Norms of values near 2**48 would overflow, so the factors are found at a scale of one; the scale is a
        # power of two, which is exact, and both factors carry a part of it.
        exponent = math.floor(math.log2(max(float(matrix.abs().amax()), 2.0**-126)))
        matrix = matrix * 2.0**-exponent
        if self.method == "svd":
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            left, right = u[:, :r] * s[:r], vh[:r].T
        else:
            left, right = self._power(matrix, r, state)
        left, right = left * 2.0 ** (exponent // 2), right * 2.0 ** (exponent - exponent // 2)
        return self._payload(x, {"left": left.contiguous(), "right": right.contiguous()})

    def _power(self, matrix: Tensor, r: int, state: CodecState | None) -> tuple[Tensor, Tensor]:
        state = state if isinstance(state, BasisState) else BasisState()
        basis = state.basis
        iters = self.iters
        if basis is None or basis.shape != (matrix.shape[1], r):
            generator = torch.Generator("cpu").manual_seed(state.seed)
            basis = torch.randn(matrix.shape[1], r, generator=generator, dtype=torch.float32, device="cpu")
            iters = max(iters, 4)
        right = basis.to(matrix.device)
        for _ in range(iters):
            left = torch.linalg.qr(matrix @ right).Q
            right = matrix.T @ left
        # Strides, too, decide the last bits of a product: a basis that comes back from a checkpoint is contiguous.
        state.basis = torch.linalg.qr(right).Q.contiguous()
        return left, right

    def _decode(self, payload: Payload) -> Tensor:
        return self._unfold(payload.tensors["left"], payload.tensors["right"], payload)

    def _unfold(self, left: Tensor, right: Tensor, payload: Payload) -> Tensor:
        y = (left @ right.T).to(payload.dtype)
        if len(payload.shape) == 4:
            b, c, h, w = payload.shape
            return y.view(b, h, w, c).movedim(-1, 1).contiguous()
        return y.view(payload.shape)

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        m, n, r = self._matrix_shape(shape)
        return 4 * r * (m + n)

    def leaf_shapes(self, shape: tuple[int, ...], dtype: torch.dtype) -> LeafShapes:
        m, n, r = self._matrix_shape(shape)
        return {"left": ((m, r), torch.float32), "right": ((n, r), torch.float32)}
