"""The advice on data-parallel gradients: bytes, time and the choice."""

import json

import pytest
import torch

from hf_actcompress.cli import main
from hf_actcompress.plan.reduce import predict_reduce, verdict_reduce
from hf_actcompress.plan.simulate import Link, Traffic


def measured(spec, shape, dtype):
    assert dtype == "fp32"
    return Traffic(nbytes=shape[0] / 2, encode=1e-9 * shape[0], decode=2e-9 * shape[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_are_added(processes):
    parameters, link = 8_000_000, Link(12.5e6)
    codecs = {"none": None, "4 bits": "ef+block:bits=4"}
    plain, four = predict_reduce(parameters, processes, link, 0.5, codecs, measured)
    share = 2 * (processes - 1) / processes
    assert plain.nbytes == pytest.approx(share * 4 * parameters) and plain.coding == 0
    assert plain.seconds == pytest.approx(0.5 + plain.nbytes / 12.5e6)
    assert four.nbytes == pytest.approx(share * parameters / 2)
    assert four.coding == pytest.approx(1e-9 * parameters * (1 + 1 / processes) + 4e-9 * parameters)
    assert verdict_reduce([plain, four])[0] == "4 bits"


def test_a_fast_link_needs_no_codec():
    found = predict_reduce(1_000_000, 2, Link(12.5e9), 1.0, {"none": None, "4 bits": "ef+block:bits=4"}, measured)
    assert verdict_reduce(found) == ("none", "Do not compress: the link keeps up with the computation.")


def test_command(capsys):
    options = ["--model", "resnet10t", "--image-size", "32", "--bandwidth", "10mbit", "--compute", "0.1/0.2", "--json"]
    assert main(["advise", "--reduce", *options, "--codec", "ef+block:bits=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["take"] == "ef+block:bits=4" and [c["label"] for c in found["codecs"]] == ["none", "ef+block:bits=4"]
    assert found["codecs"][0]["compute"] == pytest.approx(0.3)
    assert main(["advise", "--reduce", "--model", "resnet10t"]) == 2
    assert "--reduce needs --model and --bandwidth" in capsys.readouterr().err
    assert torch.is_grad_enabled()
