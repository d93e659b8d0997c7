import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.codecs import Block
from hf_actcompress.codecs.transforms.hadamard import random_sign
from hf_actcompress.codecs.transforms.levels import gauss_distortion, gauss_levels

EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 2.0**-23}


def sample(shape, dtype=torch.float32, seed=0, offset=0.0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset
    return x.to(dtype)


def groups_of(codec, shape):
    """Flat indices of every group, written out."""
    index = torch.arange(torch.Size(shape).numel()).view(shape)
    if codec.dim == "channel" and len(shape) > 1:
        axis = 1 if len(shape) == 4 else len(shape) - 1
        return [index.select(axis, c).reshape(-1).tolist() for c in range(shape[axis])]
    n = index.numel()
    size = codec.group or 128
    if codec.splits:
        size = next(s for s in itertools.count(8, 8) if s * codec.splits >= n)
    return [list(range(i, min(i + size, n))) for i in range(0, n, size)]


def check_twin(codec, x):
    """Group by group: the scales enclose the group, and every value goes to the nearest step."""
    payload = codec.encode(x)
    y = codec.decode(payload).double().reshape(-1)
    flat = x.double().reshape(-1)
    top = 2**codec.bits - 1
    groups = groups_of(codec, x.shape)
    scales = payload.tensors["scales"]
    assert scales.shape == (len(groups), 2)
    assert scales.dtype == (torch.bfloat16 if codec.scale == 16 else torch.float32)
    for group, (lo, step) in zip(groups, scales.double().tolist(), strict=True):
        v = flat[group]
        least, span = float(v.min()), float(v.max() - v.min())
        room = 4 * EPS[x.dtype] * float(v.abs().max()) + 1e-37
        fine = 2.0**-7 if codec.scale == 16 else 2.0**-22
        assert least - fine * abs(least) - 1e-37 <= lo <= least + 2.0**-23 * abs(least) + 1e-37
        assert span - room <= top * step <= (span + fine * abs(least) + room) * (1 + fine) + 1e-36
        for value, got in zip(v.tolist(), y[group].tolist(), strict=True):
            want = lo + step * min(round((value - lo) / step), top) if step else lo
            assert abs(got - value) <= step / 2 + room
            assert abs(got - want) <= room or abs(abs(value - lo) / step % 1 - 0.5) < 1e-3 * top


SPECS = [
    Block(4), Block(1, group=8), Block(2, group=24), Block(3, splits=5), Block(8, splits=1), Block(5, dim="channel"),
    Block(7, scale=32), Block(12, scale=32, group=64),
]  # fmt: skip


@pytest.mark.parametrize("codec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (300,), (7, 19), (3, 5, 11), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_slow_twin(codec, shape, dtype):
    check_twin(codec, sample(shape, dtype))
    check_twin(codec, sample(shape, dtype, seed=1, offset=50))


@pytest.mark.parametrize("codec", [Block(4, dim="channel"), Block(4, group=16)], ids=str)
def test_the_twin_sees_through_strides(codec):
    check_twin(codec, sample((6, 4, 5, 8)).to(memory_format=torch.channels_last))
    check_twin(codec, sample((9, 40))[:, ::2].t())


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60),
    st.integers(1, 12),
    st.sampled_from(list(EPS)),
    st.sampled_from([16, 32]),
)
def test_the_error_is_at_most_half_a_step_of_the_group(values, bits, dtype, scale):
    check_twin(Block(bits, group=16, scale=scale), torch.tensor(values).to(dtype))


@pytest.mark.parametrize("kind", [dict(), dict(scale=32), dict(rotate="hadamard"), dict(dim="channel")])
@pytest.mark.parametrize("bits", [1, 4])
def test_stochastic_rounding_is_unbiased(kind, bits):
    codec, draws = Block(bits, round="stochastic", **kind), 600
    x = sample((24, 16))
    state = codec.init_state("s", seed=1)
    ys = torch.stack([codec.roundtrip(x, state).double() for _ in range(draws)])
    step = float(codec.encode(x).tensors["scales"][:, 1].float().max())
    if not codec.rotate:
        assert float((ys - x.double()).abs().max()) < step * (1 + 1e-5)
    error = ys.std(0) / draws**0.5
    off = (ys.mean(0) - x.double()).abs()
    # Values that lie on a step have no spread but the one of chance in few draws: a floor of one flip.
    assert (off <= 4 * error + 3 * step / draws).all()
    assert float((off / (error + step / draws)).pow(2).mean().sqrt()) < 1.15
    assert not torch.equal(ys[0], ys[1])


def test_gauss_takes_the_nearest_level():
    codec = Block(3, group=32, levels="gauss")
    x = sample((5, 32), offset=0.3)
    payload = codec.encode(x)
    y = codec.decode(payload)
    levels = gauss_levels(3)
    for row, got, (center, spread) in zip(x, y, payload.tensors["scales"].double().tolist(), strict=True):
        assert center == float(row.mean().bfloat16())
        exact = float((row.double() - center).pow(2).mean().sqrt())
        assert exact * (1 - 1e-6) <= spread <= exact * (1 + 2.0**-7)
        for value, out in zip(row.tolist(), got.tolist(), strict=True):
            nearest = min(levels, key=lambda v: abs(center + v * spread - value))
            assert out == pytest.approx(center + nearest * spread, abs=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("rotate", [None, "hadamard"])
def test_gauss_levels_reach_the_distortion_of_the_theory(bits, rotate):
    x = sample((1000, 512))
    least = gauss_distortion(bits)
    for fit, error in {"error": least, "unbiased": least / (1 - least)}.items():
        y = Block(bits, group=512, levels="gauss", rotate=rotate, fit=fit).roundtrip(x)
        assert float((y - x).pow(2).mean()) == pytest.approx(error, rel=0.03), fit


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_nothing_shrinks_after_a_rotation(bits):
    """The decoded tensor's product with the original is the original's square; least squares loses the error."""
    x = sample((1000, 128), offset=0.5)
    for fit, kept in {None: 1.0, "error": 1 - gauss_distortion(bits)}.items():
        codec = Block(bits, rotate="hadamard", levels="gauss", equalize="none", scale=32, fit=fit)
        payload = codec.encode(x)
        center = payload.tensors["scales"][:, :1]
        before, after = (x - center).double(), (codec.decode(payload) - center).double()
        assert float((before * after).sum() / (before * before).sum()) == pytest.approx(kept, rel=5e-3), fit


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [128, 640, 333])
def test_rotation_keeps_the_error_of_the_turned_group(bits, n):
    """A rotation keeps lengths: the error of a group is at most half a step for each of its coefficients."""
    codec = Block(bits, rotate="hadamard")
    x = sample((n,), offset=2.0)
    payload = codec.encode(x)
    padded = torch.cat([x, x[-1:].expand(-n % 128)]).view(-1, 128)
    for row, (center, step) in zip(padded, payload.tensors["scales"].double().tolist(), strict=True):
        assert center == pytest.approx(float(row.mean()), rel=2.0**-7)
        sign = torch.tensor([[(-1.0) ** (i & j).bit_count() for i in range(128)] for j in range(128)]).double()
        flips = torch.tensor([random_sign(i) for i in range(128)]).double()
        turned = sign @ (flips * (row.double() - center)) / 128**0.5
        assert 2 * float(turned.abs().max()) / (2**bits - 1) == pytest.approx(step, rel=2.0**-7)
    steps = payload.tensors["scales"][:, 1].double()
    error = (codec.decode(payload) - x).double()
    for part, step in zip(error.split(128), steps, strict=True):
        assert float(part.norm()) <= float(step) / 2 * 128**0.5 * (1 + 1e-4)


def test_rotation_helps_where_there_are_outliers():
    x = sample((64, 128))
    x[:, 7] *= 60
    plain, turned = (float((c.roundtrip(x) - x).pow(2).mean()) for c in (Block(4), Block(4, rotate="hadamard")))
    assert turned < plain / 3


def test_clip_cuts_the_tails_for_a_finer_step():
    codec, x = Block(3, group=64, clip=0.5, scale=32), sample((10, 64))
    payload = codec.encode(x)
    y = codec.decode(payload)
    for row, got, (lo, step) in zip(x, y, payload.tensors["scales"].tolist(), strict=True):
        least, most = float(row.min()), float(row.max())
        assert lo == pytest.approx(least + (most - least) / 4, abs=1e-5)
        assert step == pytest.approx((most - least) / 2 / 7, rel=1e-5)
        inside = row.clamp(lo, lo + 7 * step)
        assert float((got - inside).abs().max()) <= step / 2 + 1e-5
    assert float((y - x).abs().max()) > float(payload.tensors["scales"][:, 1].max())


@pytest.mark.parametrize(
    "codec, shape, nbytes",
    [(Block(4), (256,), 128 + 2 * 4), (Block(4), (130,), 64 + 4 + 4 + 4), (Block(3, group=8), (9,), 2 * (3 + 4)),
     (Block(4, scale=32), (128,), 64 + 8), (Block(4, rotate="hadamard"), (130,), 2 * (64 + 4)),
     (Block(2, splits=4), (100,), 4 * 4 + 26), (Block(4, dim="channel"), (2, 3, 2, 2), 3 * (4 + 4)),
     (Block(4, dim="channel"), (5, 7), 7 * (4 + 4)), (Block(16), (), 16 + 4)],
)  # fmt: skip
def test_payload_by_hand(codec, shape, nbytes):
    assert codec.payload_nbytes(shape, torch.float32) == codec.encode(sample(shape)).nbytes == nbytes


def test_finite_fp16_stays_finite():
    """Scales are rounded outwards: the minimum of fp16 becomes -65536, which fp16 does not hold."""
    x = torch.tensor([-65504.0, 0, 65504] * 50).half()
    for codec in (Block(4), Block(4, dim="channel"), Block(8, rotate="hadamard"), Block(2, round="stochastic")):
        assert torch.isfinite(codec.roundtrip(x)).all() and torch.isfinite(codec.decode(codec.encode(x))).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -(2.0**49), 2.0**47.5])
@pytest.mark.parametrize("options", [
    dict(), dict(clip=0.01), dict(rotate="hadamard"), dict(levels="gauss"), dict(round="stochastic"),
    dict(rotate="hadamard", levels="gauss", allocate="energy"), dict(equalize="none"), dict(dim="channel"),
])  # fmt: skip
def test_one_value_that_cannot_be_coded_passes_the_tensor_on(value, options):
    """The scales tell; where they leave a doubt, a pass over the tensor does."""
    x = sample((700, 128))
    x[333, 77] = value
    codec = Block(4, **options)
    state, fresh = codec.init_state("s"), codec.init_state("s")
    payload = codec.encode(x, state)
    assert payload.raw == (not abs(value) <= 2**48)
    if payload.raw:
        assert torch.equal(codec.decode(payload), x) or value != value
        assert state is None or state.step == fresh.step
