"""The forms of one operator side by side: the definition in plain torch, C++, Triton under its interpreter."""

import contextlib
import importlib
import os

import pytest
import torch

from hf_actcompress.ops.cpu import library
from hf_actcompress.ops.library import FORMS, has_triton

needs_compiler = pytest.mark.skipif(library._compiler() is None, reason="no C++ compiler")
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")


def same(a, b) -> bool:
    """Bit for bit, NaN being NaN; strides too."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    equal = torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.isnan(), b.isnan())
                                  and torch.equal(a[~a.isnan()], b[~b.isnan()]))  # fmt: skip
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and equal


def run(name, form, *args):
    """(result, count) of a form; an argument `"count"` becomes a counter of what is not finite."""
    counter = torch.zeros(1, dtype=torch.int64)
    result = FORMS[name][form](*(counter if isinstance(a, str) and a == "count" else a for a in args))
    assert result is not NotImplemented, f"{name}: {form} does not take this"
    return result, int(counter)


def agree(name, *args):
    """The result of the definition, which C++ gives bit for bit, as does the operator; the fake form has its shape."""
    library._library()
    (expected, count), (found, other) = run(name, "reference", *args), run(name, "cpu", *args)
    assert same(expected, found) and count == other, (name, args)
    uncounted = [None if isinstance(a, str) and a == "count" else a for a in args]
    assert same(expected, getattr(torch.ops.actcompress, name)(*uncounted))
    made = FORMS[name]["fake"](*uncounted)
    for a, b in zip(*(v if isinstance(v, (tuple, list)) else (v,) for v in (expected, made)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), name
    return expected


@contextlib.contextmanager
def interpreted():
    """Kernels that are imported while this lasts run under Triton's interpreter, on CPU tensors."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)


def agree_in_triton(name, *args, exact=True):
    """As `agree`, for the kernel.  The interpreter cuts fp32 off to bf16, so bf16 values may be one step lower."""
    with interpreted():
        importlib.import_module("hf_actcompress.ops.triton.common")
        (expected, count), (found, other) = run(name, "reference", *args), run(name, "triton", *args)
    assert bool(count) == bool(other)
    for a, b in zip(*(v if isinstance(v, (tuple, list)) else (v,) for v in (expected, found)), strict=True):
        if a.dtype == torch.bfloat16 and not torch.equal(a, b):
            assert torch.equal(a.isnan(), b.isnan())
            a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
            assert ((a.float() - b.float()).abs() <= a.float().abs() * 2.0**-7).all()
        elif exact:
            assert same(a.contiguous(), b.contiguous()), name
    return expected, found


# For parametrize: compare(name, *args) gives the result of the definition.
FORM_TESTS = [
    pytest.param(agree, id="cpu", marks=needs_compiler),
    pytest.param(lambda *args: agree_in_triton(*args)[0], id="triton", marks=needs_triton),
]
