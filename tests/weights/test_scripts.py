"""The scripts for smaller models run on embedded data, and continue where they stopped."""

import importlib.util
import json
import sys

import pytest
from helpers.processes import ROOT


def script(path):
    spec = importlib.util.spec_from_file_location(path.rpartition("/")[2].removesuffix(".py"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def needs():
    for library in ("datasets", "sklearn", "torchvision", "torch_pruning", "torchao"):
        pytest.importorskip(library)


SHORT = ["--max_steps", "2", "--max_train_samples", "32", "--max_eval_samples", "16", "--disable_tqdm", "True",
         "--per_device_train_batch_size", "8"]  # fmt: skip


def test_distillation_with_a_teacher_and_alone(tmp_path, capsys):
    run = script("examples/glue/run_distill.py").main
    options = [*SHORT, "--teacher", "tiny-bert", "--layers", "2", "--max_length", "16", "--hidden", "1",
               "--output_dir", str(tmp_path), "--logging_steps", "1"]  # fmt: skip
    record = run(options)
    assert set(record["metrics"]) == {"teacher", "student"}
    assert record["parameters"]["student"] < record["parameters"]["teacher"]
    assert "distill/hidden" in record["history"][0]
    assert json.loads((tmp_path / "results.json").read_text())["task"] == "docstrings"
    assert set(run([*options, "--alone", "True"])["metrics"]) == {"student"}
    with pytest.raises(ValueError, match="keep 1 to 3"):
        run([*options, "--layers", "9"])


def test_pruning_step_by_step(tmp_path, capsys):
    run = script("examples/cifar/run_prune.py").main
    options = [*SHORT, "--model", "torchvision:squeezenet1_1", "--retrain_epochs", "1", "--bf16", "False",
               "--output_dir", str(tmp_path), "--steps"]  # fmt: skip
    run([*options, "dense"])
    before = (tmp_path / "dense" / "model.safetensors").stat().st_mtime_ns
    run([*options, "dense", "unstructured", "structured", "card"])
    assert (tmp_path / "dense" / "model.safetensors").stat().st_mtime_ns == before
    models = json.loads((tmp_path / "card" / "card.json").read_text())["models"]
    dense, unstructured, structured = models
    assert unstructured["nonzeros"] == pytest.approx(0.8 * dense["nonzeros"], rel=0.01)
    assert structured["file_bytes"] < 0.8 * dense["file_bytes"]
    with pytest.raises(ValueError, match="the steps are dense"):
        run([*options, "nonsense"])
