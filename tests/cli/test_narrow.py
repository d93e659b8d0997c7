"""Every table keeps its answer in a narrow terminal: names whole, lines within the width, what is missing is named."""

import json

import pytest
import torch
import transformers
from helpers.records import RECORDS, record, table
from hypothesis import given
from hypothesis import strategies as st

from hf_actcompress.cli import analyze, main
from hf_actcompress.cli.bench import BENCH_CODECS
from hf_actcompress.cli.common import GAP, fit, print_table, wrap
from hf_actcompress.codecs import parse_codec
from hf_actcompress.workloads.results import write_results

WIDTHS = (60, 80, 300)
LONG = "topk:ratio=0.1|uniform:bits=8"


@pytest.fixture
def at(capsys, monkeypatch):
    """Runs a command, or a function that prints, at a width; returns the lines of stdout."""

    def call(width, *argv):
        monkeypatch.setenv("COLUMNS", str(width))
        capsys.readouterr()
        if callable(argv[0]):
            argv[0](*argv[1:])
        else:
            assert main([str(word) for word in argv]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= width
        return lines

    return call


def names_in(lines, names):
    """Whether each name stands in one line, or continues in the next lines of its column."""
    columns = [line.split("  ")[0].strip() for line in lines]
    text = "".join(columns)
    return all(name in columns or name in text for name in names)


@pytest.mark.parametrize("width", WIDTHS)
def test_bench(at, width):
    lines = at(width, "bench", "--shape", "16x32", "--repeats", 1)
    assert names_in(lines, [str(parse_codec(spec)) for spec in BENCH_CODECS])
    assert any(line.startswith("block:bits=4 ") for line in lines)
    head = next(line for line in lines if line.startswith("codec"))
    assert "ratio" in head and "error" in head
    told = "".join(line for line in lines if line.startswith("Left out"))
    assert all((name in head) != (name in told) for name in ("cosine", "encode", "decode", "roundtrip"))


@pytest.mark.parametrize("width", WIDTHS)
def test_inspect(at, tmp_path, width):
    transformers.BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                            intermediate_size=32, max_position_embeddings=40).save_pretrained(tmp_path)  # fmt: skip
    lines = at(width, "inspect", tmp_path, "--seq-len", 8, "--codec", LONG, "block:bits=4")
    text = "\n".join(lines)
    assert "bert.encoder.layer.0" in text and "output of first 1" in text
    assert (LONG if width > 60 else "topk:ratio=0.1|") in text
    ratio = 32 * 8 * 16 * 4 / parse_codec("block:bits=4").payload_nbytes((32, 8, 16), torch.float32)
    assert [line.split()[-1] for line in lines if "block:bits=4" in line] == [f"{ratio:.2f}"] * 2


@pytest.mark.parametrize("width", WIDTHS)
def test_report(at, tmp_path, width):
    diverged = [record(LONG, seed, 0.9, value, payload=(100, 100)) for seed, value in enumerate(("nan", 0.8))]
    write_results(tmp_path / "a", {"runs": [*RECORDS, *diverged]})
    table(tmp_path / "tables" / "sort", throughput=True)
    lines = at(width, "report", tmp_path / "a", "--tables", tmp_path / "tables")
    text = " ".join(" ".join(lines).split())
    assert sum(line.startswith("block:bits=4 ") for line in lines) == 2
    assert "0.920 ± 0.020" in text and "10.00" in text and "92.0 ± 2.8" in text
    assert "diverged" in text and "96.1" in text


def made_up_study(layers=13):
    codecs = ["block:bits=4", LONG]
    rows = [{"direction": direction, "layer": i, "name": f"bert.encoder.layer.{i}", "codec": codec, "ratio": 8.0,
             "raw_bytes": 800, "payload_bytes": 100, "layer_error": None if i == 3 else 0.01 * (i + 1)}
            for direction in ("forward", "backward") for i in range(layers) for codec in codecs]  # fmt: skip
    return {"model": "bert", "class": "Bert", "parameters": 1e6, "batches": 1, "batch_size": 2, "data": "rows",
            "codecs": codecs, "left_out": {}, "map": rows}  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_analyze_goes_on_below(at, width):
    lines = at(width, analyze._print, made_up_study())
    own = [line.split()[4:] for line in lines if line.startswith("block 4 bits")]
    numbers = [number for line in own for number in line]
    once = ["NaN" if i == 3 else f"{0.01 * (i + 1):.2g}" for i in range(13)]
    assert numbers == once * 2  # every layer, in both directions
    assert len(own) == {300: 2, 80: 4, 60: 6}[width]
    assert sum(line.startswith("top-k 10 %, then") for line in lines) == len(own)


@pytest.mark.parametrize("width", WIDTHS)
def test_many_models_beside_each_other(at, width):
    models = [f"model-number-{i}" for i in range(9)]
    rows = [["parameters", *(f"{i}00,000" for i in range(9))], ["top-1 error, %", *(f"{i}.5" for i in range(9))]]
    lines = at(width, lambda: print_table("card", ["", *models], rows, split=True))
    text = "\n".join(lines)
    assert all(model in text for model in models) and "8.5" in text
    assert sum(line.startswith("top-1 error, %") for line in lines) == (1 if width == 300 else 3 if width == 80 else 5)


def test_a_pipe_has_no_width(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table("t", ["name", *map(str, range(60))], [["x" * 200, *("12345678",) * 60]], drop=["3"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) == 200 + 60 * (8 + GAP) and "Left out" not in out


def test_names_are_text_and_not_markup(at):
    lines = at(80, lambda: print_table("[/] :smile:", ["name"], [["[red]x[/]"], ["[/]\x1b[31m"], [":smile:"]]))
    assert lines[0] == "[/] :smile:" and [line.strip() for line in lines[3:6]] == ["[red]x[/]", "[/][31m", ":smile:"]


@given(st.lists(st.text("ab,.|=0", min_size=1, max_size=50), min_size=1, max_size=4), st.integers(30, 120))
def test_names_are_whole_at_every_width(names, width):
    rows = [[name, "12.5", "1" * 9, "-"] for name in names]
    order = ["x", "bytes", "ratio"]
    ((heads, cells),), left_out = fit(["codec", "ratio", "bytes", "x"], rows, width, ["codec"], order)
    assert ["".join(row[0].split("\n")) for row in cells] == names
    assert [name for name in order if name not in heads] == left_out
    wide = sum(max(len(line) for cell in column for line in cell.split("\n"))
               for column in zip(heads, *cells, strict=True))  # fmt: skip
    assert wide + GAP * (len(heads) - 1) <= width


def test_names_are_divided_where_they_may_be():
    assert wrap("block:bits=2,rotate=hadamard", 16) == "block:bits=2,\nrotate=hadamard"
    assert wrap("bert.encoder.layer.10", 14) == "bert.encoder.\nlayer.10"
    assert wrap("topk:ratio=0.1|sort", 15) == "topk:ratio=0.1|\nsort" and wrap("abcdef", 3) == "abcdef"
    assert wrap("abcdef", 3, divide=True) == "abc\ndef"


def test_json_has_what_is_left_out(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["bench", "identity", "--shape", "4x4", "--repeats", "1", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["codecs"][0]) >= {"cosine", "encode", "decode", "roundtrip"}


@pytest.mark.parametrize("width", WIDTHS)
def test_advise(at, tmp_path, width):
    path = tmp_path / "cluster.yaml"
    path.write_text("""
microbatches: 2
stages: [{count: 2, forward: 40ms, activation: [4, 8]}]
links: {bandwidth: 1kbit}
codecs: {none: identity, "a codec with a long name, 8 bits": "uniform:bits=8"}
""")
    lines = at(width, "advise", path, "--timeline")
    text = " ".join(" ".join(lines).split())
    assert any(line.startswith("a codec with") and "take this" in line for line in lines)
    assert "step" in text and "Take a codec with a long name, 8 bits: " in text and "device 0 > device 1" in text
