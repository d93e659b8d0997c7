import dataclasses

import pytest
import torch

from hf_actcompress.codecs import Chain, Feedback, Identity, KMeans, LowRank, TopK, Uniform, parse_codec


def sample(shape=(20, 30), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_topk_then_uniform_quantizes_the_kept_values():
    x = sample()
    codec = parse_codec("topk:ratio=0.2|uniform:bits=4")
    first = TopK(0.2).encode(x)
    values = Uniform(4).roundtrip(first.tensors["values"])
    expected = TopK(0.2).decode(dataclasses.replace(first, tensors={**first.tensors, "values": values}))
    payload = codec.encode(x)
    assert torch.equal(codec.decode(payload), expected)
    kept = TopK(0.2).roundtrip(x) != 0
    assert torch.equal(expected[kept].sort().values, values.sort().values) and not expected[~kept].any()
    assert payload.nbytes == 75 + 120 // 2 + 8
    assert set(payload.tensors) == {"positions"} and set(payload.parts) == {"values"}


def test_lowrank_then_uniform_quantizes_both_factors():
    x = sample()
    factors = LowRank(3, method="svd").encode(x).tensors
    left, right = Uniform(6).roundtrip(factors["left"]), Uniform(6).roundtrip(factors["right"])
    codec = parse_codec("lowrank:rank=3,method=svd|uniform:bits=6")
    assert torch.equal(codec.roundtrip(x), left @ right.T)
    assert codec.encode(x).nbytes == 64 * 6 // 8 + 8 + 96 * 6 // 8 + 8  # 60 and 90 codes, in eights


def test_identity_then_a_codec_is_that_codec():
    x = sample()
    assert torch.equal(Chain(Identity(), Uniform(3)).roundtrip(x), Uniform(3).roundtrip(x))


def test_three_in_a_row():
    codec = parse_codec("topk:ratio=0.5|topk:ratio=0.5|uniform:bits=8")
    assert codec == Chain(TopK(0.5), Chain(TopK(0.5), Uniform(8)))
    x = sample((40,))
    y = codec.roundtrip(x)
    kept = TopK(0.25).roundtrip(x)
    assert torch.equal(y != 0, kept != 0) and torch.allclose(y, kept, atol=0.02)
    assert codec.encode(x).nbytes == codec.payload_nbytes((40,), torch.float32) == 5 + 3 + 16 + 8


def test_each_part_of_a_chain_has_its_own_state():
    codec = parse_codec("lowrank:rank=2|kmeans:bits=2")
    state = codec.init_state("s")
    x = sample()
    codec.encode(x, state)
    assert set(state.states) == {"first", "left", "right"}
    assert state.states["first"].basis.shape == (30, 2)
    left, right = (state.states[k].centroids for k in ("left", "right"))
    assert left.shape == right.shape == (4,) and not torch.equal(left, right)
    assert Chain(TopK(0.1), Uniform(4)).init_state("s") is None
    noisy = parse_codec("lowrank:rank=2|uniform:bits=4,round=stochastic").init_state("s").states
    assert noisy["left"].site != noisy["right"].site


def test_a_chain_refuses_the_state_of_another():
    state = parse_codec("lowrank:rank=2|kmeans:bits=2").init_state()
    other = parse_codec("topk:ratio=0.1|kmeans:bits=2").init_state()
    with pytest.raises(ValueError, match=r"got the entries \['values'\]; it holds \['first', 'left', 'right'\]"):
        state.load_state_dict(other.state_dict())


@pytest.mark.parametrize("inner", ["topk:ratio=0.1", "uniform:bits=2", "block:bits=1", "topk:ratio=0.2|uniform"])
def test_feedback_is_its_definition(inner):
    codec, plain = parse_codec(f"ef+{inner}"), parse_codec(inner)
    state, error = codec.init_state("s"), torch.zeros(20, 30)
    for step in range(5):
        x = sample(seed=step)
        expected = plain.roundtrip(x + error)
        payload = codec.encode(x, state)
        assert torch.equal(codec.decode(payload), expected)
        assert payload.nbytes == plain.payload_nbytes(x.shape, x.dtype)
        error = x + error - expected
        assert torch.equal(state.error, error)


@pytest.mark.parametrize("inner", ["topk:ratio=0.1", "uniform:bits=1", "block:bits=2,group=8", "lowrank:rank=4"])
def test_with_feedback_the_sum_of_the_outputs_follows_the_sum_of_the_inputs(inner):
    """sum(x) - sum(y) is the error that waits; without feedback what is lost adds up."""
    codec, plain = parse_codec(f"ef+{inner}"), parse_codec(inner)
    state, other = codec.init_state("s"), plain.init_state("s")
    x = sample() + 0.3
    sums = torch.zeros(3, 20, 30, dtype=torch.float64)
    for _ in range(60):
        sums += torch.stack([x, codec.roundtrip(x, state), plain.roundtrip(x, other)]).double()
    lost, lost_plain = sums[0] - sums[1], sums[0] - sums[2]
    assert torch.allclose(lost, state.error.double(), atol=1e-3)
    assert float(lost.norm()) < 0.35 * float(lost_plain.norm())


def test_without_state_there_is_no_feedback():
    x = sample()
    codec = parse_codec("ef+topk:ratio=0.1")
    assert torch.equal(codec.roundtrip(x), TopK(0.1).roundtrip(x))
    assert torch.equal(codec.roundtrip(x), TopK(0.1).roundtrip(x))


def test_another_shape_drops_the_error():
    codec = parse_codec("ef+topk:ratio=0.1")
    state = codec.init_state("s")
    codec.roundtrip(sample((6, 8)), state)
    for shape in ((6, 9), (9, 6), (54,)):
        x = sample(shape)
        assert torch.equal(codec.roundtrip(x, state), TopK(0.1).roundtrip(x))
        assert state.error.shape == x.shape


def test_a_correction_that_overflows_is_left_out():
    codec = parse_codec("ef+topk:ratio=0.5")
    state = codec.init_state("s")
    x = torch.tensor([65504.0, 60000.0, 3.0, 2.0], dtype=torch.float16)
    for _ in range(3):
        payload = codec.encode(x, state)
        assert torch.equal(codec.decode(payload), TopK(0.5).roundtrip(x))
        state.error = torch.full_like(x, 60000.0)


@pytest.mark.parametrize("spec", ["ef+topk:ratio=0.1", "ef+block:bits=4", "ef+lowrank:rank=2"])
def test_what_is_not_finite_leaves_no_error_for_the_next(spec):
    codec = parse_codec(spec)
    state = codec.init_state("s")
    codec.roundtrip(sample(), state)
    bad = sample().index_fill(0, torch.tensor([1]), float("nan"))
    assert codec.roundtrip(bad, state).isnan().any() and state.error.isfinite().all()
    assert codec.roundtrip(sample(), state).isfinite().all()


def test_feedback_keeps_the_state_of_what_it_wraps():
    codec = parse_codec("ef+topk:ratio=0.5|kmeans:bits=2")
    assert codec == Feedback(Chain(TopK(0.5), KMeans(2)))
    state = codec.init_state("s")
    codec.roundtrip(sample(), state)
    saved = state.state_dict()
    assert set(saved) == {"error", "inner"} and set(saved["inner"]) == {"values"}
    loaded = codec.init_state("s")
    loaded.load_state_dict(saved)
    assert torch.equal(codec.roundtrip(sample(seed=1), loaded), codec.roundtrip(sample(seed=1), state))
    for wrong in ({"error": None}, {"seed": 0}, {"error": None, "inner": None}):
        with pytest.raises(ValueError, match="got the entries .*it holds .*start with fresh state"):
            loaded.load_state_dict(wrong)
