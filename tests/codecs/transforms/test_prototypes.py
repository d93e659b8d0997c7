"""Rows that are alike are kept once: exact bytes, little error, nothing lost where no rows are alike."""

import math

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.codecs.transforms import prototypes

SPEC = "rotated:bits=2"
WITH = SPEC + ",prototypes=3"


def sentences(batch=40, length=20, features=128, seed=0):
    """First tokens all alike, words all different, the last third of a sentence padding that is nearly alike."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, features, generator=g)
    x[:, 0] = 2 * torch.randn(features, generator=g)
    pad = torch.randn(features, generator=g) + 0.1 * torch.randn(batch, length // 3, features, generator=g)
    x[:, -(length // 3) :] = pad
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(40, 20, 64), (600, 24), (513, 100)])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_bytes_and_bits(dtype, shape, count):
    codec, x = parse_codec(f"{SPEC},prototypes={count}"), torch.randn(shape).to(dtype)
    payload = codec.encode(x)
    assert payload.nbytes == codec.payload_nbytes(shape, dtype)
    rows = math.prod(shape[:-1])
    extra = 2 * count * shape[-1] + -(-rows // 8) * count.bit_length()
    assert payload.nbytes == parse_codec(SPEC).payload_nbytes(shape, dtype) + extra
    y = codec.decode(payload)
    assert torch.equal(y, codec.roundtrip(x)) and y.dtype == dtype and y.is_contiguous()


def test_rows_that_are_alike_lose_next_to_nothing_and_the_words_less():
    x = sentences()
    lost = [(parse_codec(spec).roundtrip(x) - x).square().mean((0, 2)) for spec in (SPEC, WITH)]
    assert lost[1][0] < 0.01 * lost[0][0], "the first tokens"
    assert lost[1][1:14].mean() < 0.8 * lost[0][1:14].mean(), "the words"


def test_each_row_has_the_nearest_prototype_or_none():
    """Against a plain search."""
    x = sentences().view(-1, 128)
    mean, root = x.mean(0), x.var(0) ** 0.25
    found = prototypes.find(x, mean, root, 3)
    left, packed = prototypes.subtract(x, found, mean, root)
    choices = torch.cat([torch.zeros(1, 128), found.float()])
    left_of = ((x[:, None] - mean - choices) / root).square().sum(2)
    nearest = x - choices[left_of.argmin(1)]
    torch.testing.assert_close(left, nearest)
    torch.testing.assert_close(prototypes.add(left, found, packed), x)
    assert left_of.argmin(1).view(40, 20)[:, 0].unique().numel() == 1, "all first tokens share a prototype"
    assert left_of.argmin(1).view(40, 20)[:, 0].unique().item() > 0


def test_where_no_rows_are_alike_little_is_lost():
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    plain, with_them = ((parse_codec(spec).roundtrip(x) - x).square().mean() for spec in (SPEC, WITH))
    assert with_them < 1.02 * plain


@pytest.mark.parametrize("shape", [(300, 64), (2, 16, 32, 32), (100_000,)])
def test_other_tensors_stay_as_they_were(shape):
    x = torch.randn(shape)
    assert torch.equal(parse_codec(WITH).roundtrip(x), parse_codec(SPEC).roundtrip(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**127])
def test_only_the_group_of_a_value_that_cannot_be_compressed_is_lost(bad):
    x = sentences()
    x[3, 0, 5] = bad
    count = torch.zeros(1, dtype=torch.int64)
    y = parse_codec(WITH).roundtrip(x, nonfinite=count)
    assert torch.isfinite(y[:3]).all() and torch.isfinite(y[4:]).all() and torch.isfinite(y[3, 1:]).all()
    assert int(count) == int(not torch.isfinite(y[3, 0]).any())
    assert y[3, 0].isnan().all() or bad == 2.0**127
    x = torch.zeros(600, 16)
    assert torch.equal(parse_codec(WITH).roundtrip(x), x)
    x = torch.full((600, 16), 2.0**47)
    torch.testing.assert_close(parse_codec(WITH).roundtrip(x), x, rtol=0.02, atol=0)


def test_what_is_refused():
    with pytest.raises(ValueError, match="prototypes=16 is not an integer from 0 to 15"):
        parse_codec(f"{SPEC},prototypes=16")
