"""Helpers for hooks on modules."""

from __future__ import annotations

import torch


def outside_of_graphs(hook: type) -> None:
    """Let torch.compile break its graph at hooks of this class, because they keep state on the Python side.

    Called with the first hook and not as a decorator: the decorator loads the compiler (a second and more), which
    `import hf_actcompress` should not.
    """
    if not hasattr(hook.__call__, "outside_of_graphs"):
        hook.__call__ = torch.compiler.disable(hook.__call__)  # type: ignore[method-assign]
        hook.__call__.outside_of_graphs = True  # type: ignore[attr-defined]
