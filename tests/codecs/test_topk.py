import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.codecs import TopK

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.031, 0.1, 0.5, 0.999, 1])
@pytest.mark.parametrize("n", [1, 2, 17, 1000])
def test_equals_torch_topk(dtype, ratio, n):
    # Distinct magnitudes, so that there is one answer.
    x = torch.linspace(1, 2000, n).to(dtype).unique()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(n))]
    x[::3] *= -1
    k = max(1, round(ratio * len(x)))
    expected = torch.zeros_like(x)
    where = x.abs().topk(k).indices
    expected[where] = x[where]
    codec = TopK(ratio)
    y = codec.decode(codec.encode(x))
    assert torch.equal(y, expected) and torch.equal(codec.roundtrip(x), expected)
    assert int((y != 0).sum()) == k == codec.kept(len(x))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.floats(0.01, 1))
def test_of_equal_magnitudes_the_first_stays(values, ratio):
    x = torch.tensor(values, dtype=torch.float32)
    codec = TopK(ratio)
    ranked = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))  # stable, by definition
    expected = torch.zeros_like(x)
    for i in ranked[: codec.kept(len(values))]:
        expected[i] = values[i]
    assert torch.equal(codec.roundtrip(x), expected) and torch.equal(codec.decode(codec.encode(x)), expected)
    assert codec.encode(x).tensors["values"].numel() == codec.kept(len(values))


@pytest.mark.parametrize("n", [320, 321, 1000, 6400])
def test_positions_take_the_smaller_form(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(0))
    seen = set()
    for k in range(1, n // 8):
        codec = TopK(k / n)
        assert codec.kept(n) == k
        size = codec.payload_nbytes((n,), torch.float32)
        assert size == 4 * k + min(4 * k, (n + 7) // 8)
        if abs(4 * k - n / 8) < 12:
            payload = codec.encode(x)
            seen.add(payload.tensors["positions"].dtype)
            assert payload.nbytes == size
            assert torch.equal(codec.decode(payload), codec.roundtrip(x))
    assert seen == {torch.uint8, torch.int32}


def test_a_bitmap_of_a_length_that_is_no_multiple_of_8():
    x = torch.arange(1.0, 14)
    payload = TopK(0.5).encode(x)
    assert payload.tensors["positions"].numel() == 2
    assert torch.equal(TopK(0.5).decode(payload), torch.where(x >= 8, x, 0))


def test_a_tensor_of_equal_values():
    y = TopK(0.25).roundtrip(torch.full((4, 8), -2.0))
    assert torch.equal(y.view(-1), torch.tensor([-2.0] * 8 + [0.0] * 24))


@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_decoding_is_one_graph(ratio):
    """Positions are checked where that does not depend on values that a graph cannot know."""
    codec, x = TopK(ratio=ratio), torch.randn(64, 64)
    payload, found = codec.encode(x), []

    def decode(values, positions):
        return codec.decode(dataclasses.replace(payload, tensors={"values": values, "positions": positions}))

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    compiled = torch.compile(decode, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*payload.tensors.values()), codec.decode(payload)) and len(found) == 1
