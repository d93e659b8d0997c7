"""The report card: numbers that are known beforehand, and a command that loads what the package writes."""

import json
import pickle

import pytest
import torch
from helpers.files import Touch
from helpers.small_models import Net, images, inputs
from torch import nn

from hf_actcompress.cli import main
from hf_actcompress.report.card import save_cards
from hf_actcompress.weights import card
from hf_actcompress.weights.card import (
    Candidate,
    evaluate,
    flops,
    latency,
    measure,
    peak_memory,
    rows,
    size,
    tensor_bits,
)
from hf_actcompress.weights.checkpoint import save_compressed
from hf_actcompress.weights.manifest import save_pruned, shape_manifest
from hf_actcompress.weights.structured import prune
from hf_actcompress.workloads import load_image_model


class Fixed(nn.Module):
    """Says what it is told."""

    def __init__(self, logits):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.logits = logits

    def forward(self, pixel_values):
        self.linear(pixel_values)
        return self.logits[: len(pixel_values)]


def test_errors_of_the_first_and_the_first_five():
    logits = torch.eye(8)[[0, 1, 2, 3]] + torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]) / 2
    labels = torch.tensor([0, 0, 7, 3])  # right, second guess, last guess, right
    found = evaluate(Fixed(logits), [{"pixel_values": torch.ones(4, 4), "labels": labels}],
                     lambda y, t: {"n": float(len(t))})  # fmt: skip
    assert found == {"evaluated": 4, "top1_error": 0.5, "top5_error": 0.25, "metrics": {"n": 4.0}}
    with pytest.raises(ValueError, match="no batches"):
        evaluate(Fixed(logits), [])


def test_bits_and_bytes(tmp_path):
    x = torch.ones(1000)
    assert tensor_bits(x) == 32000
    x[torch.arange(1000) % 10 != 0] = 0
    assert tensor_bits(x) == 100 * 32 + 100 * 4  # nine skipped: gaps of 4 bits
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    (tmp_path / "model.safetensors").write_bytes(bytes(123))
    (tmp_path / "optimizer.json").write_bytes(bytes(999))
    with torch.no_grad():
        tied[0].weight.fill_(1.0)[0, 0] = 0
    found = size(Candidate("tied", tied, tmp_path))
    # One value is skipped, which takes a second field of one bit.
    assert found == {"parameters": 16, "nonzeros": 15, "bits": 15 * 32 + 16, "file_bytes": 123}
    assert size(Candidate("tied", tied, bits=7))["bits"] == 7


def test_flops_of_a_linear_layer():
    assert flops(Fixed(torch.zeros(1, 2)), {"pixel_values": torch.zeros(1, 4)}) == 2 * 4 * 2


def test_peak_memory_sees_a_large_intermediate_tensor():
    class Wide(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.n, self.weight = n, nn.Parameter(torch.ones(1))

        def forward(self, pixel_values):
            return torch.ones(self.n).mul(self.weight).sum().view(1, 1)

    x = {"pixel_values": torch.zeros(1, 1)}
    small, large = (peak_memory(Wide(n), x) for n in (1000, 20_000_000))
    if small is None:
        pytest.skip("the system does not show the peak")
    assert 150e6 < large - small < 200e6  # two tensors of 80 MB


def test_rows_are_cut_and_repeated():
    batch = {"pixel_values": torch.arange(3).view(3, 1), "labels": torch.zeros(3)}
    assert rows(batch, 2)["pixel_values"].tolist() == [[0], [1]]
    assert rows(batch, 7)["pixel_values"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert "labels" not in rows(batch, 1)


def test_models_take_turns():
    calls = []

    class Named(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)

    found = latency([Named("a"), Named("b")], {"x": torch.zeros(4, 1)}, repeats=3)
    assert calls == ["a", "b"] * 5  # two to warm up
    assert {"median_ms", "p95_ms", "per_second", "cpu_ms"} == set(found[0])


def test_zeros_without_speed_are_named_and_the_files_say_all(tmp_path):
    torch.manual_seed(0)
    dense, sparse = Net(), Net()
    with torch.no_grad():
        for p in sparse.parameters():
            p[torch.rand_like(p) < 0.5] = 0
    made = [Candidate("dense", dense), Candidate("sparse", sparse)]
    batches = [images(8)]
    cards = measure(made, inputs(batches[0]), batches, batch_sizes=(1, 2), repeats=2)
    assert cards[0]["notes"] == [] and cards[0]["compression"] == 1 and cards[1]["compression"] > 1.4
    row = {**cards[1], "speed_up": {"1": 1.01, "2": 0.99}}
    assert "brings no speed" in card._notes(row, (1, 2))[0]
    assert card._notes({**row, "speed_up": {"1": 1.5, "2": 1.0}}, (1, 2)) == []
    assert cards[0]["energy"].startswith(("measured", "estimated: CPU time x 15 W"))
    paths = save_cards(cards, tmp_path, {"data": "made up"})
    assert json.loads(paths[0].read_text())["models"][1]["name"] == "sparse"
    text = paths[1].read_text()
    assert "| | dense | sparse |" in text and "top-1 error, %" in text and "ms a sample, 2 at once (p95)" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one"):
        measure([], {}, [])


def test_the_command_loads_what_the_package_writes(tmp_path, capsys):
    model, _ = load_image_model("torchvision:squeezenet1_1", 10, 32)
    model.save_pretrained(tmp_path / "dense")
    save_compressed(model, tmp_path / "codebook", {"*": "codebook:k=4"})
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "codebook")
    prune(model, {"pixel_values": torch.zeros(2, 3, 32, 32)}, channels=0.5)
    save_pruned(model, tmp_path / "pruned")
    save_compressed(model, tmp_path / "both", {"*": "codebook:k=4"}, structure=shape_manifest(model))
    model.config.save_pretrained(tmp_path / "both")
    folders = [str(tmp_path / name) for name in ("dense", "codebook", "pruned")] + [f"little={tmp_path / 'both'}"]
    options = ["--max-samples", "8", "--batch-sizes", "1", "--repeats", "1", "--output", str(tmp_path / "card")]
    assert main(["card", *folders, *options]) == 0
    assert "little" in capsys.readouterr().out
    dense, codebook, pruned, both = json.loads((tmp_path / "card" / "card.json").read_text())["models"]
    assert codebook["compression"] > 10 and both["compression"] > codebook["compression"]
    assert pruned["parameters"] == both["parameters"] < 0.5 * dense["parameters"]
    assert pruned["flops"] < 0.5 * dense["flops"]
    assert main(["card", str(tmp_path / "none")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_the_command_reads_no_pickled_weights(tmp_path, capsys):
    pytest.importorskip("timm")
    model, _ = load_image_model("resnet10t", 10, 32)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    assert main(["card", str(tmp_path), "--max-samples", "8"]) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
