"""The benchmark for GPUs, in miniature on a CPU."""

import json

import pytest
import torch


@pytest.fixture
def gpu():
    import gpu

    return gpu


def run(gpu, tmp_path, *options):
    threads = torch.get_num_threads()
    try:
        gpu.main(["--device", "cpu", "--quick", "--results", str(tmp_path / "gpu.json"), *options])
    finally:
        torch.set_num_threads(threads)
    return json.loads((tmp_path / "gpu.json").read_text())


def test_every_part(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "MODELS", {"minilm": gpu.MODELS["minilm 256x128"]})
    options = ["--codecs", "identity", "--sizes", "16K", "--methods", "none", "saved 4", "save_on_cpu"]
    record = run(gpu, tmp_path, *options)
    assert record["cut"] == []
    assert record["codecs"].keys() == {"16K float32 identity", "16K bfloat16 identity"}
    assert record["codecs"]["16K bfloat16 identity"]["clone"]["of_clone"] == 1
    assert record["training"]["minilm 32x128 identity"]["of_none"] > 0
    assert record["training"]["minilm 32x128 none"]["launches"] > 0
    assert record["memory"].keys() == {"minilm none", "minilm saved 4", "minilm save_on_cpu"}
    assert all(row["tokens_per_second"] > 0 for row in record["memory"].values())
    printed = capsys.readouterr().out
    assert all(name in printed for part in ("codecs", "training", "memory") for name in record[part])


def test_a_part_that_takes_too_long_is_cut_and_named(gpu, tmp_path, monkeypatch):
    def endless(args, report):
        report("codecs", "first", {"ms": 1}, "")
        while True:
            torch.ones(4).sum()

    monkeypatch.setitem(gpu.PARTS, "codecs", (endless, 60))
    record = run(gpu, tmp_path, "--parts", "codecs", "--seconds", "0.2")
    assert record["cut"] == ["codecs"] and record["codecs"] == {"first": {"ms": 1}}


def test_what_is_too_large_is_named(gpu, tmp_path, monkeypatch):
    def measured(spec, x, args):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(gpu, "codec_speed", measured)
    record = run(gpu, tmp_path, "--parts", "codecs", "--codecs", "identity")
    assert record["cut"] == ["64K float32 identity", "64K bfloat16 identity"] and "codecs" not in record
