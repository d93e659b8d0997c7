"""How an operator is made: one schema, one definition in plain torch, and faster forms of it for some devices.

    QUANTIZE = operator("quantize_groups(Tensor x, ...) -> (Tensor, Tensor)", reference, fake, cpu=..., triton=...)

Each is a `torch.library` operator `actcompress::name`, so torch.compile, export, FakeTensorMode and DTensor see one
node.  No form reads a value back to the host, and no size depends on values.

HF_ACTCOMPRESS_KERNELS=0 in the environment computes everything by the definitions in plain torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

VARIABLE = "HF_ACTCOMPRESS_KERNELS"
LIBRARY = torch.library.Library("actcompress", "DEF")
# name -> form -> function; the tests compare the forms of an operator.
FORMS: dict[str, dict[str, Callable[..., Any]]] = {}


def kernels_allowed() -> bool:
    """Whether C++ and Triton may be used.  Raises ValueError for a value of the variable that is not known."""
    value = os.environ.get(VARIABLE, "1").strip()
    if value not in ("0", "1"):
        raise ValueError(
            f"{VARIABLE}={value!r} is not known: 1 (or nothing) uses C++ and Triton kernels where there are any, 0 "
            "computes everything in plain torch."
        )
    return value == "1"


@functools.cache
def has_triton() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    logger.warning(
        "triton is not installed: codecs on a GPU are computed by several kernels of torch each, which takes longer. "
        "`pip install triton` changes that."
    )
    return False


def operator(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, cpu: Callable[..., Any] | None = None,
    triton: str | None = None, tags: Sequence[torch.Tag] = (),
) -> Callable[..., Any]:  # fmt: skip
    """Define `actcompress::<schema>`.

    reference: the definition, for every device.  fake: results without values, for tracing.
    cpu: the same bits in C++; returns NotImplemented for what it does not take.
    triton: "module:function" below ops/triton, imported at the first use; likewise.
    tags: what a compiler has to know of it.
    """
    name = schema.partition("(")[0]
    forms = FORMS[name] = {"reference": reference, "fake": fake}
    LIBRARY.define(schema, tags=tuple(tags))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"actcompress::{name}", fake, lib=LIBRARY)
    if cpu is not None:
        forms["cpu"] = cpu
        LIBRARY.impl(name, _first(cpu, reference), "CPU")
    if triton is not None:
        forms["triton"] = functools.partial(_imported, triton)
        LIBRARY.impl(name, _first(forms["triton"], reference, has_triton), "CUDA")
    return getattr(torch.ops.actcompress, name).default


def _first(form: Callable[..., Any], reference: Callable[..., Any], ready: Callable[[], bool] | None = None) -> Any:
    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        if kernels_allowed() and (ready is None or ready()):
            found = form(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return reference(*args, **kwargs)

    return run


def _imported(path: str, *args: Any, **kwargs: Any) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"{__package__}.triton.{module}"), name)(*args, **kwargs)
