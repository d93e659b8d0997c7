"""Ours beside theirs: figures as computed by hand, rows without runs stay, bad files are named."""

import json

import pytest
from helpers.records import record, table

from hf_actcompress.report.comparison import comparison_section, comparison_table, find_indices, load_comparison


def test_rows_by_hand(tmp_path):
    comparison = load_comparison(table(tmp_path / "sort", throughput=True))
    none, sort, missing = comparison["rows"]
    assert (none["ours"]["value"], none["ours"]["seeds"]) == (pytest.approx(0.92), 2)
    assert sort["ours"]["value"] == 0.88  # with compression, not without
    assert sort["ours"]["drop"] == pytest.approx(0.04)
    assert sort["ours"]["drop_stds"] == pytest.approx(0.04 / (0.02 * 2**0.5))
    assert sort["speed"]["of_none"] == 0.9 and missing["ours"] is None and missing["speed"] is None
    lines = comparison_table(comparison).splitlines()
    assert "| no compression | 96.1 | 92.0 ± 2.8 | 2 | - | 1.00 | 1.000 (1.000-1.000) |" in lines
    assert "| sort, 8 bits | 95.7 (once) | 88.0 | 1 | 4.0 | 2.67 | 0.900 (0.850-0.950) |" in lines
    assert "| sort, 4 bits | 87.1 | - | - | - | - | - |" in lines
    section = comparison_section(comparison)
    assert "### Sorting" in section and "2 of 3 rows are run." in section and "Theirs: a large model." in section
    assert "Speed: mobilenet, first 1, last 2" in section


def test_drops_are_against_none_of_the_same_settings(tmp_path):
    path = table(tmp_path / "sort")
    other = record("sort:bits=8", 0, 0.5, 0.5, epochs=8.0)
    (tmp_path / "sort" / "cpu" / "sort__seed0.json").write_text(json.dumps(other))
    assert load_comparison(path)["rows"][1]["ours"]["drop"] is None


def test_the_largest_budget_counts(tmp_path):
    table(tmp_path / "a", budget="smoke"), table(tmp_path / "a", budget="cpu"), table(tmp_path / "b", budget="smoke")
    assert [path.relative_to(tmp_path).as_posix() for path in find_indices(tmp_path)] == ["a/cpu.json", "b/smoke.json"]


def test_mixed_models_are_refused(tmp_path):
    path = table(tmp_path / "sort")
    (tmp_path / "sort" / "cpu" / "sort__seed0.json").write_text(json.dumps(record("sort:bits=8", model="bert")))
    with pytest.raises(ValueError, match="several models are mixed .*bert.*minilm"):
        load_comparison(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ('{"table": "so', "no whole JSON"), ('{"table": "sort"}', "no title, budget, theirs, rows")],
)
def test_bad_indices_are_named(tmp_path, text, message):
    path = table(tmp_path / "sort")
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_comparison(path)
    assert str(path) in str(error.value)


def test_a_run_that_is_gone_or_cut_off(tmp_path):
    path = table(tmp_path / "sort")
    run = tmp_path / "sort" / "cpu" / "sort__seed0.json"
    run.write_text(run.read_text()[:50])
    with pytest.raises(ValueError, match="no whole JSON"):
        load_comparison(path)
    run.unlink()
    with pytest.raises(ValueError, match="sort__seed0.json, which is not there"):
        load_comparison(path)


def test_nothing_to_show(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        find_indices(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no table with runs"):
        find_indices(tmp_path)
