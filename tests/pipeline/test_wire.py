"""Payloads as bytes: every codec comes back bit for bit, and what is wrong is named."""

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.pipeline.frames import HEADER, WireError, framed, seal, unseal
from hf_actcompress.pipeline.wire import WireFormat

SPECS = [
    "identity", "uniform:bits=4", "block:bits=3", "block:bits=4,round=stochastic", "rotated:bits=2", "trellis:bits=2",
    "sort:bits=8", "kmeans:bits=4", "topk:ratio=0.1", "topk:ratio=0.01", "lowrank:rank=4", "float8",
    "topk:ratio=0.1|uniform:bits=8", "lowrank:rank=4|block:bits=4", "ef+block:bits=2",
]  # fmt: skip


def tensor(shape=(4, 16, 96), dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_sent_is_what_is_decoded(spec, dtype):
    codec = parse_codec(spec)
    wire = WireFormat(codec, (4, 16, 96), dtype)
    states, buffer = [codec.init_state("here"), codec.init_state("here")], wire.buffer()
    assert wire.nbytes == HEADER + codec.payload_nbytes((4, 16, 96), dtype)
    for number in range(3):  # a buffer is used again
        x = tensor(dtype=dtype, seed=number)
        wire.encode(x, states[0], buffer, number)
        arrived = buffer.clone()
        expected = codec.encode(x, states[1])
        assert torch.equal(wire.decode(arrived, number), codec.decode(expected))


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 8, 8), (2, 0)])
def test_other_shapes(shape):
    codec = parse_codec("block:bits=4")
    wire, x = WireFormat(codec, shape, torch.float32), tensor(shape)
    wire.encode(x, None, buffer := wire.buffer())
    assert torch.equal(wire.decode(buffer), codec.roundtrip(x))


def test_tensors_are_views_of_the_buffer():
    wire = WireFormat(parse_codec("topk:ratio=0.1"), (64, 96), torch.float32)
    wire.encode(tensor((64, 96)), None, buffer := wire.buffer())
    for part in wire.read(buffer).tensors.values():
        assert part.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def sent(spec="block:bits=4", x=None, number=3, **options):
    x = tensor() if x is None else x
    wire = WireFormat(parse_codec(spec), tuple(x.shape), x.dtype, **options)
    wire.encode(x, None, buffer := wire.buffer(), number)
    return wire, buffer


@pytest.mark.parametrize("place", [HEADER, HEADER + 1000, -1])
def test_damage_is_seen(place):
    wire, buffer = sent()
    buffer[place] ^= 4
    with pytest.raises(WireError, match=r"stage 1 from 0: the payload was damaged"):
        wire.read(buffer, 3, "stage 1 from 0")
    wire, buffer = sent(checksum=False)
    buffer[place] ^= 4
    wire.read(buffer, 3)


def test_any_flipped_byte_is_found():
    """200 of them, in messages with a header, and in those of side inputs."""
    generator = torch.Generator().manual_seed(0)
    wire, buffer = sent()
    plain = framed(b"side inputs of a batch" * 8, 4096)
    seal(plain, 7)
    for trial in range(200):
        message = (plain if trial % 4 == 0 else buffer).clone()
        place = int(torch.randint(HEADER if trial % 2 else message.numel(), (1,), generator=generator))
        message[place] ^= int(torch.randint(1, 256, (1,), generator=generator))
        with pytest.raises(WireError):
            if trial % 4 == 0:
                unseal(message, 7)
            else:
                wire.read(message, 3)
    wire.read(buffer, 3)
    unseal(plain, 7)


def test_other_peers_are_named():
    wire, buffer = sent()
    for other in (WireFormat(parse_codec("block:bits=3"), wire.shape, wire.dtype),
                  WireFormat(wire.codec, (4, 16, 97), wire.dtype),
                  WireFormat(wire.codec, wire.shape, torch.bfloat16)):  # fmt: skip
        with pytest.raises(WireError, match="another codec, shape or dtype.*Give both sides the same"):
            other.read(torch.cat([buffer, buffer])[: other.nbytes], 3)
    with pytest.raises(WireError, match="message 3 arrived instead of 4"):
        wire.read(buffer, 4)
    with pytest.raises(WireError, match="does not begin as a payload does"):
        wire.read(torch.zeros_like(buffer), 3)
    buffer[4] = 9
    with pytest.raises(WireError, match="version 9 of the format, this side 2"):
        wire.read(buffer, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_cannot_be_coded_stop_the_receiver(value):
    x = tensor()
    x[1, 2, 3] = value
    wire = WireFormat(parse_codec("block:bits=4"), tuple(x.shape), x.dtype)
    assert wire.encode(x, None, buffer := wire.buffer(), 3, refuse=True) is False
    with pytest.raises(WireError, match="on the sender's side the tensor holds NaN, Inf"):
        wire.read(buffer, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spec", SPECS)
def test_other_values_cross_as_nan(spec, value):
    """As they would uncompressed, for a gradient scaler to find."""
    x = tensor()
    x[1, 2, 3] = value
    wire, buffer = sent(spec, x)
    y = wire.decode(buffer, 3)
    assert not torch.isfinite(y).all()
    if "block" in spec and "|" not in spec:  # the codec's scales are those of groups
        assert torch.isfinite(y[0]).all()
    wire, buffer = sent("identity", x)
    assert torch.equal(wire.decode(buffer, 3).nan_to_num(nan=7), x.nan_to_num(nan=7))


def test_another_shape_is_refused_by_the_sender():
    wire, buffer = sent()
    with pytest.raises(ValueError, match="set up for .*pad the last batch, or drop it"):
        wire.encode(tensor((3, 16, 96)), None, buffer)
    with pytest.raises(ValueError, match="belongs to another codec or shape"):
        wire.write(parse_codec("block:bits=2").encode(tensor()), buffer)
