"""What sites ask of codecs: traits, and their forms for gradients, evaluation, saved tensors and other bits."""

import pytest
import torch
from helpers.specs import SPECS

from hf_actcompress.codecs import parse_codec


@pytest.mark.parametrize("spec", [*SPECS, "delta+block:bits=4", "delta+uniform:bits=4,round=stochastic"])
def test_traits_are_what_the_codec_does(spec):
    codec = parse_codec(spec)
    traits, state = codec.traits, codec.init_state("a", 0)
    assert traits.stateful == (state is not None)
    assert traits.stochastic == ("stochastic" in spec) and traits.per_sample == spec.startswith("delta")
    assert traits.keeps_tensors == spec.startswith("ef+")
    bits = spec.replace("|", "+").split("bits=")
    assert traits.bits == (int(bits[-1].split(",")[0]) if len(bits) > 1 else traits.bits)
    assert traits.sites == {"boundary", "saved", "wire", "weights"} - set(traits.unfit)


def test_where_a_codec_does_not_fit_says_why():
    assert "Use 'topk:ratio=0.1'" in parse_codec("ef+topk:ratio=0.1").traits.unfit["saved"]
    assert set(parse_codec("delta+block").traits.unfit) == {"saved", "weights"}
    assert not parse_codec("block").traits.unfit


def test_other_bits():
    for spec in ("block:bits=4,group=64", "rotated:bits=4", "topk:ratio=0.1|uniform:bits=4", "ef+sort:bits=4,splits=1",
                 "delta+block:bits=4"):  # fmt: skip
        assert str(parse_codec(spec).with_bits(3)) == spec.replace("bits=4", "bits=3")
    for spec in ("topk:ratio=0.1", "float8", "ef+lowrank"):
        with pytest.raises(ValueError, match="has no option bits"):
            parse_codec(spec).with_bits(3)


def test_the_codec_of_the_gradients():
    assert str(parse_codec("delta+block:bits=2").for_gradients()) == "block:bits=2"
    assert parse_codec("ef+topk").for_gradients() == parse_codec("ef+topk")


@pytest.mark.parametrize("spec", ["ef+topk:ratio=0.1", "topk:ratio=0.3|ef+uniform:bits=2", "kmeans:bits=2",
                                  "block:bits=2,round=stochastic"])  # fmt: skip
def test_evaluation_leaves_training_as_it_was(spec):
    codec, x = parse_codec(spec), torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    state, other = codec.init_state("a", 0), codec.init_state("a", 0)
    codec.roundtrip(x, state), codec.roundtrip(x, other)
    evaluated, own = codec.for_evaluation(state)
    y = evaluated.roundtrip(3 * x, own)
    assert torch.equal(codec.roundtrip(x, state), codec.roundtrip(x, other)), "the state went on"
    assert "ef+" not in str(evaluated)
    if "ef+" in spec:  # the error of a training batch is none of evaluation's data
        assert torch.equal(y, parse_codec(spec.replace("ef+", "")).roundtrip(3 * x))
