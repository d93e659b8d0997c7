import pytest
import torch

from hf_actcompress.codecs import Block, Rotated
from hf_actcompress.codecs.transforms.equalize import MIN_ROWS, applies, inner_size
from hf_actcompress.ops.ranges import SAMPLE, feature_scales


def hidden_states(rows=400, features=64, outlier=40.0):
    x = torch.randn(rows, features, generator=torch.Generator().manual_seed(0))
    x[:, 5] = x[:, 5] * outlier + 100
    return x


def error(codec, x):
    """Relative squared error of the features that are not outliers."""
    rest = [f for f in range(x.shape[-1]) if f != 5]
    return float((codec.roundtrip(x) - x)[..., rest].pow(2).mean() / x[..., rest].var())


def test_scales_are_mean_and_root_of_deviation_per_feature():
    x = hidden_states()
    scales = feature_scales(x)
    assert scales.dtype == torch.bfloat16 and scales.shape == (2, 64)
    for f in range(64):
        column = x[:, f].double()
        assert float(scales[0, f]) == pytest.approx(float(column.mean()), rel=2.0**-8, abs=1e-6)
        assert float(scales[1, f]) == pytest.approx(float(column.std(correction=0)) ** 0.5, rel=2.0**-7)


def test_channels_are_dimension_one_of_pictures():
    x = torch.randn(8, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 9, 100]).view(3, 1, 1)
    by_hand = feature_scales(x.movedim(1, -1).reshape(-1, 3))
    assert torch.equal(feature_scales(x), by_hand)
    assert feature_scales(x.to(memory_format=torch.channels_last)).shape == (2, 3)


def tables(scales, shape):
    """Mean and root of deviation of each element, of that shape."""
    view = (1, -1, 1, 1) if len(shape) == 4 else (-1,)
    return tuple(row.view(view).expand(shape) for row in scales.float())


def test_a_feature_lies_side_by_side_in_images_alone():
    assert inner_size((2, 3, 4, 5)) == 20 and inner_size((7, 30, 100)) == inner_size((40, 64)) == 1


def test_constant_features_and_extreme_scales_stay_finite():
    x = hidden_states()
    x[:, 0] = 3.0
    for unit in (2.0**-100, 1.0, 2.0**34):
        y = Block(8).roundtrip(x * unit)
        assert torch.isfinite(y).all()
        assert float((y / unit - x).abs().max()) < 40 * 8 / 255 * 2
        assert float((y / unit - x)[:, 0].abs().max()) < 0.02
    assert torch.equal(Block(4).roundtrip(torch.zeros(300, 16)), torch.zeros(300, 16))


def test_a_feature_that_only_looks_constant_in_the_sample_is_kept():
    x = torch.randn(3 * SAMPLE, 16, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 7.0
    x[1, 3] = -7.0  # between the sampled rows
    y = Block(8).roundtrip(x)
    # Its group of 8 rows pays with a coarse step; nothing else does.
    assert abs(float(y[1, 3]) + 7) < 0.1 and float((y[8:, 3] - 7).abs().max()) < 0.01


@pytest.mark.parametrize("bits", [2, 4])
def test_an_outlier_feature_no_longer_drowns_the_others(bits):
    x = hidden_states()
    assert error(Block(bits), x) < error(Block(bits, equalize="none"), x) / 5


@pytest.mark.parametrize("shape", [(400, 64), (300, 100), (20, 33, 129), (9, 5, 6, 7)])
@pytest.mark.parametrize("options", [dict(), dict(round="stochastic")])
def test_the_codec_equalizes_as_by_hand(shape, options):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * torch.linspace(1, 9, shape[-1])
    mean, root = tables(feature_scales(x), shape)
    inner = Block(4, equalize="none", **options).roundtrip((x - mean) * (1 / root))
    assert torch.equal(Block(4, **options).roundtrip(x), inner * root + mean)


def test_dividing_by_the_root_beats_dividing_by_the_deviation():
    """The claim of the module: of all powers of the deviation the root has the least total error."""
    x = hidden_states(2000, 64, 10.0) * torch.logspace(-1, 1, 64)
    scales = feature_scales(x).float()
    codec = Block(4, equalize="none", group=64)
    total = {}
    for power in (0.0, 0.5, 1.0):
        weight = (scales[1] ** 2) ** power
        y = codec.roundtrip((x - scales[0]) / weight) * weight + scales[0]
        total[power] = float((y - x).pow(2).sum())
    assert total[0.5] < min(total[0.0], total[1.0])


def test_only_tensors_with_enough_rows_and_their_bytes():
    assert not applies((MIN_ROWS - 1, 8)) and applies((MIN_ROWS, 8)) and not applies((10_000,)) and not applies(())
    assert applies((4, 8, 8, 8)) and not applies((3, 8, 8, 8))
    for rows, extra in ((MIN_ROWS - 1, 0), (MIN_ROWS, 4 * 8)):
        x = torch.randn(rows, 8)
        with_, without = Block(4).encode(x), Block(4, equalize="none").encode(x)
        assert with_.nbytes - without.nbytes == extra
        assert with_.nbytes == Block(4).payload_nbytes((rows, 8), torch.float32)


def test_a_sample_of_rows_serves_for_many():
    x = hidden_states(4 * SAMPLE, 16)
    mean, root = feature_scales(x).float()
    assert ((mean - x.mean(0)).abs() < 4 * x.std(0) / SAMPLE**0.5 + 2**-8 * mean.abs()).all()
    assert ((root - x.std(0).sqrt()).abs() < 0.1 * x.std(0).sqrt()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", [Block(4), Rotated(4), Block(4, round="stochastic")], ids=str)
def test_roundtrip_is_decode_of_encode(codec, dtype):
    x = hidden_states().to(dtype)
    one, two = codec.init_state("a"), codec.init_state("a")
    assert torch.equal(codec.roundtrip(x, one), codec.decode(codec.encode(x, two)))


def test_stochastic_rounding_stays_unbiased():
    codec, x, draws = Block(3, round="stochastic"), hidden_states(256, 8), 400
    state = codec.init_state("a")
    ys = torch.stack([codec.roundtrip(x, state).double() for _ in range(draws)])
    spread = ys.std(0) / draws**0.5
    off = ys.mean(0) - x.double()
    # A value close to a code flips so rarely that its spread is unknown: allow for a few flips of the largest step.
    step = (ys - x.double()).abs().amax((0, 1))
    assert (off.abs() <= 4 * spread + 8 * step / draws).all()
    assert (off.mean(0).abs() <= 4 * spread.pow(2).mean(0).sqrt() / 256**0.5).all()
