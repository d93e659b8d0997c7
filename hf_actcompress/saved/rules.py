"""What the backward formula of each operation does with what it saves, and so how that may be kept.

An operation is known by the name of its node in autograd's graph ("AddmmBackward0"), whatever function, method,
module or composite of them made it.  For each tensor that the node saves (its `_saved_<name>`) the table says:

    CODES       goes into the gradient linearly, or through a smooth function: codes may stand for it
    NORMALISED  the input of a norm: codes of the normalised value, statistics exactly
    OUTPUT      made again by running the operation on what was decoded of its inputs
    BITS        only on which side of a bound, or within which two, a value lies: one bit
    Sides       as CODES, but the slope jumps at bounds: codes, and one bit for the side
    SHAPE       only its shape: nothing
    WEIGHT      a weight by its role: exactly, and not worth a word

What is not in the table is kept exactly and named in the report: comparisons with the operation's own result (max,
norms, sort), divisions, logarithms, roots, losses, custom functions, whatever is new.
Which operations there are to have a rule is torch's own list, `torch._C._functions` (tests/saved/test_rules.py).
This file knows names, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CODES, NORMALISED, OUTPUT, SHAPE, WEIGHT = "codes", "normalised", "output", "shape", "weight"


@dataclass(frozen=True)
class Bits:
    """Whether a value lies above `low` (and below `high`), decoded to `below` and `above`, which the backward formula
    takes for the same."""

    low: float
    high: float | None
    below: float
    above: float


@dataclass(frozen=True)
class Sides:
    """Codes of a value, which stays above `low` (and below `high`) where it was."""

    low: float
    high: float | None


Rule = str | Bits | Sides | None  # None: exactly


def _after(value: float, up: bool) -> float:
    """The next number in fp32, which makes of a bound that belongs to a range one that does not."""
    import torch

    end = torch.tensor(math.inf if up else -math.inf)
    return float(torch.nextafter(torch.tensor(value, dtype=torch.float32), end))


def _relu(node: Any, user: str) -> Rule:
    return Bits(0.0, None, 0.0, 1.0)


def _leaky(node: Any, user: str) -> Rule:
    return Bits(0.0, None, -1.0, 1.0)


def _threshold(node: Any, user: str) -> Rule:
    t = float(node._saved_threshold)
    return Bits(t, None, t, _after(t, True))


def _hardtanh(node: Any, user: str) -> Rule:
    low, high = float(node._saved_min_val), float(node._saved_max_val)
    return Bits(low, high, low, (low + high) / 2)


def _hardsigmoid(node: Any, user: str) -> Rule:
    return Bits(-3.0, 3.0, -3.0, 0.0)


def _hardswish(node: Any, user: str) -> Rule:
    return Sides(-3.0, 3.0)


def _elu(node: Any, user: str) -> Rule:
    """Smooth where the slope below 0 begins with 1; that of SELU begins with 1.67."""
    slope = float(node._saved_alpha) * float(node._saved_input_scale)
    return CODES if abs(slope - 1) < 0.02 else Sides(0.0, None)


def _clamp(node: Any, user: str) -> Rule:
    """A bound itself lets no gradient pass."""
    low, high = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    if low is None and high is None:
        return None
    if low is None:  # at the bound or above it
        below = _after(float(high), False)
        return Bits(below, None, below, float(high))
    if high is None:
        return Bits(float(low), None, float(low), _after(float(low), True))
    return Bits(float(low), float(high), float(low), (float(low) + float(high)) / 2)


# What spreads one gradient over all of a row of squares.
SPREADING = frozenset({"Addmm", "Convolution", "Mean", "Mm", "Sum"})


def _square(user: str) -> Rule:
    """Where a square is small, what follows may divide by it, and the gradient is large just there; not so in a sum,
    or in a product with a weight."""
    return CODES if user in SPREADING else None


def _power(node: Any, user: str) -> Rule:
    exponent = float(node._saved_exponent)
    return _square(user) if exponent == 2.0 else CODES if exponent in (1.0, 3.0) else None


def _factor(node: Any, user: str) -> Rule:
    one, other = node.next_functions
    return _square(user) if one == other and one[0] is not None else CODES


def _norm(node: Any, user: str) -> Rule:
    """In evaluation mode the statistics do not depend on the input, which then goes in linearly."""
    return NORMALISED if getattr(node, "_saved_training", True) else CODES


_BATCH_NORM = {"input": _norm, "weight": WEIGHT, "running_mean": WEIGHT, "running_var": WEIGHT}
_SAME_INPUT = {"self": CODES}
_RESULT = {"result": CODES}
_PRODUCT = {"self": CODES, "other": CODES}
_CONVOLUTION = {"input": CODES, "self": CODES, "weight": WEIGHT}
_POOL = {"self": SHAPE}
_ATTENTION = {**dict.fromkeys(("query", "key", "value"), CODES),
              **dict.fromkeys(("output", "logsumexp", "log_sumexp"), OUTPUT)}  # fmt: skip

# "<Operation>Backward<n>": {saved tensor: rule, or a function that gives one for the node and the operation that takes
# its result}
RULES: dict[str, dict[str, Rule | Callable[[Any, str], Rule]]] = {
    # Products.
    "AddmmBackward0": {"mat1": CODES, "mat2": CODES},
    "MmBackward0": {"self": CODES, "mat2": CODES},
    "BmmBackward0": {"self": CODES, "mat2": CODES},
    "BaddbmmBackward0": {"batch1": CODES, "batch2": CODES},
    "AddbmmBackward0": {"batch1": CODES, "batch2": CODES},
    "MvBackward0": {"self": CODES, "vec": CODES},
    "AddmvBackward0": {"mat": CODES, "vec": CODES},
    "AddrBackward0": {"vec1": CODES, "vec2": CODES},
    "DotBackward0": {"self": CODES, "tensor": CODES},
    "MulBackward0": {"self": _factor, "other": _factor},
    "AddcmulBackward0": {"tensor1": CODES, "tensor2": CODES},
    "MatmulBackward0": _PRODUCT,
    "LinearBackward0": {"input": CODES, "weight": WEIGHT},
    "MkldnnLinearBackward0": {"self": CODES, "weight": WEIGHT},
    "GroupedMmBackward0": {"self": CODES, "mat2": WEIGHT},
    # The gradient of the matrix is a product with the result; that of the right side needs the matrix itself.
    "LinalgSolveTriangularBackward0": _RESULT, "LinalgSolveExBackward0": _RESULT,
    "TrilinearBackward0": {"i1": CODES, "i2": WEIGHT, "i3": CODES},
    **dict.fromkeys(
        (
            "ConvolutionBackward0", "ConvolutionBackward1", "ConvolutionOverrideableBackward0", "ConvTbcBackward0",
            "ConvDepthwise2DBackward0", "ConvDepthwise3DBackward0", "CudnnConvolutionBackward0",
            "CudnnConvolutionTransposeBackward0", "MiopenConvolutionBackward0", "MiopenConvolutionTransposeBackward0",
            "MiopenDepthwiseConvolutionBackward0", "MkldnnConvolutionBackward0", "MpsConvolutionBackward0",
            "MpsConvolutionTransposeBackward0", "NnpackSpatialConvolutionBackward0", "SlowConv2DBackward0",
            "SlowConv3DBackward0", "SlowConvDilated2DBackward0", "SlowConvDilated3DBackward0",
            "SlowConvTranspose2DBackward0", "SlowConvTranspose3DBackward0",
        ),
        _CONVOLUTION,
    ),
    # Norms.
    "NativeLayerNormBackward0": {"input": NORMALISED, "weight": WEIGHT, "bias": WEIGHT},
    "NativeGroupNormBackward0": {"input": NORMALISED, "weight": WEIGHT},
    # It divides by the root of the mean square alone, so codes of the input are those of the normalised value.
    "FusedRmsNormBackward0": {"input": CODES, "weight": WEIGHT},
    **dict.fromkeys(
        (
            "NativeBatchNormBackward0", "NativeBatchNormLegitBackward0", "NativeBatchNormLegitBackward1",
            "NativeBatchNormLegitNoTrainingBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0",
            "BatchNormWithUpdateBackward0", "BatchNormNoUpdateBackward0",
        ),
        _BATCH_NORM,
    ),
    # Fused attention: a softmax that fits q, k and v, so it runs again on what was decoded of them.
    "ScaledDotProductFlashAttentionForCpuBackward0": _ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": _ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": _ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": _ATTENTION,
    # Results within a known range.
    "SoftmaxBackward0": _RESULT, "SafeSoftmaxBackward0": _RESULT, "MaskedSoftmaxBackward0": _RESULT,
    "SigmoidBackward0": _RESULT, "TanhBackward0": _RESULT,
    # Smooth activations, whose slope follows the input.
    "GeluBackward0": _SAME_INPUT, "SiluBackward0": _SAME_INPUT, "MishBackward0": _SAME_INPUT,
    "SoftplusBackward0": _SAME_INPUT, "EluBackward0": {"self": _elu}, "CeluBackward0": _SAME_INPUT,
    "HardswishBackward0": {"self": _hardswish}, "GluBackward0": _SAME_INPUT,
    "PowBackward0": {"self": _power},
    # One side of a bound or the other.
    "ReluBackward0": {"result": _relu},
    "LeakyReluBackward0": {"self": _leaky}, "LeakyReluBackward1": {"result": _leaky},
    "ThresholdBackward0": {"self": _threshold}, "ThresholdBackward1": {"self": _threshold},
    "HardtanhBackward0": {"self": _hardtanh}, "HardsigmoidBackward0": {"self": _hardsigmoid},
    "ClampBackward1": {"self": _clamp}, "ClampMinBackward0": {"self": _clamp}, "ClampMaxBackward0": {"self": _clamp},
    # Only shapes.
    **dict.fromkeys(
        (
            "AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0", "AvgPool2DBackward0", "AvgPool3DBackward0",
            "AdaptiveMaxPool2DBackward0", "AdaptiveMaxPool3DBackward0", "MaxPool2DWithIndicesBackward0",
            "MaxPool3DWithIndicesBackward0", "ReflectionPad1DBackward0", "ReflectionPad2DBackward0",
            "ReflectionPad3DBackward0", "ReplicationPad1DBackward0", "ReplicationPad2DBackward0",
            "ReplicationPad3DBackward0", "GatherBackward0", "MaskedSelectBackward0", "TakeBackward0",
        ),
        _POOL,
    ),
    **dict.fromkeys(("IndexAddBackward0", "IndexCopyBackward0", "PutBackward0"), {"source": SHAPE}),
}  # fmt: skip

# Of these the gradient of the input comes out exactly.
BITS_OR_SHAPE = frozenset(
    name for name, rules in RULES.items() if all(rule == SHAPE or callable(rule) for rule in rules.values())
) - {"EluBackward0", "HardswishBackward0", "MulBackward0", "PowBackward0"}

# Nodes that hand on the same memory under another shape.
VIEWS = frozenset(
    f"{name}Backward{n}"
    for name in ("View", "ReshapeAlias", "UnsafeView", "Transpose", "T", "Permute", "Squeeze", "Unsqueeze", "Alias",
                 "Select", "Slice", "Movedim", "Swapaxes", "ViewDtype", "SwapDims", "Detach")  # fmt: skip
    for n in range(4)
)


def rule_of(node: Any, saved: str, user: str = "") -> Rule:
    """How the tensor `saved` of this node may be kept; None: exactly.  user: the operation that takes its result."""
    rule = RULES.get(node.name(), {}).get(saved)
    return rule(node, user) if callable(rule) else rule


def register_saved_rule(operation: str, **rules: str) -> None:
    """Say how what an operation saves may be kept, for operations that this table does not know.

    operation: what `handle.report()` shows, such as "MyAttention" for a torch.autograd.Function of that name; or the
        whole name of its node in autograd's graph ("MyAttentionBackward").
    rules: for each saved tensor "codes" (its backward is linear in it, or smooth), "shape" (needs its shape alone) or
        "exact".  Of a torch.autograd.Function they are called tensor0, tensor1, ... in the order of
        `ctx.save_for_backward`.

        register_saved_rule("MyAttention", tensor0="codes", tensor1="codes")

    Raises ValueError for another rule.
    """
    known = {"codes": CODES, "shape": SHAPE, "exact": None}
    for name, rule in rules.items():
        if rule not in known:
            raise ValueError(f"{operation}: {name}={rule!r} is not a rule; choose one of: {', '.join(known)}.")
    if not isinstance(operation, str) or not operation:
        raise ValueError(f"operation={operation!r} is not the name of an operation, such as 'MyAttention'.")
    whole = "Backward" in operation
    for node in [operation] if whole else [f"{operation}Backward", f"{operation}Backward0"]:
        RULES[node] = {name: known[rule] for name, rule in rules.items()}
