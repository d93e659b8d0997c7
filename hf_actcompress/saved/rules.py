"""What the backward pass of a module needs of the input that it saves: often less than its values.

This file knows modules, no codec and no hook.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial

from torch import nn
from torch.nn import functional as F


def slopes_of(module: nn.Module | None) -> str | None:
    """The function of an activation module whose backward needs the slope only: "gelu", "gelu_tanh" or "silu"."""
    if type(module) is nn.SiLU or type(module).__name__ == "SiLUActivation":
        return "silu"
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    # Activations of transformers may also be chains of operations, each of which saves something else.
    act = getattr(module, "act", None)
    if type(module).__name__ == "GELUActivation" and act is F.gelu:
        return "gelu"
    if type(module).__name__ == "GELUTanh" and isinstance(act, partial) and act.func is F.gelu:
        return "gelu_tanh"
    return None


def needed_by(module: nn.Module | None) -> Hashable:
    """A key of what a module's backward needs of its input: a range, a sign, a slope; None for the values.

    Modules with the same key can share what is kept of one tensor.
    """
    if isinstance(module, nn.Hardtanh):
        return module.min_val, module.max_val
    return (0.0,) if isinstance(module, nn.ReLU) else slopes_of(module)


def weight_of(module: nn.Module | None) -> nn.Parameter | None:
    """The weight of a linear layer or a convolution: the saved input goes into its gradient and no other."""
    plain = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    # GPT-2's linear layers.
    named = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    weight = module.weight if plain or named else None  # type: ignore[union-attr]
    return weight if isinstance(weight, nn.Parameter) else None
