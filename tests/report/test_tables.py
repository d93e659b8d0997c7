"""Tables agree with sums done by hand; a bad file is named; a page keeps what is not generated."""

import json
import re
from pathlib import Path

import pytest
from helpers.records import RECORDS, record

from hf_actcompress.report.plots import accuracy_vs_ratio, loss_curves
from hf_actcompress.report.records import load_records
from hf_actcompress.report.tables import (
    BEGIN,
    END,
    Column,
    accuracy_table,
    markdown_table,
    write_results_page,
)
from hf_actcompress.workloads.results import write_results


def test_table_by_hand():
    none, sort, same, block = sorted(accuracy_table(RECORDS), key=lambda r: (r["ratio"], r["compressed"] or 0))
    assert (none["codec"], none["seeds"], none["ratio"]) == ("none", 3, 1.0)
    assert none["compressed"] is None and none["drop"] is None
    assert none["plain"] == pytest.approx(0.92) and none["plain_std"] == pytest.approx(0.02)
    assert (block["codec"], block["grad_codec"], block["seeds"]) == ("block:bits=4", "block:bits=8", 2)
    assert block["compressed"] == pytest.approx(0.89) and block["compressed_std"] == pytest.approx(0.02**0.5 / 10)
    assert block["plain"] == pytest.approx(0.92)
    # Bytes are summed before dividing: 2000 / 750, and not the mean of 4 and 2.
    assert block["ratio"] == pytest.approx(2000 / 750) and block["grad_ratio"] == pytest.approx(2000 / 1500)
    assert block["rel_error"] == pytest.approx(0.15)
    assert block["drop"] == pytest.approx(0.03) and block["drop_stds"] == pytest.approx(1.5)
    assert (same["grad_codec"], same["seeds"], same["compressed_std"]) == ("block:bits=4", 1, None)
    assert sort["ratio"] == pytest.approx(2.0)


def test_rows_are_ordered_and_metrics_fit_the_task():
    rows = accuracy_table([record("sort:bits=8", compressed=0.5, task="cola"), record(task="cola"), *RECORDS])
    assert [row["task"] for row in rows] == ["cola"] * 2 + ["sst2"] * 4
    assert [row["codec"] for row in rows][:4] == ["none", "sort:bits=8", "none", "sort:bits=8"]
    assert rows[0]["metric"] == "matthews_correlation" and rows[2]["metric"] == "accuracy"
    assert rows[1]["drop"] == pytest.approx(0.4) and rows[1]["drop_stds"] is None


def test_missing_pieces_are_dashes():
    only = accuracy_table([record("block:bits=4", plain=None, compressed=0.5, compression=[])])[0]
    assert only["drop"] is None and only["ratio"] is None and only["rel_error"] is None and only["plain"] is None
    assert markdown_table([only]).splitlines()[2].count(" - |") == 6
    nan = accuracy_table([record("block:bits=4", compressed="nan")])[0]
    assert nan["compressed"] != nan["compressed"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (record("block:bits=4", 0, compressed=0.5), "seeds"),
        (record("block:bits=4", 1, compressed=0.5, epochs=3.0), "epochs"),
        (record("block:bits=4", 1, compressed=0.5, model="bert"), "model"),
        (record(seed=4, learning_rate=1e-3), "learning_rate"),
        (record("sort", config={"first": 2, "last": 2, "placement": "cuts"}), "first"),
    ],
)
def test_runs_that_do_not_compare_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        accuracy_table([record("block:bits=4", 0, compressed=0.6), other])


def test_markdown():
    text = markdown_table(accuracy_table(RECORDS))
    lines = text.splitlines()
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1
    assert "| none | none | 3 | - | 0.920 ± 0.020 | - | - | 1.00 | 1.00 | - |" in lines
    assert ("| block:bits=4 | block:bits=8 | 2 | 0.890 ± 0.014 | 0.920 ± 0.014 | 0.030 | 1.5 | 2.67 | 1.33 | 0.150 |"
            in lines)  # fmt: skip
    assert "| block:bits=4 | same | 1 | 0.700 | 0.910 |" in text
    assert lines[1].startswith("| --- | --- | ---: |")
    columns = [Column("A", lambda row: row["a"], None), Column("B", lambda row: str(row["b"] + 1), None)]
    assert markdown_table([{"a": "x|y", "b": 1}], columns) == "| A | B |\n| --- | ---: |\n| x\\|y | 2 |"


def test_load_what_the_recipes_write(tmp_path):
    write_results(tmp_path / "sst2" / "none", record())
    write_results(tmp_path / "demo", {"runs": [record(task="cola"), record(task="rte")]})
    assert [r["task"] for r in load_records(tmp_path)] == ["cola", "rte", "sst2"]


def test_what_lies_beside_a_result_is_left_alone(tmp_path):
    """A recipe's folder holds its model and checkpoints as well."""
    write_results(tmp_path / "glue", record())
    for name in ("config.json", "checkpoint-2/trainer_state.json"):
        (tmp_path / "glue" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "glue" / name).write_text("{}")
    assert len(load_records(tmp_path)) == len(load_records(tmp_path / "glue")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), ('{"task": "sst2", "co', "no whole JSON"), ("[1]", "no result record"),
     ('{"a": 1}', "task, codec"), ('{"runs": [3]}', "no result record"),
     ('{"task": "cola", "codec": "none", "metrics": {"accuracy": {}}}', "no matthews_correlation"),
     ('{"task": "rte", "codec": "sort", "metrics": {"accuracy": {}}, "compression": [{"direction": "forward"}]}',
      "no column raw_bytes, payload_bytes")],
)  # fmt: skip
def test_bad_files_are_named(tmp_path, text, message):
    write_results(tmp_path / "good", record())
    (tmp_path / "bad one.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_records(tmp_path)
    assert str(tmp_path / "bad one.json") in str(error.value)


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(ValueError, match="no JSON"):
        load_records(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        load_records(tmp_path / "nowhere")


def test_page_keeps_the_rest(tmp_path):
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text(f"# Results\n\nbefore\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    figure = tmp_path / "docs" / "figures" / "a.png"
    write_results_page(page, RECORDS, {"A figure": figure})
    first = page.read_text()
    assert first.startswith(f"# Results\n\nbefore\n\n{BEGIN}\n") and first.endswith(f"{END}\n\nafter\n")
    assert "old" not in first and "![A figure](figures/a.png)" in first and "2.67" in first
    write_results_page(page, RECORDS, {"A figure": figure})
    assert page.read_text() == first


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", None])
def test_page_without_markers(tmp_path, text):
    page = tmp_path / "results.md"
    if text is not None:
        page.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(page))) as error:
        write_results_page(page, RECORDS)
    assert BEGIN in str(error.value) and END in str(error.value)
    assert text is None or page.read_text() == text


def test_figures(tmp_path):
    from PIL import Image

    tasks = "cola", "sst2", "rte"
    many = [record(f"{name}:bits={bits}", compressed=0.8, payload=(bits * 30, bits * 30), task=task)
            for task in tasks for name in ("uniform", "sort", "other") for bits in (2, 4, 8)]  # fmt: skip
    by_task = {task: [r for r in many if r["task"] == task] for task in tasks}
    for path in (accuracy_vs_ratio(by_task, tmp_path / "new" / "a.png"), loss_curves(many, tmp_path / "b.png")):
        assert Image.open(path).width == 1600
    for draw, nothing in ((accuracy_vs_ratio, {}), (loss_curves, [])):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw(nothing, tmp_path / "c.png")


def test_labels_do_not_cover_each_other():
    from hf_actcompress.report import plots
    from hf_actcompress.report.style import make_figure

    points = [record(f"{name}:bits=4", compressed=0.80 + 0.001 * i, payload=(125 + i, 125 + i))
              for i, name in enumerate(("uniform", "sort", "kmeans", "block", "topk"))]  # fmt: skip
    figure, (ax,) = make_figure(1, 1, 3.3)
    plots.draw_panel(ax, "sst2", accuracy_table([record(), *points]))
    figure.canvas.draw()
    boxes = [text.get_window_extent().extents for text in ax.texts]
    assert len(boxes) == 6
    for i, a in enumerate(boxes):
        assert all(plots._overlap(a, b) < 1 for b in boxes[i + 1 :])
        assert plots._overlap(a, ax.figure.bbox.extents) == pytest.approx((a[2] - a[0]) * (a[3] - a[1]))


def test_demo_runs_every_codec(tmp_path, monkeypatch, capsys):
    """End to end on a handful of steps: images only, for the sentences take seconds to collect."""
    import importlib.util
    import sys

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = Path(__file__).resolve().parents[2] / "examples" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo", path)
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", demo)
    spec.loader.exec_module(demo)
    records = demo.main(["--quick", "--tasks", "image", "--output", str(tmp_path)])
    assert [r["codec"] for r in records] == [
        "none", "uniform:bits=8", "sort:bits=8,splits=2", "kmeans:bits=4", "block:bits=4", "topk:ratio=0.5",
        "lowrank:rank=8",
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert str(tmp_path / "results.json") in out and "lowrank:rank=8" in out
    loaded = load_records(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["environment"]["torch"]
    table = {row["codec"]: row for row in accuracy_table(loaded)}
    assert table["uniform:bits=8"]["ratio"] == pytest.approx(4, abs=0.01) and len(table) == 7
    assert table["block:bits=4"]["ratio"] > 5 > table["block:bits=4"]["grad_ratio"] > 3
    assert (tmp_path / "accuracy_vs_ratio.png").is_file()


def test_labels_tell_codecs_apart():
    from hf_actcompress.report.style import family, short_label

    rotated = "block:bits=3,rotate=hadamard,levels=gauss,allocate=energy"
    patched, trellis = rotated + ",patch=dct", rotated.replace("gauss", "trellis") + ",patch=dct,prototypes=3"
    told = [(family(spec), short_label(spec)) for spec in ("block:bits=3", rotated, patched, trellis)]
    assert told == [("block", "3 bits"), ("rotated", "3 bits"), ("rotated", "3 bits patched"),
                    ("trellis", "3 bits patched")]  # fmt: skip
    assert family("rotated:bits=3") == "rotated" and family("mine:bits=3") == "other"
