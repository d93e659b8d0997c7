import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.codecs import Block, Rotated, Trellis

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
    assert scales.dtype == torch.bfloat16
    for group, (lo, step) in zip(groups, scales.double().tolist(), strict=True):
        v = flat[group]
        least, span = float(v.min()), float(v.max() - v.min())
        room = 4 * EPS[x.dtype] * float(v.abs().max()) + 1e-37
        fine = 2.0**-7
        assert least - fine * abs(least) - 1e-37 <= lo <= least + 2.0**-23 * abs(least) + 1e-37
        assert span - room <= top * step <= (span + fine * abs(least) + room) * (1 + fine) + 1e-36
        for value, got in zip(v.tolist(), y[group].tolist(), strict=True):
            want = lo + step * min(round((value - lo) / step), top) if step else lo
            assert abs(got - value) <= step / 2 + room
            assert abs(got - want) <= room or abs(abs(value - lo) / step % 1 - 0.5) < 1e-3 * top


SPECS = [
    Block(4), Block(1, group=8), Block(2, group=24), Block(3, splits=5), Block(8, splits=1),
    Block(5, dim="channel"), Block(12, group=64),
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
)
def test_the_error_is_at_most_half_a_step_of_the_group(values, bits, dtype):
    check_twin(Block(bits, group=16), torch.tensor(values).to(dtype))


@pytest.mark.parametrize("kind", [dict(), dict(dim="channel")])
@pytest.mark.parametrize("bits", [1, 4])
def test_stochastic_rounding_is_unbiased(kind, bits):
    codec, draws = Block(bits, round="stochastic", **kind), 600
    x = sample((24, 16))
    state = codec.init_state("s", seed=1)
    ys = torch.stack([codec.roundtrip(x, state).double() for _ in range(draws)])
    step = float(codec.encode(x).tensors["scales"][:, 1].float().max())
    assert float((ys - x.double()).abs().max()) < step * (1 + 1e-5)
    error = ys.std(0) / draws**0.5
    off = (ys.mean(0) - x.double()).abs()
    # Values that lie on a step have no spread but the one of chance in few draws: a floor of one flip.
    assert (off <= 4 * error + 3 * step / draws).all()
    assert float((off / (error + step / draws)).pow(2).mean().sqrt()) < 1.15
    assert not torch.equal(ys[0], ys[1])


@pytest.mark.parametrize(
    "codec, shape, nbytes",
    [(Block(4), (256,), 128 + 2 * 4), (Block(4), (130,), 64 + 4 + 4 + 4), (Block(3, group=8), (9,), 2 * (3 + 4)),
     (Rotated(4), (130,), 2 * (64 + 4)), (Rotated(2), (2, 4, 6, 8), 3 * (32 + 4) + 4),
     (Block(2, splits=4), (100,), 4 * 4 + 26), (Block(4, dim="channel"), (2, 3, 2, 2), 3 * (4 + 4)),
     (Block(4, dim="channel"), (5, 7), 7 * (4 + 4)), (Block(16), (), 16 + 4)],
)  # fmt: skip
def test_payload_by_hand(codec, shape, nbytes):
    assert codec.payload_nbytes(shape, torch.float32) == codec.encode(sample(shape)).nbytes == nbytes


def test_finite_fp16_stays_finite():
    """Scales are rounded outwards: the minimum of fp16 becomes -65536, which fp16 does not hold."""
    x = torch.tensor([-65504.0, 0, 65504] * 50).half()
    for codec in (Block(4), Block(4, dim="channel"), Rotated(8), Block(2, round="stochastic")):
        assert torch.isfinite(codec.roundtrip(x)).all() and torch.isfinite(codec.decode(codec.encode(x))).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("codec", [
    Block(4), Block(4, round="stochastic"), Block(4, equalize="none"), Rotated(4), Trellis(2),
], ids=str)  # fmt: skip
def test_one_value_that_is_not_finite_takes_its_group_along(value, codec):
    x = sample((700, 128))
    x[333, 77] = value
    count = torch.zeros(1, dtype=torch.int64)
    y = codec.decode(codec.encode(x, codec.init_state("s"), nonfinite=count))
    assert y[333].isnan().all() and y.isnan().sum() == 128 and int(count) == 1


@pytest.mark.parametrize("codec", [Block(4), Block(4, dim="channel"), Block(4, equalize="none")], ids=str)
def test_large_values_are_values_like_others(codec):
    x = sample((700, 128))
    y = codec.roundtrip(x * 2.0**100)
    assert y.isfinite().all() and ((y / 2.0**100 - x).norm() - (codec.roundtrip(x) - x).norm()).abs() < 0.02 * x.norm()


def test_encoding_is_one_graph_for_every_batch_size():
    torch._dynamo.reset()
    codec, graphs = Block(bits=4), []
    codec.encode(torch.randn(64, 64))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: codec.encode(x).tensors["codes"], fullgraph=True, backend=backend)
    for rows in (64, 40, 33):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), codec.encode(x).tensors["codes"])
    assert len(graphs) == 2  # of the first size, and of any
