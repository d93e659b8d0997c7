"""The forms of an operator, one against the other."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which is at a kernel's first use

import pytest
import torch

from hf_actcompress.ops.cpu.library import SMALLEST, library_for
from hf_actcompress.ops.library import FORMS


def bits(x):
    return x.contiguous().view(-1).view(torch.uint8)


def forms_agree(form, name, *args):
    """Shapes, dtypes and bits of that form and of the definition (NaN is NaN); returns what the definition gives.

    "triton" runs under the interpreter, on the CPU.
    """
    if form == "triton":
        pytest.importorskip("triton")
    elif library_for(SMALLEST) is None:
        pytest.skip("no C++ compiler")
    expected, found = (FORMS[name][f](*args) for f in ("reference", form))
    assert found is not NotImplemented, (name, form)
    several = isinstance(expected, tuple)
    for a, b in zip(expected if several else (expected,), found if several else (found,), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (name, form)
        if not torch.equal(bits(a), bits(b)):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    return expected
