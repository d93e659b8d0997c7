"""A codec of an installed package works wherever a built-in one does: here one of 38 lines, with state and noise.

tests/helpers/outside_codec/ is what pip would have installed: a module, and the metadata with its entry point.
"""

import json
import sys

import pytest
import torch
from helpers.processes import ROOT, forked
from helpers.trainers import make_trainer, same, weights
from torch import nn

from hf_actcompress import ActCompressCallback, ActCompressConfig, codec_names, compress_model, parse_codec
from hf_actcompress.cli import main
from hf_actcompress.codecs import CODECS
from hf_actcompress.weights import load_compressed, save_compressed

INSTALLED = ROOT / "tests/helpers/outside_codec"
SPEC = "dither:decay=0.8"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.syspath_prepend(INSTALLED)
    yield
    CODECS.pop("dither", None)
    sys.modules.pop("outside_codec", None)


def test_specs_and_configurations(tmp_path):
    assert "dither" in codec_names() and "dither" not in CODECS  # known, and not yet imported
    codec = parse_codec(SPEC)
    assert str(codec) == SPEC and parse_codec(str(codec)) == codec and parse_codec({"name": "dither"}).decay == 0.9
    assert str(parse_codec(f"ef+topk:ratio=0.1|{SPEC}")) == f"ef+topk:ratio=0.1|{SPEC}"
    with pytest.raises(ValueError, match="dither has no option 'decai'.*Did you mean 'decay'"):
        parse_codec("dither:decai=1")
    with pytest.raises(ValueError, match="Unknown codec 'diter'.*Did you mean 'dither'.*register_codec"):
        parse_codec("diter")
    config = ActCompressConfig(codec, saved=SPEC, schedule={1: {"codec": codec}})
    config.save_pretrained(tmp_path)
    assert ActCompressConfig.from_pretrained(tmp_path) == config and config.codec == config.saved == SPEC


def gradient(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("site", ["boundary", "saved"])
def test_in_one_process(site):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh()), torch.randn(256, 128)
    exact = gradient(model, x)
    options = {"codec": SPEC, "blocks": ["0", "2"]} if site == "boundary" else {"first": 0, "last": 0, "saved": SPEC}
    with compress_model(model, ActCompressConfig(**options), example_inputs=x) as handle:
        found = [gradient(model, x) for _ in range(2)]
        rows = handle.stats()
    assert not torch.equal(*found)  # it draws random numbers
    assert all(0 < float((g - exact).norm() / exact.norm()) < 0.1 for g in found)
    assert all(3.9 < row["ratio"] < 4 for row in rows)


def test_on_a_wire_between_two_processes(tmp_path):
    forked(ROOT / "tests/helpers/pipeline_run.py", tmp_path, SPEC, processes=2, path=INSTALLED)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    losses = [loss for rank in ranks for loss in rank[f"linear {SPEC}"]["losses"]]
    assert losses == pytest.approx(ranks[0]["alone"], abs=0.02) and losses != ranks[0]["alone"]
    assert sum(ranks[0][f"linear {SPEC}"]["bytes"]) < 0.5 * sum(ranks[0][f"linear {SPEC}"]["raw"])


def test_in_a_checkpoint_of_weights(tmp_path):
    torch.manual_seed(0)
    net, other = nn.Linear(64, 32), nn.Linear(64, 32)
    save_compressed(net, tmp_path, SPEC)
    load_compressed(tmp_path, other)
    error = float((other.weight - net.weight).detach().norm() / net.weight.detach().norm())
    assert 0 < error < 0.02


def test_a_resumed_run_is_the_unbroken_run(tmp_path):
    def trained(resume=None):
        callback = ActCompressCallback(ActCompressConfig(SPEC, saved=SPEC))
        trainer = make_trainer(tmp_path, callback, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        return weights(trainer)

    assert same(trained(), trained(str(tmp_path / "checkpoint-3")))


def test_on_the_command_line(capsys):
    def command(*argv):
        assert main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    small = ("--batches", "1", "--batch-size", "2", "--max-length", "16")
    bench = command("bench", SPEC, "--shape", "64x32", "--repeats", "1")
    assert bench["codecs"][0]["codec"] == SPEC and bench["codecs"][0]["rel_error"] < 0.1
    inspected = command("inspect", "minilm", "--codec", SPEC, "--batch-size", "2", "--seq-len", "16")
    assert all(codec["codec"] == SPEC and codec["ratio"] > 3.9 for cut in inspected["cuts"] for codec in cut["codecs"])
    found = command("analyze", "tiny-bert", "embedded", "--codec", SPEC, *small)
    assert {row["codec"] for row in found["map"]} == {SPEC}


def test_a_package_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[hf_actcompress.codecs]\nbroken = no_such_module:Broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="codec 'broken' of the installed package broken cannot be imported"):
        parse_codec("broken")
