"""A boundary does what its codecs would do by hand, to the value, the gradient, the strides and the state."""

import copy
import pickle

import pytest
import torch
from helpers import stack
from helpers.boundaries import SPECS, attach, meter, values
from torch import nn

from hf_actcompress.boundary.channel import Channel
from hf_actcompress.codecs import parse_codec


class Give(nn.Module):
    """Returns what it is told to."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


# Value and gradient


@pytest.mark.parametrize("spec", SPECS)
def test_value_and_gradient_are_what_the_codecs_make_of_them(spec):
    codec = parse_codec(spec)
    layer = nn.Identity().train()
    attach(layer, spec, spec, seed=5)
    forward, backward = codec.init_state("the.layer/forward", 5), codec.init_state("the.layer/backward", 5)
    for step in range(3):
        x, g = values(6, 16, seed=step).requires_grad_(), values(6, 16, seed=10 + step)
        y = layer(x)
        y.backward(g)
        assert torch.equal(y, codec.roundtrip(x.detach(), forward))
        assert torch.equal(x.grad, codec.roundtrip(g, backward))
        # Encoding and decoding, as the wire will, comes to the same.
    if forward is None:
        assert torch.equal(y, codec.decode(codec.encode(x)))


def test_directions_have_their_own_codec_and_state():
    layer = nn.Identity().train()
    boundary = attach(layer, "uniform:bits=1", "identity")
    x, g = values(4, 8).requires_grad_(), values(4, 8, seed=1)
    y = layer(x)
    y.backward(g)
    assert y.unique().numel() == 2
    assert torch.equal(x.grad, g)
    boundary.set_codecs(parse_codec("identity"), parse_codec("uniform:bits=1"))
    x.grad = None
    y = layer(x)
    y.backward(g)
    assert torch.equal(y, x)
    assert x.grad.unique().numel() == 2


def test_changing_a_codec_keeps_the_state_of_the_other():
    boundary = attach(nn.Identity(), "kmeans:bits=2", "kmeans:bits=2")
    forward, backward = boundary.forward.state, boundary.backward.state
    boundary.set_codecs(parse_codec("kmeans:bits=2"), parse_codec("kmeans:bits=3"))
    assert boundary.forward.state is forward
    assert boundary.backward.state is not backward


def test_the_input_is_left_alone_and_the_output_is_no_alias():
    layer = nn.Identity()
    attach(layer)
    x = values(4, 8)
    y = layer(x)
    before = x.clone()
    y.add_(1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("spec", SPECS)
def test_strides_are_kept(spec):
    x = values(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    layer = nn.Identity()
    boundary = attach(layer, spec, spec)
    y = layer(x)
    assert y.stride() == x.stride()
    y.backward(values(2, 4, 6, 6, seed=1).to(memory_format=torch.channels_last))
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    assert boundary.forward(values(8, 4).T).stride() == (1, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(dtype):
    x = values(4, 8).to(dtype).requires_grad_()
    layer = nn.Identity()
    boundary = attach(layer, "block:bits=4", "block:bits=4")
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert meter(boundary.forward).raw_bytes == 32 * dtype.itemsize


def test_outputs_that_are_not_one_tensor():
    first, second = values(3, 4).requires_grad_(), values(3, 4, seed=1).requires_grad_()
    layer = Give(lambda x: (torch.arange(3), first, {"kept": second}))
    attach(layer, "uniform:bits=1", "uniform:bits=1")
    out = layer(None)
    assert type(out) is tuple
    assert out[1].unique().numel() == 2
    assert out[2]["kept"] is second


@pytest.mark.parametrize("make", [
    lambda x: None, lambda x: (), lambda x: torch.arange(4), lambda x: (torch.arange(4), "text"), lambda x: {"a": 1},
])  # fmt: skip
def test_a_layer_without_a_float_tensor_is_named(make):
    layer = Give(make)
    attach(layer, "block:bits=4")
    with pytest.raises(ValueError, match=r"the\.layer: the output is a .* without a floating point tensor"):
        layer(None)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty_batches_pass(spec, shape):
    """The last rank of a run may be left without rows."""
    x = torch.empty(shape).requires_grad_()
    layer = nn.Identity()
    boundary = attach(layer, spec, spec)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert meter(boundary.forward).record()["payload_bytes"] == 0


# Copies


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("spec", SPECS)
def test_copies_go_their_own_way_from_the_same_state(duplicate, spec):
    model = stack(width=8).train()
    boundary = attach(model.blocks[0], spec, spec)
    x = values(5, 8)
    torch.manual_seed(0)
    model(x).sum().backward()
    twin = duplicate(model)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(1)
        outputs.append(each(x))
    assert torch.equal(*outputs)
    (other,) = twin.blocks[0]._forward_hooks.values()
    assert other is not boundary
    assert meter(other.forward).calls == meter(boundary.forward).calls == 2
    twin(x)
    assert (meter(other.forward).calls, meter(boundary.forward).calls) == (3, 2)
    assert boundary.forward.state is None or other.forward.state is not boundary.forward.state


@pytest.mark.parametrize(
    "codec", ["identity", "float8", "uniform:bits=4", "uniform:bits=4,round=stochastic", "block:bits=4"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_order_in_memory_changes_no_value(codec, layout):
    """A boundary gives what a wire would, which sends tensors in their logical order."""
    codec, x = parse_codec(codec), torch.randn(4, 24, 6, 5).contiguous(memory_format=layout)
    channel = Channel("here", "forward", codec)
    y = channel(x)
    assert y.stride() == x.stride()
    assert torch.equal(y, codec.roundtrip(x.contiguous(), codec.init_state("here/forward")))
