"""Memory of decoded tensors: the advice changes nothing but speed."""

from __future__ import annotations

import pytest
import torch

from hf_actcompress.codecs import memory, parse_codec
from hf_actcompress.codecs.memory import MAPPED, fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("nbytes", [0, 8, MAPPED, MAPPED + 8, MAPPED + (5 << 20)])
def test_is_an_empty_tensor_of_that_size(nbytes: int, dtype: torch.dtype) -> None:
    out = fresh(nbytes // dtype.itemsize, dtype, torch.device("cpu"))
    assert out.shape == (nbytes // dtype.itemsize,) and out.dtype == dtype
    out.fill_(1)
    assert out.sum(dtype=torch.float64) == out.numel()


def test_a_system_without_the_advice_decodes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = parse_codec("block:bits=2,rotate=hadamard"), torch.randn(1 << 14, 768)
    payload = codec.encode(x)
    expected = codec.decode(payload)
    assert expected.nbytes > MAPPED
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert torch.equal(codec.decode(payload), expected)
