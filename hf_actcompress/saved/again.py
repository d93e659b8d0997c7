"""How the result of an operation is made again from what is kept of its inputs.

What one cheap function makes of a kept tensor need not be kept: the output of a norm from the normalised value, that
of GELU from its input, a product from its factors, that of attention from q, k and v.  The operation that torch ran
runs again on tensors of the same shapes and strides.
Source: recomputation of cheap operations as in selective activation checkpointing (Korthikanti et al., 2022); here it
starts from decoded values.
This file knows operations, and what a pass keeps of their saved tensors and inputs (`Kept`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Maker = Callable[[], Tensor]

aten = torch.ops.aten
DEPTH = 3  # operations between what is kept and what is made of it


class Kept(Protocol):
    """What a pass knows of the tensors of a node."""

    def saved(self, node: Any, name: str) -> Maker | None:
        """Of a saved tensor; None where it is not kept by its values."""

    def normalised(self, node: Any, name: str) -> Maker | None:
        """Of the normalised value of a norm's saved input."""

    def edge(self, node: Any, index: int) -> Maker | None:
        """Of the input that the edge `index` leads to, as far as some operation keeps it by its values."""


def maker(node: Any, output: int, kept: Kept, depth: int = DEPTH) -> Maker | None:
    """Of the result `output` of a node; None where it cannot be made of what is kept."""
    make = MAKERS.get(node.name())
    return None if make is None or depth == 0 or output != 0 else make(node, kept, depth)


def source(node: Any, index: int, kept: Kept, depth: int) -> Maker | None:
    """Of an input: as it is kept, or made again itself."""
    found = kept.edge(node, index)
    if found is not None:
        return found
    before, output = node.next_functions[index]
    return None if before is None else maker(before, output, kept, depth - 1)


def _signed(option: Any) -> Any:
    """A node gives a dimension of -1 as 2**64 - 1."""
    return option - 2**64 if isinstance(option, int) and option >= 2**63 else option


def _unary(function: Callable[..., Tensor], *names: str) -> Callable[[Any, Kept, int], Maker | None]:
    """function(input, options that the node saves)"""

    def make(node: Any, kept: Kept, depth: int) -> Maker | None:
        x = kept.saved(node, "self") or source(node, 0, kept, depth)
        options = [_signed(getattr(node, f"_saved_{name}")) for name in names]
        return None if x is None else lambda: function(x(), *options)

    return make


def _layer_norm(node: Any, kept: Kept, depth: int) -> Maker | None:
    x = kept.normalised(node, "input")
    weight, bias = kept.saved(node, "weight"), kept.saved(node, "bias")
    if x is None:
        return None

    def run() -> Tensor:
        normal = x()
        y = normal if weight is None else normal * weight()
        y = y if bias is None else y + bias()
        return y.to(normal.dtype).contiguous()

    return run


def _rms_norm(node: Any, kept: Kept, depth: int) -> Maker | None:
    x, rstd = kept.saved(node, "input"), kept.saved(node, "result1")
    weight = kept.saved(node, "weight")
    if x is None or rstd is None:
        return None

    def run() -> Tensor:
        value = x()
        y = value.float() * rstd() if value.dtype != torch.float64 else value * rstd()
        return (y if weight is None else y * weight()).to(value.dtype).contiguous()

    return run


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _channel_norm(node: Any, kept: Kept, depth: int) -> Maker | None:
    """Batch and group norm.  The node does not save the bias; the edge to it leads there while it is trained.  Without
    a weight there may be a frozen bias, which is nowhere to be found."""
    x, weight, bias = kept.normalised(node, "input"), kept.saved(node, "weight"), kept.edge(node, 2)
    if x is None or weight is None or bias is None:
        return None

    def run() -> Tensor:
        y = x()
        return y.mul_(_channels(weight(), y)).add_(_channels(bias(), y))

    return run


def _product(node: Any, kept: Kept, depth: int) -> Maker | None:
    factors = []
    for index, name in enumerate(("self", "other")):
        found = kept.saved(node, name) or source(node, index, kept, depth)
        if found is None:
            return None
        factors.append(found)
    return lambda: torch.mul(factors[0](), factors[1]())


def _cast(node: Any, kept: Kept, depth: int) -> Maker | None:
    x, (about, *_) = source(node, 0, kept, depth), node._input_metadata
    dtype, device = about.dtype, about.device
    return None if x is None else lambda: x().to(device, dtype)


def _view(node: Any, kept: Kept, depth: int) -> Maker | None:
    x, shape = source(node, 0, kept, depth + 1), node._input_metadata[0].shape
    return None if x is None else lambda: x().reshape(shape)


def _clone(node: Any, kept: Kept, depth: int) -> Maker | None:
    """As of the input of an operation in place, which saves a clone of it."""
    return source(node, 0, kept, depth)


def _dropout(node: Any, kept: Kept, depth: int) -> Maker | None:
    x, mask, p = source(node, 0, kept, depth), kept.saved(node, "result1"), node._saved_p
    if x is None or mask is None or p >= 1:
        return None
    return lambda: x() * mask() * (1 / (1 - p))


def attention(node: Any, kept: Kept) -> Callable[[], tuple[Tensor, Tensor]] | None:
    """Output and logsumexp, made of decoded q, k and v; None where they cannot be made again.

    With dropout the output depends on a mask that only the first run has drawn; the logsumexp does not.
    """
    q, k, v = (kept.saved(node, name) for name in ("query", "key", "value"))
    if q is None or k is None or v is None:
        return None
    causal, scale = node._saved_is_causal, node._saved_scale
    bias = kept.saved(node, "attn_mask") or kept.saved(node, "attn_bias")

    def mask() -> Tensor | None:
        return None if bias is None else bias()

    name = node.name()
    if "ForCpu" in name:
        return lambda: aten._scaled_dot_product_flash_attention_for_cpu(
            q(), k(), v(), 0.0, causal, attn_mask=mask(), scale=scale
        )
    if "Flash" in name:
        return lambda: aten._scaled_dot_product_flash_attention(q(), k(), v(), 0.0, causal, False, scale=scale)[:2]
    if "Efficient" in name:
        return lambda: aten._scaled_dot_product_efficient_attention(
            q(), k(), v(), mask(), True, 0.0, causal, scale=scale
        )[:2]
    if "Cudnn" in name:
        return lambda: aten._scaled_dot_product_cudnn_attention(
            q(), k(), v(), mask(), True, 0.0, causal, False, scale=scale
        )[:2]
    return None


class Both:
    """Two results of one run: the one that was not asked for waits until it is."""

    def __init__(self, run: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self.run, self.waiting = run, {}

    def get(self, index: int) -> Tensor:
        found = self.waiting.pop(index, None)
        if found is None:
            results = self.run()
            found, self.waiting = results[index], {1 - index: results[1 - index]}
        return found


def _attention(node: Any, kept: Kept, depth: int) -> Maker | None:
    run = None if node._saved_dropout_p else attention(node, kept)
    return None if run is None else lambda: run()[0]


MAKERS: dict[str, Callable[[Any, Kept, int], Maker | None]] = {
    "GeluBackward0": _unary(lambda x, approximate: aten.gelu(x, approximate=approximate), "approximate"),
    "SiluBackward0": _unary(aten.silu),
    "MishBackward0": _unary(aten.mish),
    "HardswishBackward0": _unary(aten.hardswish),
    "HardsigmoidBackward0": _unary(aten.hardsigmoid),
    "SoftplusBackward0": _unary(aten.softplus, "beta", "threshold"),
    "EluBackward0": _unary(aten.elu, "alpha", "scale", "input_scale"),
    "GluBackward0": _unary(aten.glu, "dim"),
    "LeakyReluBackward0": _unary(aten.leaky_relu, "negative_slope"),
    "HardtanhBackward0": _unary(aten.hardtanh, "min_val", "max_val"),
    "ReluBackward0": _unary(aten.relu),
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "MulBackward0": _product,
    "ToCopyBackward0": _cast,
    "CloneBackward0": _clone,
    "ViewBackward0": _view, "ReshapeAliasBackward0": _view, "UnsafeViewBackward0": _view,
    "NativeDropoutBackward0": _dropout,
    **dict.fromkeys(
        ("NativeBatchNormBackward0", "NativeBatchNormLegitBackward0", "CudnnBatchNormBackward0",
         "MiopenBatchNormBackward0", "NativeGroupNormBackward0"), _channel_norm,
    ),
    **dict.fromkeys(
        ("ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFlashAttentionBackward0",
         "ScaledDotProductEfficientAttentionBackward0", "ScaledDotProductCudnnAttentionBackward0"), _attention,
    ),
}  # fmt: skip
