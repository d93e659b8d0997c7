"""The k largest without a sort: exact whatever the sample says, and in every form.  The slow twin sorts everything."""

import pytest
import torch
from helpers.operators import FORM_TESTS

from hf_actcompress.ops.selection import keep_largest, place_values, select_largest

SAMPLE = 1 << 16
N = 4 * SAMPLE + 4321  # more than is ranked as a whole; with a short last row


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
        x[:: n // SAMPLE | 1] = 0
    elif kind == "the sample sees the largest":
        stride = n // SAMPLE | 1
        x[::stride] = 9 + x[::stride].abs()
    elif kind == "not finite":
        x[::100], x[1::100], x[2::100], x[3::100] = float("nan"), float("inf"), float("-inf"), -float("nan")
        x[4::100] *= 1e-40
    return x


KINDS = ["plain", "half zeros", "few values", "constant", "the sample sees zeros", "the sample sees the largest",
         "not finite"]  # fmt: skip


def slow(x, k):
    """Ascending positions of the kept; NaN is above all others."""
    return x.double().abs().nan_to_num(9e300, 8e300).sort(descending=True, stable=True).indices[:k].sort().values


def byte_by_byte(positions, n):
    """The same positions in the order of their bits in a bitmap."""
    row, at = positions // 128, positions % 128
    width = torch.where(row == n // 128, -(-(n % 128) // 8), 16).clamp_min(1)
    return positions[((row * 16 + at % width) * 8 + at // width).argsort()]


def equal(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_kept_are_those_of_a_full_sort(kind, dtype):
    x = data(kind).to(dtype)
    for share in (0.001, 0.1, 0.97):
        k = round(share * N)
        kept = slow(x, k)
        values, where = select_largest(x, k, False)
        assert where.dtype == torch.int32 and torch.equal(where.long(), kept) and equal(values, x[kept])
        values, bits = select_largest(x, k, True)
        assert equal(values, x[byte_by_byte(kept, N)]) and bits.shape == (-(-N // 8),)
        expected = torch.zeros_like(x).index_put_((kept,), x[kept])
        assert equal(place_values(values, bits, [N]), expected) and equal(keep_largest(x, k), expected)


@pytest.mark.parametrize("compare", FORM_TESTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forms_agree(compare, dtype):
    for kind, n in (("plain", 13), ("few values", 1301), ("not finite", 1301)):
        x = data(kind, n).to(dtype)
        for k in (n // 50 + 1, n // 2 + 1):
            compare("keep_largest", x, k)
            compare("select_largest", x, k, False)
            values, bits = compare("select_largest", x, k, True)
            compare("place_values", values, bits, [n])
    for kind in ("plain", "few values"):
        x = data(kind, 600).to(dtype).view(20, 30)
        for view in (x.T, x.view(2, 5, 6, 10).permute(0, 3, 1, 2), x[:, ::2]):
            assert compare("keep_largest", view, 99).stride() == torch.empty_like(view).stride()
    compare("select_largest", data("plain", 600).to(dtype).view(20, 30).T, 99, True)


def test_bits_beyond_the_values_read_nothing():
    for n in (13, 5003):
        bits = torch.full((-(-n // 8),), 255, dtype=torch.uint8)
        assert place_values(torch.ones(3), bits, [n]).shape == (n,)
