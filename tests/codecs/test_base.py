import dataclasses
import zlib

import pytest
import torch
from helpers.specs import SPECS

from hf_actcompress.codecs import Identity, Payload, TopK, parse_codec, raw_nbytes
from hf_actcompress.codecs.base import check_choice, check_int, site_hash
from hf_actcompress.codecs.lowrank import BasisState
from hf_actcompress.codecs.rounding import RoundingState
from hf_actcompress.ops.reductions import strided_sample


def test_nbytes_counts_the_parts_of_parts():
    inner = Payload("c", (4,), torch.float32, {"a": torch.zeros(3, dtype=torch.int16)})
    middle = Payload("b", (4,), torch.float32, {"b": torch.zeros(5, dtype=torch.uint8)}, {"x": inner})
    own = {"c": torch.zeros(2, dtype=torch.float64)}
    outer = Payload("a", (10, 10), torch.float32, own, {"y": middle, "z": inner})
    assert inner.nbytes == 6 and middle.nbytes == 11 and outer.nbytes == 16 + 11 + 6
    assert outer.ratio == 400 / 33
    assert Payload("a", (0,), torch.float32, {}).ratio == 1.0


def test_raw_nbytes():
    assert raw_nbytes((), torch.float64) == 8
    assert raw_nbytes((3, 5), torch.bfloat16) == 30
    assert raw_nbytes((3, 0), torch.float32) == 0


def test_payload_nbytes_takes_any_sequence_and_huge_shapes():
    codec = parse_codec("block:bits=4,equalize=none")
    assert codec.payload_nbytes([3, 128], torch.float32) == codec.payload_nbytes(torch.Size([3, 128]), torch.float32)
    n = 2**33
    assert codec.payload_nbytes((2**13, 2**20), torch.bfloat16) == n // 2 + n // 128 * 4
    # Positions need 64 bits there.
    assert TopK(ratio=0.001).payload_nbytes((n,), torch.bfloat16) == round(n * 0.001) * (2 + 8)


def test_the_str_of_a_float_is_short_where_it_may_be_and_exact_where_it_must():
    assert str(TopK(ratio=0.1)) == "topk:ratio=0.1"
    assert str(TopK(ratio=1)) == "topk:ratio=1"
    third = TopK(ratio=1 / 3)
    assert parse_codec(str(third)) == third


@pytest.mark.parametrize("value", [0, 9, True, 2.0, "3", None])
def test_check_int(value):
    with pytest.raises(ValueError, match=r"c: o=.* is not an integer from 1 to 8\. Do so\.$"):
        check_int("c", "o", value, 1, 8, "Do so.")
    check_int("c", "o", 1, 1, 8)
    check_int("c", "o", 8, 1, 8)


def test_check_choice():
    with pytest.raises(ValueError, match=r"c: o='z' is not known; choose one of: none, x, 16\."):
        check_choice("c", "o", "z", (None, "x", 16))
    check_choice("c", "o", None, (None, "x", 16))


def test_site_hash_is_the_same_in_every_process():
    assert site_hash("layer.0") == zlib.crc32(b"layer.0") == 2420319521


@pytest.mark.parametrize("n", [1, 100, 199, 200, 201, 399, 1000, 100_001])
def test_strided_sample(n):
    flat = torch.arange(n, dtype=torch.float64)
    got = strided_sample(flat, 100)
    assert got.dtype == torch.float32
    if n < 200:
        assert torch.equal(got, flat.float())
        return
    stride = int(got[1] - got[0])
    assert stride % 2 == 1 and torch.equal(got, flat[::stride].float())
    assert 60 <= len(got) <= 134


def test_a_state_refuses_the_entries_of_another():
    state = RoundingState("a", 3)
    state.next_key()
    with pytest.raises(ValueError, match=r"RoundingState got .*'basis', 'seed'\]; it holds .*'step'.*fresh"):
        state.load_state_dict(BasisState("a", 3).state_dict())
    assert state.step == 1
    other = RoundingState()
    other.load_state_dict(state.state_dict())
    assert other.next_key() == state.next_key() and other.step == 2


def test_a_snapshot_stands_still():
    state = RoundingState("a", 3)
    snapshot = state.snapshot()
    first = state.next_key()
    assert snapshot.step == 0
    state.restore(snapshot)
    assert state.next_key() == first


def test_identity_leaves_nothing_shared_with_the_result():
    x = torch.randn(4, 4)
    y = Identity().decode(Identity().encode(x))
    y.zero_()
    assert x.abs().sum() > 0


def test_what_is_no_dense_tensor_of_floats_is_refused():
    codec = parse_codec("block")
    for x in (None, [1.0], torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.int64)):
        for call in (codec.encode, codec.roundtrip):
            with pytest.raises(ValueError, match=r"^block:bits=4 got a .*; codecs compress dense floating"):
                call(x)


def damages(payload):
    """(what, the payload with one thing wrong) for everything that it holds."""

    def but(**changes):
        return dataclasses.replace(payload, **changes)

    for name, t in payload.tensors.items():
        flat = t.reshape(-1)
        yield f"{name} missing", but(tensors={k: v for k, v in payload.tensors.items() if k != name})
        for wrong in (None, t.tolist(), t[None], flat[:-1], flat[:0], t.double(), t.half(), t.bool()):
            if not isinstance(wrong, torch.Tensor) or (wrong.shape, wrong.dtype) != (t.shape, t.dtype):
                yield f"{name} {wrong}", but(tensors={**payload.tensors, name: wrong})
        if len(payload.tensors) > 1:
            yield f"{name} on another device", but(tensors={**payload.tensors, name: t.to("meta")})
    for name, part in payload.parts.items():
        yield f"{name} missing", but(parts={k: v for k, v in payload.parts.items() if k != name})
        yield f"{name} None", but(parts={**payload.parts, name: None})
        for what, wrong in damages(part):
            yield f"{name}: {what}", but(parts={**payload.parts, name: wrong})
    if payload.tensors:
        yield "no tensors", but(tensors={})
    if payload.parts:
        yield "no parts", but(parts={})
    yield "tensors None", but(tensors=None)
    yield "parts None", but(parts=None)
    for shape in (None, list(payload.shape), -1, (-1, 12), (2.0, 12), (True,), (2**40, 2**40)):
        yield f"shape {shape}", but(shape=shape)
    for dtype in (None, "float32", torch.int32):
        yield f"dtype {dtype}", but(dtype=dtype)
    yield "None", None


@pytest.mark.parametrize("spec", [*SPECS, "delta+topk|block"])
def test_a_damaged_payload_is_a_value_error(spec):
    """Payloads come from files, links and hands: whatever is wrong, nothing else is raised, and nothing is decoded."""
    codec = parse_codec(spec)
    payload = codec.encode(torch.randn(600, 12))
    assert codec.decode(payload).shape == (600, 12)
    for what, damaged in damages(payload):
        with pytest.raises(ValueError):
            pytest.fail(f"{what}: decoded {codec.decode(damaged)}")
