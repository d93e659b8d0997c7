import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

from hf_actcompress import ActCompressConfig
from hf_actcompress.codecs import (
    CODECS,
    Block,
    Chain,
    Codec,
    Feedback,
    Float8,
    Identity,
    KMeans,
    LowRank,
    Rotated,
    Sort,
    TopK,
    Trellis,
    Uniform,
    codec_names,
    parse_codec,
    register_codec,
)


@pytest.mark.parametrize(
    "spec, codec",
    [
        ("identity", Identity()),
        ("uniform", Uniform(8)),
        ("uniform:bits=3,round=stochastic", Uniform(3, round="stochastic")),
        (" block : bits = 4 , group = 64 ", Block(4, group=64)),
        ("block:dim=channel,group=none", Block(dim="channel")),
        ("block:round=none,equalize=none", Block(equalize="none")),
        ("rotated:bits=3,group=64", Rotated(3, group=64)),
        ("trellis:bits=2", Trellis(2)),
        ("sort:bits=12", Sort(12, splits=3)),
        ("kmeans:bits=2,iters=9", KMeans(2, 9)),
        ("topk:ratio=1e-3", TopK(0.001)),
        ("lowrank:rank=4,method=svd", LowRank(4, "svd")),
        ("float8:format=e5m2", Float8("e5m2")),
        ("topk:ratio=0.1|uniform:bits=8", Chain(TopK(0.1), Uniform(8))),
        ("ef+topk", Feedback(TopK())),
        ("ef+topk | block:bits=4", Feedback(Chain(TopK(), Block(4)))),
        ("topk|ef+block", Chain(TopK(), Feedback(Block()))),
        ({"name": "block", "bits": 4, "group": 64}, Block(4, group=64)),
        ({"name": "block", "bits": "4", "round": "stochastic"}, Block(4, round="stochastic")),
        ({"name": "sort"}, Sort()),
    ],
)
def test_grammar(spec, codec):
    before = dict(spec) if isinstance(spec, dict) else spec
    assert parse_codec(spec) == codec and parse_codec(str(codec)) == codec
    assert spec == before


@pytest.mark.parametrize(
    "codec, text",
    [
        (Identity(), "identity"),
        (Block(), "block:bits=4"),
        (Block(4, group=64), "block:bits=4,group=64"),
        (Trellis(2), "trellis:bits=2"),
        (Sort(8), "sort:bits=8,splits=2"),
        (LowRank(), "lowrank:rank=8"),
        (Float8(), "float8"),
        (Feedback(Chain(TopK(0.1), Uniform(8))), "ef+topk:ratio=0.1|uniform:bits=8"),
    ],
)
def test_canonical_spec(codec, text):
    assert str(codec) == text


def test_names():
    assert codec_names() == list(CODECS) == [cls.name for cls in CODECS.values()]
    known = "block float8 identity kmeans lowrank rotated sort topk trellis uniform"
    assert set(codec_names()) >= set(known.split())


ERRORS = {
    # what is received: [what the message must hold: the value received, what is allowed, what to do]
    "blok:bits=4": ["Unknown codec 'blok'", "Did you mean 'block'?", "block, float8", "a|b, ef+a and delta+a"],
    "zzz": ["Unknown codec 'zzz'", "Codecs: block, float8"],
    "ef+topq": ["Unknown codec 'topq'", "Did you mean 'topk'?"],
    "topk|unifrm": ["Unknown codec 'unifrm'", "Did you mean 'uniform'?"],
    "block:bit=4": ["block has no option 'bit'", "in 'block:bit=4'", "Did you mean 'bits'?", "Options: bits, group"],
    "identity:bits=4": ["identity has no option 'bits'", "Options: none"],
    "uniform:bits=0": ["uniform: bits=0", "from 1 to 16", "use identity"],
    "uniform:bits=17": ["uniform: bits=17", "from 1 to 16"],
    "uniform:bits=4.5": ["uniform: bits='4.5'", "not an integer"],
    "uniform:round=up": ["uniform: round='up'", "nearest, stochastic"],
    "block:bits=0": ["block: bits=0", "from 1 to 16", "use identity"],
    "block:bits=17": ["block: bits=17", "from 1 to 16"],
    "block:group=12": ["block: group=12", "not a multiple of 8"],
    "block:group=0": ["block: group=0", "from 8 to 1048576"],
    "block:dim=row": ["block: dim='row'", "none, channel"],
    "block:group=64,dim=channel": ["group=64", "dim=channel", "exclude each other"],
    "rotated:bits=9": ["rotated: bits=9", "from 1 to 8", "use block"],
    "rotated:group=24": ["rotated: group=24", "power of two", "Use for example group=128"],
    "trellis:prototypes=16": ["trellis: prototypes=16", "from 0 to 15"],
    # version 0.1
    "block:bits=2,rotate=hadamard,levels=gauss,allocate=energy,patch=dct": ["Write 'rotated:bits=2'"],
    "block:bits=2,group=64,levels=trellis,prototypes=1": ["Write 'trellis:bits=2,group=64,prototypes=1'"],
    "rotated:bits=3,patch=none": ["Write 'rotated:bits=3'"],
    "block:levels=gauss": ["Write 'rotated'"],
    "block:bits=2,rotate=hadamard,levels=trellis": ["Write 'trellis:bits=2,prototypes=0'"],
    "block:bits=12,rotate=hadamard": ["'rotated:bits=12' would be it, but rotated: bits=12", "from 1 to 8"],
    "block:rotate=none,levels=uniform": ["block never rotates. Leave rotate and levels out"],
    "block:bits=4,dim=channel,rotate=hadamard": ["Write 'rotated:bits=4'. dim cannot be combined with it"],
    "block:bits=4,clip=0.9": ["the option clip is gone", "Leave it out"],
    "delta:first=block/scale=32+block": ["the option scale is gone"],
    "sort:bits=1": ["sort: bits=1", "from 2 to 16"],
    "sort:bits=4,splits=4": ["splits=4 leaves 0 of bits=4", "Use splits from 1 to 3"],
    "sort:bits=4,splits=0": ["sort: splits=0", "from 1 to 16"],
    "sort:quantiles=some": ["quantiles='some'", "sample, exact"],
    "kmeans:bits=9": ["kmeans: bits=9", "from 1 to 8", "block"],
    "kmeans:iters=0": ["kmeans: iters=0", "from 1 to 1000"],
    "topk:ratio=0": ["topk: ratio=0.0", "outside (0, 1]", "for example ratio=0.1"],
    "topk:ratio=1.1": ["topk: ratio=1.1", "outside (0, 1]"],
    "topk:ratio=-0.1": ["topk: ratio=-0.1", "outside (0, 1]"],
    "topk:ratio=nan": ["topk: ratio=nan", "outside (0, 1]"],
    "topk:ratio=half": ["topk: ratio='half'", "not a number"],
    "lowrank:rank=0": ["lowrank: rank=0", "from 1 to"],
    "lowrank:method=qr": ["method='qr'", "power, svd"],
    "lowrank:iters=0": ["lowrank: iters=0", "from 1 to"],
    "float8:format=e3m4": ["format='e3m4'", "e4m3, e5m2"],
    "block:bits=": ["'bits='", "in the codec spec 'block:bits='", "is not option=value", "block:bits=4"],
    "block:bits": ["'bits'", "is not option=value", "block:bits=4"],
    "block:bits=4,bits=5": ["'block:bits=4,bits=5'", "bits twice"],
    "": ["got ''", "block:bits=4"],
    "  ": ["got '  '", "block:bits=4"],
    "uniform|block": ["uniform leaves only integer codes", "nothing is left for block", "topk, lowrank or identity"],
    "sort|uniform": ["sort leaves only integer codes", "nothing is left for uniform"],
    "topk|uniform|block": ["uniform leaves only integer codes", "nothing is left for block"],
    "block|": ["'block|': a codec is missing", "each side of |", "topk:ratio=0.1|uniform:bits=8"],
    "|block": ["'|block': a codec is missing"],
    "ef+": ["'ef+': a codec is missing", "after ef+, as in ef+block:bits=4"],
    "ef+topk|": ["'topk|': a codec is missing"],
    "delta+": ["'delta+': delta stands before the codec of the changes"],
    "ef": ["There is no codec 'ef'", "write ef+ before a codec, such as ef+block:bits=4"],
    "none": ["There is no codec 'none'", "write identity"],
    "ef+ef+topk": ["error feedback is applied once", "write ef+topk"],
}


@pytest.mark.parametrize("spec", ERRORS)
def test_errors_say_what_was_received_what_is_allowed_and_what_to_do(spec):
    with pytest.raises(ValueError) as caught:
        parse_codec(spec)
    for part in ERRORS[spec]:
        assert re.search(re.escape(part), str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "spec, match",
    [
        ({"bits": 4}, r"needs a 'name'; got \{'bits': 4\}\. Names: block"),
        ({"name": "blck"}, "Unknown codec 'blck'.*Did you mean 'block'"),
        ({"name": "block", "bitz": 4}, "no option 'bitz'.*Did you mean 'bits'"),
        ({"name": "block", "bits": 4.0}, "bits=4.0 is not an integer from 1 to 16"),
        ({"name": "block", "bits": True}, "bits=True is not an integer"),
        ({"name": "topk", "ratio": None}, r"ratio=None is outside \(0, 1\]"),
        (None, "a spec such as 'block:bits=4', a dict or a Codec; got None"),
        (4, "a spec such as 'block:bits=4', a dict or a Codec; got 4"),
    ],
)
def test_bad_dicts_and_other_types(spec, match):
    with pytest.raises(ValueError, match=match):
        parse_codec(spec)


def test_constructors_check_too():
    with pytest.raises(ValueError, match="bits=0 .*1 to 16"):
        Block(bits=0)
    with pytest.raises(ValueError, match="leaves only integer codes"):
        Chain(Uniform(8), Block(4))
    with pytest.raises(ValueError, match="applied once"):
        Feedback(Feedback(TopK()))


@pytest.fixture
def names():
    before = dict(CODECS)
    yield
    CODECS.clear()
    CODECS.update(before)


@dataclass(frozen=True)
class Mine(Identity):
    power: float = 2.0
    leaves: ClassVar[tuple[str, ...]] = ()


def test_a_registered_codec_is_one_like_any_other(names):
    assert register_codec("mine")(Mine) is Mine and "mine" in codec_names()
    assert parse_codec("mine:power=3") == Mine(3.0) and parse_codec(str(Mine(3.0))) == Mine(3.0)
    assert ActCompressConfig(codec=Mine(3.0), saved=Mine()).codec == "mine:power=3"
    register_codec("mine")(Mine)  # a cell of a notebook that is run again


def test_a_class_without_a_name_is_refused_with_the_remedy():
    @dataclass(frozen=True)
    class Own(Mine):
        pass

    for codec in (Own(), Feedback(Own()), Chain(TopK(), Own())):
        for use in (parse_codec, lambda codec: ActCompressConfig(codec=codec)):
            with pytest.raises(ValueError, match=r'class .*Own has no name.*@register_codec\("own"\)'):
                use(codec)


def test_what_cannot_be_registered(names):
    class Plain(Codec):
        pass

    for name, cls, words in (
        ("block", Mine, "the name belongs to hf_actcompress.codecs.block.Block"), ("ef", Mine, "none of auto, chain"),
        ("my codec", Mine, "begins with a letter"), ("plain", Plain, r"Write @dataclass\(frozen=True\)"),
        ("number", int, "derived from hf_actcompress.Codec"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            register_codec(name)(cls)
