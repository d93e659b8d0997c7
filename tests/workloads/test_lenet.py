"""LeNet5, digits in memory, Pareto fronts, and the MNIST scripts on a few digits."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import ROOT

from hf_actcompress.workloads.lenet import MEAN, STD, Digits, LeNet5, as_batch
from hf_actcompress.workloads.pareto import pareto, plot, table

MNIST = ROOT / "examples" / "mnist"
TINY = ROOT.parent / "shared" / "data" / "tiny" / "mnist"


def images(count=5):
    return torch.arange(count * 784, dtype=torch.int64).remainder(251).to(torch.uint8).view(count, 28, 28)


def test_the_network_has_431080_parameters():
    model = LeNet5()
    assert sum(p.numel() for p in model.parameters()) == 431_080
    out = model(torch.zeros(2, 1, 28, 28), labels=torch.tensor([0, 1]))
    assert out["logits"].shape == (2, 10) and out["loss"].dim() == 0


def test_digits_by_the_batch_and_by_the_piece():
    digits = Digits(images(), torch.arange(5))
    batch = as_batch(digits.__getitems__([3, 1]))
    assert batch["labels"].tolist() == [3, 1]
    torch.testing.assert_close(batch["pixel_values"][1, 0], (images()[1].float() / 255 - MEAN) / STD)
    assert torch.equal(digits[3]["pixel_values"], batch["pixel_values"][0])


def test_shifts_move_images_by_up_to_so_many_pixels():
    torch.manual_seed(0)
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 14, 14] = 255
    digits = Digits(image.expand(200, 28, 28), torch.zeros(200), shift=2)
    moved = digits.__getitems__(list(range(200)))["pixel_values"][:, 0]
    where = {tuple(divmod(int(m.argmax()), 28)) for m in moved}
    assert where == {(14 + a, 14 + b) for a in range(-2, 3) for b in range(-2, 3)}


def test_labels_and_images_must_be_as_many():
    with pytest.raises(ValueError, match="5 images and 4 labels"):
        Digits(images(), torch.arange(4))


# Fronts

POINTS = [(10.0, 0.5, "a"), (20.0, 0.5, "b"), (5.0, 0.4, "c"), (30.0, 0.9, "d"), (25.0, 1.0, "e")]


def test_pareto():
    assert [name for *_, name in pareto(POINTS)] == ["c", "b", "d"]
    for ratio, error, name in POINTS:
        beaten = any(r >= ratio and e <= error and (r, e) != (ratio, error) for r, e, _ in POINTS)
        assert beaten == (name not in "cbd")


def test_table_and_image(tmp_path):
    assert table(POINTS).splitlines()[2:] == [
        "| c | 0.40 | 5.0 | yes |", "| a | 0.50 | 10.0 |  |", "| b | 0.50 | 20.0 | yes |", "| e | 1.00 | 25.0 |  |",
        "| d | 0.90 | 30.0 | yes |",
    ]  # fmt: skip
    path = plot({"one": POINTS[:2], "two": POINTS[2:]}, tmp_path / "x" / "f.png", dense=0.3, published=POINTS[:1])
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot({}, path)


# Scripts


@pytest.fixture(scope="module")
def script():
    if not TINY.is_dir():
        pytest.skip("the shared data is not on this machine")
    sys.path.insert(0, str(MNIST))
    yield lambda name: load(MNIST / f"{name}.py")
    sys.path.remove(str(MNIST))


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("extra", [[], ["--temperature", "3"]])
def test_run_lc(script, tmp_path, capsys, extra):
    argv = ["--dataset", TINY, "--output_dir", tmp_path, "--epochs", 3, "--reference_epochs", 1, "--every", 1, *extra]
    record = script("run_lc").main([str(a) for a in [*argv, "--scheme", "prune-codebook"]])
    assert record["layers"]["conv1.weight"]["nonzero"] + record["layers"]["conv2.weight"]["nonzero"] == 2505
    assert abs(8 * record["file_bytes"] / record["bits"] - 1) < 0.02
    assert 26 < record["ratio"] < 28 and len(record["errors"]) >= 3
    assert "Compressed model" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["scheme"] == record["scheme"]
    with pytest.raises(ValueError, match="Unknown compression"):
        script("run_lc").main(["--scheme", "nonsense", "--dataset", "/no/such/folder"])


def test_a_search_continues(script, tmp_path):
    pytest.importorskip("optuna")
    search = script("search")
    argv = ["--dataset", TINY, "--output_dir", tmp_path, "--epochs", 1, "--reference_epochs", 1]
    first = search.main([str(a) for a in [*argv, "--trials", 1]])
    both = search.main([str(a) for a in [*argv, "--trials", 2]])
    assert [r["number"] for r in both] == [0, 1] and both[:1] == first
    assert all(r["ratio"] > 1 and 0 <= r["error"] <= 100 for r in both)
    assert len({json.dumps(r["params"]) for r in both}) == 2
    other = search.main([str(a) for a in [*argv, "--trials", 1, "--sampler", "random"]])
    assert len(other) == 1
    assert {path.name for path in tmp_path.glob("trials-*")} == {"trials-tpe.json", "trials-random.json"}
    assert (tmp_path / "front.png").is_file() and "on the front" in (tmp_path / "front.md").read_text()
