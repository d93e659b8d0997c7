"""What modules ask of the input that they save for their gradient: often less than its values.

A leaf module: it knows modules, no codec and no hook.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

from torch import nn
from torch.nn import functional as F


def slopes_of(use: nn.Module | None) -> str | None:
    """The function of an activation module whose gradient asks for its slope only: "gelu", "gelu_tanh", "silu"."""
    if type(use) is nn.SiLU or type(use).__name__ == "SiLUActivation":
        return "silu"
    if type(use) is nn.GELU:
        return "gelu" if use.approximate == "none" else "gelu_tanh"
    # Those of transformers may be a chain of operations instead, each of which saves something else.
    act = getattr(use, "act", None)
    if type(use).__name__ == "GELUActivation" and act is F.gelu:
        return "gelu"
    if type(use).__name__ == "GELUTanh" and isinstance(act, partial) and act.func is F.gelu:
        return "gelu_tanh"
    return None


def asks(use: nn.Module | None) -> Hashable:
    """What a module asks of a tensor: between which values it lies, or a slope.  None: the values themselves."""
    if isinstance(use, nn.Hardtanh):
        return use.min_val, use.max_val
    return (0.0,) if isinstance(use, nn.ReLU) else slopes_of(use)


def weight_of(use: nn.Module | None) -> nn.Parameter | None:
    """The weight of a linear layer or a convolution.  Its gradient is all that the saved input goes into."""
    plain = type(use) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    # GPT-2's linear layers are named after what they once were.
    named = type(use).__name__ == "Conv1D" and type(use).__module__ == "transformers.pytorch_utils"
    weight = use.weight if plain or named else None  # type: ignore[union-attr]
    return weight if isinstance(weight, nn.Parameter) else None
