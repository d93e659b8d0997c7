"""The results file appears whole, holds JSON and no machine names; the tables show every row."""

import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hf_actcompress.workloads import environment, print_results, results, write_results

ROW = {
    "boundary": "encoder.layer.0",
    "codec": "block:bits=4,group=128",
    "direction": "forward",
    "ratio": 7.5294,
    "rel_error": 0.0712,
    "cosine": 0.9975,
    "bytes_saved": 3 * 2**20,
}


def test_written_and_read_back(tmp_path):
    record = {"task": "rte", "metrics": {"accuracy": np.float32(0.5), "loss": float("nan")}, "steps": torch.tensor(3)}
    path = write_results(tmp_path / "new" / "run", {**record, "shape": (1, np.int64(2)), "where": Path("x")})
    read = json.loads(path.read_text())
    assert read["metrics"] == {"accuracy": 0.5, "loss": "nan"} and read["steps"] == 3
    assert read["shape"] == [1, 2] and read["where"] == "x"
    assert list(read) == sorted(read) and read["environment"]["torch"] == torch.__version__
    assert os.listdir(path.parent) == ["results.json"]


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_results(tmp_path, {"run": 1})
    with pytest.raises(ValueError, match=r"record.a.b\[1\] is a Tensor.*tolist"):
        write_results(tmp_path, {"a": {"b": [1, torch.zeros(2)]}})

    def broken(*args):
        raise OSError("disk")

    monkeypatch.setattr(results.os, "replace", broken)
    with pytest.raises(OSError, match="disk"):
        write_results(tmp_path, {"run": 2})
    assert json.loads(path.read_text())["run"] == 1 and os.listdir(tmp_path) == ["results.json"]


def test_the_environment_names_no_machine_and_no_folder():
    text = json.dumps(environment())
    assert platform.node() not in text and str(Path.cwd()) not in text and str(Path.home()) not in text
    assert {"torch", "transformers", "cpu_count", "torch_threads", "platform"} <= set(environment())


def printed(record):
    console = Console(record=True, width=160, file=open(os.devnull, "w"))
    print_results(record, console)
    return console.export_text()


def test_tables_show_everything():
    text = printed(
        {
            "task": "rte",
            "metrics": {"accuracy": {"plain": 0.71234, "compressed": 0.7}, "top5_accuracy": 0.9},
            "samples_per_second": {"train": 123.456},
            "compression": [ROW, {**ROW, "direction": "backward", "ratio": None, "note": "extra"}],
        }
    )
    for part in (
        "rte",
        "plain",
        "compressed",
        "0.7123",
        "0.9",
        "123.5",
        "7.529",
        "0.0712",
        "3.0 MiB",
        "backward",
    ):
        assert part in text, part
    assert ROW["codec"] in text


def test_empty_records_print_nothing():
    assert printed({}) == ""
    assert "Compression" not in printed({"metrics": {"accuracy": 1.0}})


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5120.0 GiB")])
def test_bytes(count, text):
    assert results._bytes(count) == text
