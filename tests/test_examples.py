"""The example scripts as users run them: from a shell, from JSON, on two processes; their results are complete."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import ROOT, run, torchrun

GLUE, CIFAR = ROOT / "examples/glue/run_glue.py", ROOT / "examples/cifar/run_cifar.py"
SHARED = ROOT.parent / "shared" / "data"
SHORT = {
    "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "max_train_samples": 16,
    "max_eval_samples": 16, "logging_steps": 1, "disable_tqdm": True,
}  # fmt: skip
TEXT = {**SHORT, "model": "tiny-bert", "max_length": 16}
IMAGES = {**SHORT, "model": "resnet10t", "image_size": 32}
COLUMNS = {"boundary", "direction", "codec", "ratio", "rel_error", "cosine", "bytes_saved"}


@pytest.fixture(scope="module", autouse=True)
def needs():
    for library in ("datasets", "sklearn", "timm"):
        pytest.importorskip(library)


@pytest.fixture
def options(tmp_path):
    """The values as options of a command line, with the folder for results."""

    def make(values):
        given = {**values, "output_dir": tmp_path / "out"}
        return [part for name, value in given.items() for part in (f"--{name}", str(value))]

    return make


def results(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def check(record, boundaries, metrics=("accuracy",), variants=("compressed",)):
    assert set(metrics) | {"loss"} <= set(record["metrics"])
    for values in record["metrics"].values():
        assert set(values) == set(variants)
        assert all(isinstance(value, float) for value in values.values())
    assert record["samples_per_second"]["training"] > 0
    assert len(record["compression"]) == 2 * boundaries
    for row in record["compression"]:
        assert set(row) >= COLUMNS
        assert row["calls"] >= 2 or row["direction"] == "forward"
        assert row["ratio"] > 1
        assert row["bytes_saved"] > 0
    assert [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert {"torch", "transformers"} <= set(record["environment"])


def test_glue_as_a_plain_script(tmp_path, options):
    output = run(GLUE, *options({**TEXT, "codec": "block:bits=4", "last": 2, "evaluate": "both"})).stdout
    record = results(tmp_path)
    check(record, 3, variants=("plain", "compressed"))
    assert record["codec"] == "block:bits=4"
    assert (tmp_path / "out" / "actcompress_config.json").is_file()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for shown in ("Metrics", "Samples per second", "Compression", "bert.encoder.layer.0", "Results: "):
        assert shown in output


AS_MAIN = """
import json, os, pathlib, runpy, sys
import torch.distributed as dist

def threads():
    return sum("gloo" in path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm"))

seen, leave = [], dist.destroy_process_group
dist.destroy_process_group = lambda *args: (seen.append(threads() > 0), leave(*args))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
found = {"left": len(seen), "threads before": seen[0], "after": threads(), "group": dist.is_initialized()}
(pathlib.Path(__file__).parent / f"rank{os.environ['RANK']}").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """GLUE on two processes, from one JSON file: the folder, and what the processes printed."""
    folder = tmp_path_factory.mktemp("two_processes")
    arguments, script = folder / "arguments.json", folder / "as_main.py"
    values = {**TEXT, "use_cpu": True, "codec": "kmeans:bits=4", "layers": {"encoder.layer.2": "float8"}}
    values["dataset"] = str(folder / "data")  # the embedded sentences take each process some seconds
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        lines = [{"sentence": f"this is {('good', 'bad')[k % 2]} number {k}", "label": k % 2} for k in range(16)]
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments.write_text(json.dumps({**values, "output_dir": str(folder / "out")}))
    script.write_text(AS_MAIN)
    return folder, torchrun(script, GLUE, arguments).stdout


def test_glue_on_two_processes_from_one_json_file(two_processes):
    folder, output = two_processes
    check(results(folder), 3)
    assert output.count("Results: ") == 1  # one process reports


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_scripts_leave_their_process_group(two_processes):
    """Its threads, if they outlive the interpreter, abort it now and then: they end although DDP held the group."""
    folder, _ = two_processes
    left = {"left": 1, "threads before": True, "after": 0, "group": False}
    assert [json.loads((folder / f"rank{rank}").read_text()) for rank in (0, 1)] == [left] * 2


def test_cifar_with_accelerate_launch(tmp_path, options):
    launch = "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no".split()
    values = {**IMAGES, "codec": "uniform:bits=8", "grad_codec": "identity"}
    run(*launch, "--dynamo_backend", "no", CIFAR, *options(values))
    record = results(tmp_path)
    assert {row["codec"] for row in record["compression"]} == {"uniform:bits=8", "identity"}
    assert record["image_size"] == 32
    assert record["metrics"]["accuracy"].keys() == {"compressed"}


# In this process: a script's `main`


def main(script, argv):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.main(argv)


def shared(*parts):
    folder = SHARED.joinpath(*parts)
    if not folder.is_dir():
        pytest.skip("the shared data is not on this machine")
    return folder


def test_cola_reports_matthews_correlation(tmp_path, options):
    main(GLUE, options({**TEXT, "dataset": shared("tiny", "cola"), "evaluate": "off"}))
    check(results(tmp_path), 2, metrics=("matthews_correlation",), variants=("plain",))


def test_without_compression(tmp_path, options):
    main(GLUE, options({**TEXT, "dataset": shared("tiny", "rte"), "codec": "none"}))
    record = results(tmp_path)
    assert (record["codec"], record["config"], record["compression"]) == ("none", None, [])
    assert set(record["metrics"]["accuracy"]) == {"plain"}
    assert not (tmp_path / "out" / "actcompress_config.json").exists()


def test_on_a_cpu_malloc_keeps_what_is_freed(options, monkeypatch):
    calls = []
    monkeypatch.setattr("hf_actcompress.ops.cpu.malloc.keep_freed_memory", lambda: calls.append("kept"))
    main(GLUE, options({**TEXT, "codec": "none", "max_steps": 1, "do_eval": False, "use_cpu": True}))
    assert calls == ["kept"]


def test_evaluation_alone(tmp_path, options):
    main(GLUE, options({**TEXT, "dataset": shared("tiny", "rte"), "do_train": False, "codec": "uniform:bits=1"}))
    record = results(tmp_path)
    assert [row["calls"] for row in record["compression"]] == [2, 0, 2, 0]
    assert "samples_per_second" not in record


def test_cifar_with_another_model_and_local_data(tmp_path, options):
    values = {**IMAGES, "model": "mobilenetv2_100", "dataset": shared("tiny", "cifar10"), "first": 2}
    main(CIFAR, options({**values, "layers": '{"blocks.3.0": "float8"}'}))
    record = results(tmp_path)
    check(record, 4)
    codecs = {row["boundary"].removeprefix("timm_model."): row["codec"] for row in record["compression"]}
    assert list(codecs) == ["conv_stem", "blocks.0.0", "blocks.3.0", "blocks.6.0"]
    assert codecs["blocks.3.0"] == "float8"


def test_a_script_resumes(tmp_path, options):
    values = {**TEXT, "dataset": shared("tiny", "cola"), "codec": "kmeans:bits=2"} | {
        "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    whole = main(GLUE, options(values))
    again = main(GLUE, options({**values, "resume_from_checkpoint": tmp_path / "out" / "checkpoint-1"}))
    assert whole["metrics"] == again["metrics"]
    assert [row["calls"] for row in whole["compression"]] == [row["calls"] for row in again["compression"]]


@pytest.mark.parametrize(("script", "values", "message"), [
    (GLUE, {**TEXT, "dataset": "./no/such"}, r"^'./no/such' is not a local folder \(looked for .*--dataset embedded"),
    (CIFAR, {**IMAGES, "dataset": "./no/such/folder"}, "is not a local folder"),
    (GLUE, {**TEXT, "dataset": "./no/such/folder", "codec": "blok:bits=4"}, "Did you mean 'block'"),
])  # fmt: skip
def test_errors_say_what_to_do(options, script, values, message):
    with pytest.raises(ValueError, match=message):
        main(script, options(values))


# Arguments


@pytest.fixture
def parse():
    from transformers import TrainingArguments

    from hf_actcompress.workloads.run import parse_arguments

    return lambda *argv: parse_arguments([TrainingArguments], list(argv), {"learning_rate": 0.5, "output_dir": "x"})


@pytest.mark.parametrize("form", ["options", "json text", "json file", "yaml file"])
def test_every_form_of_arguments_has_the_scripts_defaults(parse, tmp_path, form):
    values = {"codec": "sort:bits=8", "max_steps": 3}
    argv = [json.dumps(values)]
    if form == "options":
        argv = ["--codec", "sort:bits=8", "--max_steps", "3"]
    elif form != "json text":
        path = tmp_path / f"a.{form.split()[0]}"
        path.write_text(json.dumps(values))  # JSON is YAML
        argv = [str(path)]
    args, compression = parse(*argv)
    assert (args.learning_rate, args.max_steps, args.logging_steps) == (0.5, 3, 20)
    assert args.use_cpu == (not torch.accelerator.is_available())
    assert compression.codec == "sort:bits=8"


@pytest.mark.parametrize(("text", "message"), [
    ('{"codek": "sort"}', "codek"),
    ("[1]", r"holds a list, where a mapping of name to value is needed"),
    ('{"codec": }', r"is not JSON"),
])  # fmt: skip
def test_argument_files_that_cannot_be_used(parse, tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(str(path))


def test_an_argument_file_that_is_not_there(parse, tmp_path):
    with pytest.raises(ValueError, match="There is no argument file at "):
        parse(str(tmp_path / "a.json"))
