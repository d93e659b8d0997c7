"""Tensors that do not lie in the order of their shape: nothing is moved, and every element keeps its number."""

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops.layout import dense, elements, in_memory_order
from hf_actcompress.ops.reductions import strided_sample

PLAIN = torch.arange(2.0 * 3 * 4 * 5).view(2, 3, 4, 5)
TENSORS = {
    "contiguous": PLAIN,
    "channels last": PLAIN.contiguous(memory_format=torch.channels_last),
    "transposed": PLAIN.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "one channel": PLAIN[:, :1].contiguous(memory_format=torch.channels_last),
    "one image": PLAIN[:1].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS)
def test_there_and_back(x):
    flat = in_memory_order(x).reshape(-1)
    assert flat.data_ptr() == x.data_ptr()
    back = (flat + 1).as_strided(x.shape, x.stride())
    assert torch.equal(back, x + 1)
    assert dense(x) is x


@pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS)
def test_numbers_of_elements(x):
    index = torch.randperm(x.numel())
    assert torch.equal(elements(x, index), x.reshape(-1)[index])


@pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS)
def test_a_sample_is_of_the_order_of_the_shape(x):
    assert torch.equal(strided_sample(x, 10), strided_sample(x.contiguous(), 10))


@pytest.mark.parametrize("x", [PLAIN[..., ::2], PLAIN[:, :1].expand(2, 3, 4, 5)], ids=["sliced", "expanded"])
def test_what_is_not_dense_is_copied(x):
    assert dense(x).is_contiguous() and torch.equal(dense(x), x)


@pytest.mark.parametrize(
    "spec", ["identity", "uniform:bits=8", "sort:bits=8", "kmeans:bits=4", "float8", "topk:ratio=0.1"]
)
def test_a_roundtrip_keeps_the_order(spec):
    codec = parse_codec(spec)
    x = torch.randn(8, 16, 20, 20).clamp(-1, 1).contiguous(memory_format=torch.channels_last)  # with ties
    y = codec.roundtrip(x, codec.init_state("here"))
    assert y.stride() == x.stride()
    assert torch.equal(y, codec.roundtrip(x.contiguous(), codec.init_state("here")))
