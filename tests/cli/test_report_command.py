"""`hf-actcompress report` writes what is asked for, and refuses before it writes."""

import json
import subprocess
import sys

import pytest
from helpers.records import RECORDS, record, table

from hf_actcompress.cli import main
from hf_actcompress.cli.report import TABLES
from hf_actcompress.report.tables import BEGIN, END
from hf_actcompress.workloads.results import write_results


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # a terminal's width: without one tables are Markdown
    for number, item in enumerate(RECORDS):
        write_results(tmp_path / "results" / str(number), item)
    return tmp_path / "results"


def test_tables_on_the_terminal(results, capsys):
    assert main(["report", str(results)]) == 0
    out = capsys.readouterr().out
    assert "### sst2" in out and "| block:bits=4 | block:bits=8 | 2 | 0.890 ± 0.014 |" in out
    assert main(["report", str(results), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["codec"] for row in rows] == ["none", "sort:bits=8", "block:bits=4", "block:bits=4"]


def test_page_figures_and_html(results, tmp_path, capsys):
    page, html = tmp_path / "results.md", tmp_path / "new" / "report.html"
    page.write_text("\n".join((BEGIN, END, *TABLES, "mine")))
    table(tmp_path / "tables" / "sort", throughput=True)
    options = ["--page", page, "--figures", tmp_path / "figures", "--html", html, "--tables", tmp_path / "tables"]
    assert main(["report", str(results), *map(str, options)]) == 0
    text = page.read_text()
    assert "(figures/accuracy_vs_ratio.png)" in text and "### Sorting" in text and text.endswith("mine")
    names = {"accuracy_vs_ratio.png", "loss_curves.png", "accuracy_vs_throughput.png"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names
    assert "Ours beside theirs" in html.read_text() and str(html) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is empty"), ('{"task": "sst2", "codec', "no whole JSON"), ("{}", "no task, codec, metrics"),
     (json.dumps(record("sort:bits=8", 0, 0.9, 0.8, model="bert")), "differ in model (bert, minilm)"),
     (json.dumps(record(seed=9, compression=[{"direction": "forward", "raw_bytes": 1}])), "no column payload_bytes")],
)  # fmt: skip
def test_bad_records_stop_before_anything_is_written(results, tmp_path, capsys, text, message):
    (results / "bad.json").write_text(text)
    page = tmp_path / "page.html"
    assert main(["report", str(results), "--html", str(page)]) == 2
    assert message in capsys.readouterr().err and not page.exists()


def test_folders_that_are_not_there(results, tmp_path, capsys):
    for options in ([str(tmp_path / "no")], [str(results), "--tables", str(tmp_path / "no")]):
        assert main(["report", *options]) == 2 and "no folder" in capsys.readouterr().err


def test_the_command_needs_no_matplotlib_for_a_page(results, tmp_path):
    code = (f"import sys; sys.modules['matplotlib'] = None; from hf_actcompress.cli import main; "
            f"sys.exit(main(['report', {str(results)!r}, '--html', {str(tmp_path / 'page.html')!r}]))")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert (tmp_path / "page.html").stat().st_size > 20_000
