"""The k largest without a sort: exact whatever the sample says.  The slow twin sorts everything, stably."""

import pytest
import torch

from hf_actcompress.codecs import TopK
from hf_actcompress.ops import selection
from hf_actcompress.ops.selection import find_cut, ranks, set_bits

N = 4 * selection.SAMPLE + 4321  # more than is ranked as a whole; with a short last row


def data(kind, n=N):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=g)
    if kind == "half zeros":
        x.relu_()
    elif kind == "few values":
        x = torch.randint(-3, 4, (n,), generator=g).float()
    elif kind == "constant":
        x = torch.full((n,), -2.0)
    elif kind == "the sample sees zeros":
        stride = n // selection.SAMPLE | 1
        x[::stride] = 0
    elif kind == "the sample sees the largest":
        stride = n // selection.SAMPLE | 1
        x[::stride] = 9 + x[::stride].abs()
    return x


def slow(x, k):
    kept = x.abs().sort(descending=True, stable=True).indices[:k]
    out = torch.zeros_like(x)
    out[kept] = x[kept]
    return out, kept.sort().values


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 0.97])
@pytest.mark.parametrize(
    "kind",
    ["plain", "half zeros", "few values", "constant", "the sample sees zeros", "the sample sees the largest"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_kept_are_those_of_a_full_sort(kind, ratio, dtype):
    x, codec = data(kind).to(dtype), TopK(ratio)
    k = codec.kept(len(x))
    expected, kept = slow(x, k)
    cut = find_cut(x, k)
    above = (x.abs() > cut.hi).nonzero().view(-1)
    assert torch.equal(torch.cat([above, cut.more]).sort().values, kept)
    payload = codec.encode(x)
    assert payload.tensors["values"].numel() == k and payload.nbytes == codec.payload_nbytes(x.shape, dtype)
    assert torch.equal(codec.decode(payload), expected) and torch.equal(codec.roundtrip(x), expected)


def test_a_good_sample_leaves_a_narrow_band(monkeypatch):
    seen = []
    inner = selection.set_bits
    monkeypatch.setattr(selection, "set_bits", lambda *a, **k: seen.append(inner(*a, **k)) or seen[-1])
    find_cut(data("plain", 2_000_000), 200_000)
    assert len(seen) == 1 and seen[0].numel() < 40_000


@pytest.mark.parametrize("n", [1, 8, 13, 128, 129, 1000])
def test_bitmaps(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    payload = TopK(0.5).encode(x)
    bits, values = payload.tensors["positions"], payload.tensors["values"]
    found = set_bits(bits, n)
    assert torch.equal(x[found], values)
    assert torch.equal(found.sort().values, slow(x, len(values))[1])
    counts = [int(b).bit_count() for b in bits]
    assert ranks(bits).tolist() == [sum(counts[:i]) for i in range(len(counts))] and sum(counts) == len(values)
