"""The forms of an operator, one against the other."""

import pytest
import torch

from hf_actcompress.ops.library import FORMS


def bits(x):
    return x.contiguous().view(-1).view(torch.uint8)


def forms_agree(form, name, *args):
    """Shapes, dtypes and bits of that form and of the definition (NaN is NaN); returns what the definition gives.

    "triton" runs under the interpreter, on the CPU.
    """
    expected, found = (FORMS[name][f](*args) for f in ("reference", form))
    assert found is not NotImplemented, (name, form)
    several = isinstance(expected, tuple)
    for a, b in zip(expected if several else (expected,), found if several else (found,), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (name, form)
        if not torch.equal(bits(a), bits(b)):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    return expected


def needs_triton():
    pytest.importorskip("triton")
