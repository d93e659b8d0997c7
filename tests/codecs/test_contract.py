"""What every codec promises, for codecs of every kind, and shapes, layouts, dtypes and magnitudes drawn at random.

Where an input is cheap one test goes through all codecs; an error names the codec and the input.
"""

import copy
import dataclasses
import pickle
from itertools import product

import pytest
import torch
from helpers import naming
from helpers.specs import SPECS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_actcompress.codecs import CODECS, parse_codec, raw_nbytes
from hf_actcompress.ops import gaussian, hadamard, trellis

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    (), (1,), (7,), (8,), (127,), (128,), (129,), (1031,), (2500,), (1, 1), (3, 5), (17, 8), (2, 3, 5), (4, 33, 16),
    (2, 3, 5, 7), (1, 8, 4, 4), (3, 2, 2, 1, 5), (300, 3), (2, 3, 12, 12),
]  # fmt: skip
EMPTY = [(0,), (3, 0), (2, 0, 4), (0, 3, 4, 4)]
NONFINITE = (float("nan"), float("inf"), float("-inf"))
LARGEST = 2.0**48  # squares of what is larger leave the range of fp32
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a, b):
    """Equal shape, dtype and bits (0.0 differs from -0.0, NaN equals the same NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    ints = INTS[a.element_size()]
    return torch.equal(a.contiguous().view(-1).view(ints), b.contiguous().view(-1).view(ints))


def same(a, b):
    """Equality of nested dicts, tensors and numbers."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and same_bits(a, b)
    return type(a) is type(b) and a == b


def content(state):
    return None if state is None else copy.deepcopy(state.state_dict())


def features(shape):
    return (shape[1] if len(shape) == 4 else shape[-1]) if shape else 10**9


def fits(spec, shape):
    """Low-rank codecs refuse a rank above the number of features."""
    return "rank=" not in spec or int(spec.split("rank=")[1][0]) <= features(shape)


def lay_out(x, layout):
    """The values of `x` in memory that is not contiguous (where the shape allows)."""
    if layout == "strided" and x.dim():
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
    return x


def make(shape, fill, exponent, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if fill == "heavy":
        x = x**5
    elif fill == "constant":
        x = torch.full(shape, float(torch.randn((), generator=g)), dtype=torch.float64)
    elif fill == "zeros":
        x = torch.zeros(shape, dtype=torch.float64)
    elif fill == "few":
        x = x.round()
    elif fill == "offset":
        x = 100 + x
    return (x * 2.0**exponent).clamp(-LARGEST, LARGEST)


def small_input(seed=0):
    return make((6, 40), "gauss", 0, seed).float()


@st.composite
def tensors(draw, exponents=(-140, -100, -20, 0, 0, 0, 20, 50)):
    shape = draw(st.sampled_from(SHAPES))
    fill = draw(st.sampled_from(["gauss", "gauss", "heavy", "constant", "zeros", "few", "offset"]))
    x = make(shape, fill, draw(st.sampled_from(exponents)), draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from(DTYPES))
    x = x.clamp(-65504, 65504).half() if dtype == torch.float16 else x.to(dtype)
    return lay_out(x, draw(st.sampled_from(["plain", "strided", "transposed", "channels_last", "offset"])))


def check(codec, x):
    """One step of the contract, from a fresh state and then from the state that step left."""
    before, bits = x.clone(), x.stride()
    one, two = codec.init_state("site", seed=3), codec.init_state("site", seed=3)
    for _ in range(2):
        payload = codec.encode(x, one)
        y = codec.decode(payload)
        z = codec.roundtrip(x, two)
        assert same_bits(x, before) and x.stride() == bits
        assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device and y.is_contiguous()
        assert torch.isfinite(y).all()
        assert same_bits(y, z) and (z.is_contiguous() or z.stride() == x.stride())
        assert same(content(one), content(two))
        tensors = list(payload.tensors.values()) + [t for p in payload.parts.values() for t in p.tensors.values()]
        assert payload.nbytes == sum(len(t.contiguous().view(-1).view(torch.uint8)) for t in tensors)
        assert payload.nbytes == codec.payload_nbytes(x.shape, x.dtype)
        assert payload.ratio == pytest.approx(raw_nbytes(x.shape, x.dtype) / payload.nbytes)
        y.fill_(3)
        z.fill_(3)
        assert same_bits(x, before)


@pytest.mark.parametrize("spec", SPECS)
@given(data=st.data())
@settings(max_examples=12)  # of each codec; the shapes, layouts, fills and dtypes are met hundreds of times in all
def test_decode_encode_and_roundtrip_agree(spec, data):
    x = data.draw(tensors())
    assume(fits(spec, x.shape))
    check(parse_codec(spec), x)


@given(spec=st.sampled_from(SPECS), x=tensors(exponents=(40, 44, 46, 48)))
@settings(max_examples=4 * len(SPECS))
def test_huge_values_stay_finite(spec, x):
    assume(fits(spec, x.shape))
    with naming(spec):
        check(parse_codec(spec), x)


def test_layout_does_not_change_the_values():
    x = make((2, 16, 9, 5), "gauss", 0, 0).float()
    for spec in SPECS:
        codec = parse_codec(spec)
        expected = codec.roundtrip(x)
        for layout in ("strided", "transposed", "channels_last"):
            with naming(spec, layout):
                assert same_bits(codec.roundtrip(lay_out(x, layout)), expected)


@pytest.mark.parametrize("spec", SPECS)
def test_a_tensor_of_many_tiles(spec):
    check(parse_codec(spec), make((1, 300_007), "heavy", 0, 1).float())
    if "rank" not in spec:  # [1, n] has the factors of a whole tensor; the other way round has one feature
        check(parse_codec(spec), make((150_001, 1), "gauss", 0, 1).bfloat16())


def test_tensors_without_values_have_shapes():
    """On the device "meta", as when a large model is only planned."""
    x = torch.empty(64, 64, device="meta")
    for spec in ("identity", "block:bits=4", "uniform:bits=8", "topk:ratio=0.1", "rotated:bits=3", "float8"):
        with naming(spec):
            y = parse_codec(spec).roundtrip(x)
            assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)


def test_empty_tensors():
    for spec, shape in product(SPECS, EMPTY):
        codec, x = parse_codec(spec), torch.empty(shape, dtype=torch.bfloat16)
        state = codec.init_state("s")
        before = content(state)
        with naming(spec, shape):
            payload = codec.encode(x, state)
            assert payload.nbytes == codec.payload_nbytes(shape, x.dtype) == 0
            assert payload.ratio == 1
            for y in (codec.decode(payload), codec.roundtrip(x, state)):
                assert y.shape == x.shape and y.dtype == x.dtype
            assert same(content(state), before)


def test_what_is_not_finite_comes_out_so_and_is_counted():
    for i in range(3 * len(SPECS)):  # each codec meets every value and its neighbours other dtypes
        spec, dtype, bad = SPECS[i // 3], DTYPES[i % 4], NONFINITE[i % 3]
        codec = parse_codec(spec)
        good = make((4, 33, 16), "gauss", 0, 5).to(dtype)
        one, two = codec.init_state("s"), codec.init_state("s")
        for state in (one, two):
            codec.roundtrip(good, state)
        x = good.clone()
        x[2, 7, 3] = bad
        original = x.clone()
        counter, other = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        with naming(spec, dtype, bad):
            payload = codec.encode(x.transpose(0, 1), one, nonfinite=counter)
            assert payload.nbytes == codec.payload_nbytes((33, 4, 16), dtype)
            y = codec.decode(payload)
            assert not y[7, 2, 3].isfinite() and same_bits(x, original)
            z = codec.roundtrip(x.transpose(0, 1), two, nonfinite=other)
            assert torch.equal(y.nan_to_num(), z.nan_to_num()) and torch.equal(y.isnan(), z.isnan())
            assert int(counter) == int(other) > 0
            # What comes after it is coded as ever.
            y = codec.roundtrip(good, one, nonfinite=counter.zero_())
            assert y.isfinite().all() and int(counter) == 0
            assert torch.equal(y, codec.roundtrip(good, two))


def test_other_dtypes_are_refused():
    for spec, dtype in product(SPECS, [torch.int64, torch.bool, torch.uint8, torch.complex64]):
        codec = parse_codec(spec)
        for call in (codec.encode, codec.roundtrip):
            message = rf"dtype {dtype}.*float32, bfloat16, float16, float64.*\.float\(\)"
            with naming(spec, dtype), pytest.raises(ValueError, match=message):
                call(torch.zeros(4, 4, dtype=dtype))


def test_the_codec_is_its_own_configuration():
    for spec in SPECS:
        codec = parse_codec(spec)
        with naming(spec):
            assert parse_codec(str(codec)) == codec and str(parse_codec(str(codec))) == str(codec)
            assert hash(parse_codec(spec)) == hash(codec) and parse_codec("uniform:bits=5") != codec
            assert copy.deepcopy(codec) == codec and pickle.loads(pickle.dumps(codec)) == codec
            assert parse_codec(codec) is codec
            for f in dataclasses.fields(codec):
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(codec, f.name, 1)


def test_every_codec_is_among_the_specs():
    assert {spec.split(":")[0] for spec in SPECS} >= set(CODECS)


@pytest.mark.parametrize("spec", SPECS)
def test_snapshots_and_checkpoints_continue_identically(spec):
    codec = parse_codec(spec)
    xs = [make((6, 40), "gauss", i, i).float() for i in range(5)]
    state = codec.init_state("layer.3", seed=11)
    for x in xs[:2]:
        codec.roundtrip(x, state)
    if state is None:
        assert codec.init_state("other") is None
        assert same_bits(codec.roundtrip(xs[2]), codec.roundtrip(xs[2]))
        return
    saved, snapshot = content(state), state.snapshot()
    ys = [codec.roundtrip(x, state) for x in xs[2:]]
    end = content(state)
    assert not same(saved, end), "the state never changed: this test would show nothing"

    assert same(content(snapshot), saved), "the snapshot changed when the state went on"
    state.restore(snapshot)
    assert same(content(state), saved)
    assert all(same_bits(codec.roundtrip(x, state), y) for x, y in zip(xs[2:], ys, strict=True))
    assert same(content(snapshot), saved), "the snapshot changed after it was restored"

    loaded = codec.init_state("layer.3", seed=11)
    loaded.load_state_dict(saved)
    assert all(same_bits(codec.decode(codec.encode(x, loaded)), y) for x, y in zip(xs[2:], ys, strict=True))
    assert same(content(loaded), end)


def test_no_graph_is_recorded():
    x = small_input().requires_grad_()
    for spec in SPECS:
        codec = parse_codec(spec)
        for y in (codec.roundtrip(x, codec.init_state()), codec.decode(codec.encode(x, codec.init_state()))):
            with naming(spec):
                assert not y.requires_grad


def test_autocast_changes_nothing():
    x = small_input()
    for spec in SPECS:
        codec = parse_codec(spec)
        expected = codec.roundtrip(x)
        with naming(spec), torch.autocast("cpu", dtype=torch.bfloat16):
            assert same_bits(codec.roundtrip(x), expected)
            payload = codec.encode(x)
        with naming(spec):
            assert same_bits(codec.decode(payload), expected)


def test_default_dtype_changes_nothing():
    x = small_input()
    expected = [parse_codec(spec).roundtrip(x) for spec in SPECS]
    caches = (gaussian.tables, trellis.tables, hadamard.signs)
    for cached in caches:
        cached.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        for spec, values in zip(SPECS, expected, strict=True):
            with naming(spec):
                assert same_bits(parse_codec(spec).roundtrip(x), values)
    finally:
        torch.set_default_dtype(torch.float32)
        for cached in caches:
            cached.cache_clear()
