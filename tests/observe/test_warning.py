"""The warning: once a run, with the layer and what to do; never where errors are small."""

import logging

import pytest
from helpers.trainers import make_trainer

from hf_actcompress import ActCompressCallback, ActCompressConfig, parse_codec
from hf_actcompress.observe.warning import WARN_ERROR, warning_of

PLACES = [(name, way) for name in ("a", "b") for way in ("forward", "backward")]
CODECS = dict.fromkeys(PLACES, parse_codec("uniform:bits=4"))


def errors(forward, backward=(0.0, 0.0)):
    pairs = (("forward", forward), ("backward", backward))
    return {(name, way): e for way, both in pairs for name, e in zip("ab", both, strict=True)}


def test_the_worst_place_decides_and_is_named():
    assert warning_of(errors((0.1, WARN_ERROR), (0.2, 0.0)), WARN_ERROR, CODECS) is None
    words = warning_of(errors((0.1, 0.4), (0.3, 0.1)), WARN_ERROR, CODECS)
    assert "activations after b have a relative error of 0.40 with uniform:bits=4. Above 0.25" in words
    assert "codec='rotated:bits=4' at the same bits" in words and "auto:ratio=8" in words
    words = warning_of(errors((0.3, 0.0), (1.5, 0.9)), WARN_ERROR, CODECS)
    assert "gradients after a have a relative error of 1.50" in words and "grad_codec='block:bits=8'" in words


@pytest.mark.parametrize(("found", "limit"), [({}, 0.19), (errors((9.0, 9.0)), 0)])
def test_nothing_to_say(found, limit):
    assert warning_of(found, limit, CODECS) is None


@pytest.mark.parametrize(("spec", "remedy"), [
    ("topk:ratio=0.1", "Use codec='rotated:bits=4'"), ("rotated:bits=2", "Use more bits, codec='block:bits=4'"),
    ("ef+trellis:bits=3", "Use more bits, codec='block:bits=6'"), ("kmeans", "Use codec='rotated:bits=4' at the same"),
    ("block:bits=12", "Use codec='rotated:bits=8' at the same"),
])  # fmt: skip
def test_the_remedy_fits_the_codec(spec, remedy):
    words = warning_of(errors((0.9, 0.9)), 0.19, dict.fromkeys(PLACES, parse_codec(spec)))
    assert remedy in words
    parse_codec(words.partition("codec='")[2].partition("'")[0])


@pytest.mark.parametrize(("codec", "options", "count"), [
    ("uniform:bits=1", {}, 1), ("uniform:bits=1", {"warn_error": 0}, 0), ("block:bits=8", {}, 0),
    ("uniform:bits=1", {"meter_every": 0}, 0),
])  # fmt: skip
def test_a_run_is_warned_of_once(tmp_path, caplog, codec, options, count):
    callback = ActCompressCallback(ActCompressConfig(codec, **{"meter_every": 1, **options}))
    with caplog.at_level(logging.WARNING, "hf_actcompress.callback"):
        make_trainer(tmp_path, callback).train()
    assert sum("a run may lose accuracy" in record.message for record in caplog.records) == count
    if count:
        with caplog.at_level(logging.WARNING, "hf_actcompress.callback"):
            make_trainer(tmp_path, callback).train()
        assert sum("a run may lose accuracy" in record.message for record in caplog.records) == 2


@pytest.mark.parametrize("bad", [-0.1, True, "x", float("inf"), float("nan")])
def test_wrong_limits_are_refused(bad):
    with pytest.raises(ValueError, match="warn_error=.*0 never warns"):
        ActCompressConfig(warn_error=bad)
