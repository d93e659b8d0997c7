"""One of several seeds diverged: tables, plots and the page say so, and nothing falls over."""

import json
import math

import pytest
from helpers.html_page import Checked
from helpers.records import record, table

from hf_actcompress.cli import main
from hf_actcompress.report import accuracy_table, build_page, load_records
from hf_actcompress.report.comparison import comparison_section, load_comparison
from hf_actcompress.report.figures import all_figures
from hf_actcompress.report.plots import accuracy_vs_ratio, chosen_curves, loss_curves, mean_curve
from hf_actcompress.report.tables import markdown_table, summarize_values

NONE = [record(seed=0, plain=0.90), record(seed=1, plain=0.94)]
LOST = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": "inf"}]


def runs(*values, codec="block:bits=4", **more):
    return [record(codec, seed, 0.9, value, **more) for seed, value in enumerate(values)]


def row_of(records, codec="block:bits=4"):
    return next(row for row in accuracy_table(records) if row["codec"] == codec)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", math.nan, math.inf])
def test_the_mean_is_of_the_other_seeds_and_no_drop_is_computed(value):
    row = row_of([*NONE, *runs(0.8, value, 0.6)])
    assert row["compressed"] == pytest.approx(0.7) and row["compressed_std"] == pytest.approx(0.02**0.5)
    assert (row["compressed_diverged"], row["compressed_missing"], row["seeds"]) == (1, 0, 3)
    assert row["drop"] is None and row["drop_stds"] is None
    assert "| 0.700 ± 0.141 (1 of 3 diverged) |" in markdown_table([row])


def test_two_seeds_of_which_one_diverged():
    row = row_of([*NONE, *runs(0.8, "nan")])
    assert row["compressed"] == 0.8 and row["compressed_std"] is None
    assert "| 0.800 (1 of 2 diverged) |" in markdown_table([row])


def test_all_seeds_diverged():
    row = row_of([*NONE, *runs("nan", "inf")])
    assert math.isnan(row["compressed"]) and row["drop"] is None and row["compressed_diverged"] == 2
    assert "| 2 of 2 diverged |" in markdown_table([row])


def test_a_seed_without_a_metric():
    missing = record("block:bits=4", 1, 0.9)
    missing["metrics"]["accuracy"]["compressed"] = None
    row = row_of([*NONE, *runs(0.8), missing])
    assert row["compressed"] == 0.8 and row["compressed_missing"] == 1 and row["drop"] is None
    assert "0.800 (1 of 2 missing)" in markdown_table([row])
    assert row_of([missing])["compressed"] is None and row_of([missing])["compressed_missing"] == 0


def test_without_compression_a_seed_diverged():
    rows = accuracy_table([record(seed=0, plain=0.9), record(seed=1, plain="nan"), *runs(0.8)])
    assert rows[0]["plain"] == 0.9 and rows[0]["plain_diverged"] == 1
    assert rows[1]["drop"] is None and "0.900 (1 of 2 diverged)" in markdown_table(rows)


def test_values():
    assert summarize_values([]) == (None, None, 0, 0) and summarize_values([None, None]) == (None, None, 0, 0)
    assert summarize_values([1, None, "nan", 3]) == (2.0, pytest.approx(2**0.5), 1, 1)
    assert row_of(runs(0.8, compression=[{"direction": "forward", "raw_bytes": 8, "payload_bytes": 4,
                                          "rel_error": error} for error in ("nan", 0.5)]))["rel_error"] == 0.5


def test_empty_metrics_are_dashes():
    row = row_of([{"task": "sst2", "codec": "block:bits=4", "metrics": {}, "seed": 0}])
    assert row["compressed"] is None and row["ratio"] is None and "| - |" in markdown_table([row])


def test_losses_at_a_step_are_of_the_seeds_that_still_have_one():
    group = runs(0.8, 0.7)
    group[1]["history"] = LOST
    steps, losses, note = mean_curve(group)
    assert (steps, losses, note) == ([1, 2, 3], [1.0, 0.5, 1 / 3], " (1 of 2 diverged)")
    group[0]["history"] = LOST
    steps, losses, note = mean_curve(group)
    assert losses[0] == 1.0 and all(map(math.isnan, losses[1:])) and note == " (2 of 2 diverged)"
    assert [codec for codec, _ in chosen_curves(group, accuracy_table(group))] == ["block:bits=4"]


def every_kind():
    """Seeds that diverged with and without compression, in part and altogether, in metrics and losses."""
    half = runs(0.8, "nan", codec="topk:ratio=0.1", payload=(100, 100))
    half[1]["history"] = LOST
    lost = runs("nan", "inf", codec="uniform:bits=2", history=[{"step": 1, "loss": "nan"}], payload=(50, 50))
    return [*NONE, *runs(0.88, 0.9), *half, *lost, *(dict(r, task="rte") for r in lost)]


def test_the_page_says_so():
    page = build_page(every_kind())
    assert "80.0 (1 of 2 diverged)" in page and "2 of 2 diverged" in page
    assert "Not drawn, since every seed diverged: uniform 2 bits." in page
    assert "diverged: seeds whose metric is NaN or infinite" in page and 'class="mark hollow"' in page
    for _, attributes in Checked(page).found:
        json.loads(attributes.get("data-hits", "1"), parse_constant=pytest.fail)  # NaN would stop the page's script
    assert "diverged:" not in build_page([*NONE, *runs(0.8)])


def test_a_codec_that_diverged_is_not_recommended():
    good = runs(0.93, 0.93, codec="sort:bits=8", payload=(500, 500))
    page = build_page([*NONE, *good, *runs(0.99, "nan", codec="topk:ratio=0.1", payload=(100, 100))])
    cards = page.split('class="cards">')[1].split("</div>")[0]
    assert "sort 8 bits" in cards and "top-k" not in cards


def test_plots_are_drawn(tmp_path):
    by_task = {task: [r for r in every_kind() if r["task"] == task] for task in ("sst2", "rte")}
    for path in (accuracy_vs_ratio(by_task, tmp_path / "a.png"), loss_curves(every_kind(), tmp_path / "b.png")):
        assert path.stat().st_size > 10_000


def test_beside_published_figures(tmp_path):
    path = table(tmp_path / "sort", throughput=True)
    run = tmp_path / "sort" / "cpu" / "none__seed1.json"
    run.write_text(json.dumps(record(seed=1, plain="nan")))
    comparison = load_comparison(path)
    none, sort, _ = comparison["rows"]
    assert none["ours"]["value"] == 0.9 and sort["ours"]["drop"] is None
    text = comparison_section(comparison)
    assert "90.0 (1 of 2 diverged)" in text and "no drop is computed" in text
    assert "90.0 (1 of 2 diverged)" in build_page([], [comparison])


@pytest.mark.parametrize("errors", [[None, 0.1], [math.nan, math.inf], [0.0, 0.1]])
def test_figures_of_an_analysis(tmp_path, errors):
    rows = [{"direction": direction, "layer": i, "name": f"l{i}", "codec": "block:bits=4", "ratio": 8.0,
             "layer_error": error} for direction in ("forward", "backward") for i, error in enumerate(errors)]
    growth = [{"codec": "block:bits=4", "where": where, "layer": i, "name": f"l{i}", "rel_error": error}
              for where in ("first", "every") for i, error in enumerate(errors)]  # fmt: skip
    histogram = {"direction": "forward", "codec": "block:bits=4", "name": "l0", "low": 0.0, "high": 1.0,
                 "before": [1, 2], "after": [2, 1]}  # fmt: skip
    found = {"model": "m$x^{$", "data_name": "rows", "codecs": ["block:bits=4"], "map": rows, "growth": growth,
             "histograms": [histogram, {**histogram, "low": None, "before": [], "after": []}]}  # fmt: skip
    assert all(path.stat().st_size > 5_000 for path in all_figures(found, tmp_path))


def test_the_command(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"runs": every_kind()}))
    assert main(["report", str(tmp_path)]) == 0
    assert "0.800 (1 of 2 diverged)" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["rows"]  # NaN is no JSON
    assert [row["compressed"] for row in rows if row["codec"] == "uniform:bits=2"] == [None, None]


@pytest.mark.parametrize(("content", "message"), [
    *((text, "no result record") for text in ("[]", "3", '"text"', "null")),
    ('{"task": 1, "codec": "none", "metrics": {}}', "its task is 1"),
    ('{"task": "rte", "codec": null, "metrics": {}}', "its codec is None"),
    ('{"task": "rte", "codec": "none", "metrics": null}', "its metrics is None"),
    ('{"task": "rte", "codec": "none", "metrics": {"accuracy": 0.5}}', "holds 0.5 as accuracy"),
    ('{"task": "rte", "codec": "none", "metrics": {"accuracy": {"plain": "high"}}}', "holds 'high' as plain accuracy"),
    ('{"task": "rte", "codec": "none", "metrics": {"accuracy": {}}, "config": 3}', "its config is 3"),
    ('{"task": "rte", "codec": "none", "metrics": {"accuracy": {}}, "seed": []}', "its seed is []"),
    ('{"task": "rte", "codec": "none", "metrics": {"accuracy": {}}, "history": [{"loss": 1}]}', "no log line"),
    ('{"task": "rte", "codec": "x", "metrics": {"accuracy": {}}, "compression": [1]}', "holds 1 in the compression"),
    ('{"task": "rte", "codec": "x", "metrics": {"accuracy": {}}, "compression": [{"direction": "forward", "raw_bytes":'
     ' "8", "payload_bytes": 1}]}', "holds what is no number"),
    ("[" * 100_000, "no whole JSON"), (b"\xff\xfe{", "no whole JSON"),
])  # fmt: skip
def test_a_file_that_is_no_record_is_named(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        load_records(tmp_path)
    assert message in str(error.value) and str(error.value).startswith(str(path))
