"""Features brought to comparable size before they share a scale.

A few features of a transformer's hidden states are many times larger than the rest.  Whatever shares a scale (or a
rotation) with them drowns in noise that is made for them.  Each feature's mean is taken out and each is divided by the
square root of its deviation.  The square root is optimal: noise of equal size in every divided feature comes back
times w_i**2, and sum(w_i**2) * sum(s_i**2 / w_i**2) is least for w_i**2 = s_i.
Related: SmoothQuant (Xiao et al., 2023) moves scales between activations and weights; here they travel.
"""

from __future__ import annotations

import torch

MIN_ROWS = 256  # below, the 4 bytes per feature would weigh more than a few percent of the payload


def feature_dim(shape: tuple[int, ...] | torch.Size) -> int:
    """Dimension 1 of [B, C, H, W], else the last."""
    return 1 if len(shape) == 4 else len(shape) - 1


def applies(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape has enough rows per feature."""
    if len(shape) < 2:
        return False
    rows = 1
    for d, size in enumerate(shape):
        rows *= 1 if d == feature_dim(shape) else size
    return rows >= MIN_ROWS


def inner_size(shape: tuple[int, ...]) -> int:
    """Elements of one feature that lie side by side in the order of the shape."""
    return shape[2] * shape[3] if len(shape) == 4 else 1
