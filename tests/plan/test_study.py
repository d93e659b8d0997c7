"""`hf-actcompress analyze`: real numbers in the table and the JSON, figures, and refusals without a traceback."""

import json

import pytest
import torch
from helpers import batch_of, build

from hf_actcompress import parse_codec
from hf_actcompress.cli import main
from hf_actcompress.plan.study import BINS, histogram, study
from hf_actcompress.report import figures
from hf_actcompress.workloads.batches import training_batches

SPECS = ["block:bits=4", "block:bits=2", "uniform:bits=2"]


@pytest.fixture(scope="module")
def found():
    model = build("bert").train()
    total, calls = [], []
    result = study(
        model, [batch_of("bert", seed) for seed in range(2)], [*SPECS, "lowrank:rank=900"],
        begin=total.append, advance=lambda: calls.append(1),
    )  # fmt: skip
    assert total == [len(calls)]
    return {"model": "bert", "data_name": "rows", **result}


def test_the_map_has_every_codec_at_every_layer_in_both_directions(found):
    keys = [(row["direction"], row["layer"], row["codec"]) for row in found["map"]]
    assert len(keys) == len(set(keys)) == 2 * 4 * 3
    assert all(row["layer_error"] > 0 and row["ratio"] > 7 for row in found["map"])
    assert list(found["left_out"]) == ["lowrank:rank=900,method=power"] or "rank" in str(found["left_out"])
    error = {(r["direction"], r["layer"], r["codec"]): r["layer_error"] for r in found["map"]}
    for direction in ("forward", "backward"):
        for layer in range(4):
            assert error[direction, layer, "block:bits=4"] < error[direction, layer, "block:bits=2"]


def test_growth_starts_with_the_codecs_own_error_and_goes_on(found):
    model, batch = build("bert").train(), batch_of("bert", 0)
    torch.manual_seed(5)
    outputs = []
    hook = model.bert.encoder.layer[0].register_forward_hook(lambda m, a, output: outputs.append(output))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    x = outputs[0]
    y = parse_codec("block:bits=2").roundtrip(x)
    rows = {(r["where"], r["codec"], r["layer"]): r["rel_error"] for r in found["growth"]}
    assert len(rows) == 2 * 3 * 4
    # Dropout draws other numbers here than there, hence about.
    assert rows["first", "block:bits=2", 0] == pytest.approx(float((y - x).norm() / x.norm()), rel=0.25)
    for codec in SPECS:
        assert rows["first", codec, 0] == rows["every", codec, 0]
        assert 0 < rows["first", codec, 3] < rows["every", codec, 3]


def test_histograms_count_every_value_before_and_after():
    x = torch.randn(1000)
    y = x.round()
    found = histogram(x, y)
    assert sum(found["before"]) == sum(found["after"]) == 1000 and len(found["before"]) == BINS
    assert sum(count > 0 for count in found["after"]) == len(y.unique())
    width = (found["high"] - found["low"]) / BINS
    inside = ((x >= found["low"] + 10 * width) & (x < found["low"] + 11 * width)).sum()
    assert abs(found["before"][10] - int(inside)) <= 1
    assert histogram(torch.ones(3), torch.ones(3))["before"][0] == 3
    assert histogram(torch.tensor([float("nan")]), torch.ones(1))["before"] == []


def test_histograms_are_of_the_coarsest_codec_of_each_family_at_three_cuts(found):
    places = {(h["direction"], h["name"], h["codec"]) for h in found["histograms"]}
    assert {codec for _, _, codec in places} == {"block:bits=2", "uniform:bits=2"}
    assert len(places) == len(found["histograms"]) == 2 * 3 * 2


def test_figures_are_drawn_with_every_number(found, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure) or path)
    figures.all_figures(found, tmp_path)
    words = [text.get_text() for ax in drawn[0].axes for text in ax.texts]
    errors = sorted(figures._percent(row["layer_error"]) for row in found["map"])
    assert sorted(words) == errors
    labels = [tick.get_text() for tick in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["block 4 bits", "uniform 2 bits", "block 2 bits"]
    monkeypatch.undo()
    paths = figures.all_figures(found, tmp_path)
    assert [path.name for path in paths] == ["sensitivity.png", "error_bits.png", "error_growth.png", "histograms.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_labels():
    words = {"kmeans:bits=1": "k-means 1 bit", "rotated:bits=2": "rotated 2 bits", "topk:ratio=0.1": "top-k 10 %",
             "topk:ratio=0.1|block:bits=8": "top-k 10 %, then block 8 bits", "lowrank:rank=4": "low rank 4",
             "ef+topk:ratio=0.1": "top-k 10 %, error feedback"}
    assert {spec: figures.label(str(parse_codec(spec))) for spec in words} == words


def test_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    argv = ["analyze", "tiny-bert", "embedded", "--codec", "block:bits=4", "--batches", "1", "--batch-size", "2"]
    assert main([*argv, "--max-length", "16", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "block 4 bits" in out and "Gradients after layer" in out and "0 bert.encoder.layer.0" in out
    record = json.loads((tmp_path / "analysis.json").read_text())
    first = next(r for r in record["map"] if r["direction"] == "forward")
    assert f"{first['layer_error']:.2g}" in out
    assert (record["batches"], record["batch_size"], record["model"]) == (1, 2, "tiny-bert")
    assert main([*argv, "--max-length", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["map"] == record["map"]  # the same numbers every time


@pytest.mark.parametrize(("argv", "message"), [
    (["tiny-bert", "embedded", "--codec", "blok"], "Unknown codec 'blok'"),
    (["tiny-bert", "./nowhere"], "is not a local folder"),
    (["no-such-model", "embedded"], "no timm model"),
    (["tiny-bert", "embedded", "--batches", "9999", "--batch-size", "999"], "Ask for fewer or smaller ones"),
])  # fmt: skip
def test_refusals(capsys, argv, message):
    assert main(["analyze", *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err


def test_task_names_are_found_under_the_data_root(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"sentence": ["a b c", "d e f"] * 8, "label": [0, 1] * 8, "idx": list(range(16))}
    folder = tmp_path / "glue" / "cola"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows).to_parquet(str(folder / f"{split}-0.parquet"))
    model, batches, about = training_batches("tiny-bert", "cola", root=tmp_path, batches=2, batch_size=4)
    assert len(batches) == 2 and batches[0]["labels"].shape == (4,) and about["data"].startswith("local folder cola")
    assert model.training
