"""Reference tables: every row is planned, runs are shared and resumed, and only --force overwrites."""

import json
from pathlib import Path

import pytest
from helpers.records import record

from hf_actcompress.codecs import parse_codec
from hf_actcompress.workloads.results import write_results


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The scripts with results in a folder of the test, and a trainer that only takes notes."""
    import accuracy
    import tables

    data = tmp_path / "data"
    for task in tables.TASKS.values():
        (data / task.folder).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "tables")
    monkeypatch.setattr(accuracy, "RESULTS", tmp_path / "accuracy")
    tables._owners.cache_clear(), tables._accuracy_runs.cache_clear()
    made = []

    def train(script, argv, seed, output=None):
        given = dict(zip(argv[::2], argv[1::2], strict=True))
        codec = given["--codec"]
        if codec in train.fail:
            raise train.fail[codec]
        made.append((script, given, seed))
        task = "cola" if "cola" in given["--dataset"] else "rte" if "rte" in given["--dataset"] else "cifar10"
        model = given.get("--model", "packaged")
        config = None if codec == "none" else {"grad_codec": None, "first": 1, "last": 1, "placement": "cuts"}
        return record(codec, seed, 0.9, None if codec == "none" else 0.8, task, config=config, model=model)

    train.fail = {}
    monkeypatch.setattr(accuracy, "train", train)

    def call(*argv):
        made.clear()
        code = tables.main([*argv, "--data", str(data)])
        return code, list(made)

    call.train, call.folder, call.tables, call.accuracy = train, tmp_path, tables, accuracy
    return call


def test_every_codec_of_every_row_is_one(bench):
    for table in bench.tables.TABLES.values():
        for row in table.rows:
            assert row.codec == "none" or parse_codec(row.codec)
            assert set(row.theirs) <= {"accuracy, %", "MCC", "samples/s"}
    assert len(bench.tables.TABLES) == 6


def test_full_is_the_original(bench):
    runs = bench.tables.plan("vision", "full")
    options = " ".join(runs[0].options)
    for part in ("mobilenetv2_100", "--image_size 224", "epochs 80", "batch_size 256", "--pretrained True"):
        assert part in options
    assert {run.seed for run in runs} == {0, 1, 2}
    assert "roberta-base" in " ".join(bench.tables.plan("text", "full")[0].options)
    assert "batch_size 64" in " ".join(bench.tables.plan("kmeans", "full")[1].options)
    half = next(run for run in bench.tables.plan("sort", "full") if run.row.options)
    assert json.loads(half.options[half.options.index("--schedule") + 1]) == {"40": "sort:bits=12,splits=3"}


def test_a_table_runs_once_and_prints_both_sides(bench, capsys):
    code, made = bench("--table", "sort", "--budget", "smoke")
    assert code == 0 and len(made) == 11 and made[0][1]["--codec"] == "none"
    out = capsys.readouterr().out
    assert "| sort, 8 bits, 2 of them splits | cifar10 | 95.7 | 80.0 | 1 | 10.0 | 2.67 |" in out
    assert bench("--table", "sort", "--budget", "smoke") == (0, [])
    assert bench("--table", "text", "--budget", "smoke", "--summary") == (0, [])
    index = json.loads((bench.folder / "tables" / "sort" / "smoke.json").read_text())
    assert all((bench.folder / "tables" / "sort" / file).is_file() for row in index["rows"] for file in row["runs"])


def test_equal_runs_are_made_once(bench):
    bench("--table", "vision", "--budget", "smoke")
    code, made = bench("--table", "scratch", "--budget", "smoke")
    assert code == 0 and len(made) == 0  # smoke has no weights: from scratch and fine-tuned are one
    code, made = bench("--table", "text", "--budget", "cpu")
    assert code == 0 and len(made) == 12
    _, made = bench("--table", "sort", "--budget", "cpu")
    assert [given["--codec"] for _, given, _ in made if "rte" in given["--dataset"]] == [
        f"sort:bits={b},splits={s}" for b, s in ((4, 2), (8, 2), (12, 3), (16, 4))
    ]  # without compression RTE has been run for the text table


def test_runs_of_the_accuracy_benchmark_are_used_with_all_their_seeds(bench):
    for codec in ("none", "topk:ratio=0.5"):
        for seed in (0, 1):
            values = record(codec, seed, 0.9, None if codec == "none" else 0.7, "cola", model="packaged")
            write_results(bench.folder / "new", values)
            path = bench.folder / "accuracy" / "cola" / f"{codec}{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            (bench.folder / "new" / "results.json").rename(path)
    _, made = bench("--table", "text")
    assert len(made) == 10
    rows = json.loads((bench.folder / "tables" / "text" / "cpu.json").read_text())["rows"]
    assert rows[1]["runs"] == ["../../accuracy/cola/topk:ratio=0.50.json", "../../accuracy/cola/topk:ratio=0.51.json"]
    before = path.read_text()
    _, made = bench("--table", "text", "--force", "--only", "topk:ratio=0.5")
    assert [Path(given["--dataset"]).name for _, given, _ in made] == ["rte"] and path.read_text() == before


def test_after_an_interruption_the_rest_is_run(bench, capsys):
    bench.train.fail["uniform:bits=10"] = KeyboardInterrupt()
    code, made = bench("--table", "vision")
    assert code == 130 and len(made) == 4 and "goes on" in capsys.readouterr().err
    bench.train.fail.clear()
    code, made = bench("--table", "vision")
    assert code == 0 and len(made) == 5


def test_a_failure_does_not_stop_the_others(bench, capsys):
    bench.train.fail["uniform:bits=10"] = RuntimeError("out of memory")
    code, made = bench("--table", "vision")
    assert code == 1 and len(made) == 8
    out, err = capsys.readouterr()
    assert "uniform, 10 bits: RuntimeError: out of memory" in err and "| uniform, 10 bits | 68 | - |" in out


def test_only_force_overwrites(bench):
    bench("--table", "vision", "--only", "none")
    path = next((bench.folder / "tables" / "vision" / "cpu").glob("*.json"))
    path.write_text(path.read_text().replace("0.9", "0.1"))
    assert bench("--table", "vision", "--only", "none") == (0, []) and "0.1" in path.read_text()
    assert len(bench("--table", "vision", "--only", "none", "--force")[1]) == 1 and "0.1" not in path.read_text()


def test_a_cut_off_result_is_named(bench, capsys):
    bench("--table", "vision", "--only", "none")
    path = next((bench.folder / "tables" / "vision" / "cpu").glob("*.json"))
    path.write_text(path.read_text()[:20])
    code, made = bench("--table", "vision", "--only", "none")
    assert code == 1 and made == [] or code == 2
    assert str(path) in capsys.readouterr().err
    assert bench("--table", "vision", "--only", "none", "--force")[0] == 0


def test_bad_input(bench, capsys):
    code, _ = bench("--table", "text", "--throughput")
    assert code == 2 and "compares no speed; those that do: svd, kmeans" in capsys.readouterr().err
    (bench.folder / "data" / "glue" / "rte").rmdir()
    code, _ = bench("--table", "text")
    assert code == 1 and "give the folder that holds glue/rte with --data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench("--table", "nonsense")


@pytest.mark.parametrize("budget", ["smoke", "cpu", "full"])
def test_recipes_know_the_options_of_every_budget(bench, budget, tmp_path):
    """No run is started: the recipes' own parsers read what they would be given."""
    from transformers import TrainingArguments

    from hf_actcompress.workloads.run import parse_arguments

    for table in ("vision", "text", "sort", "kmeans", "scratch"):
        run = bench.tables.plan(table, budget)[-1]
        script = bench.tables.TASKS[run.row.task].recipe
        recipe = bench.accuracy.recipe(script)
        argv = [*run.options, "--output_dir", str(tmp_path), "--save_strategy", "epoch", "--save_total_limit", "1"]
        types = [recipe.ModelArguments, recipe.DataArguments, TrainingArguments]
        *_, training, compression = parse_arguments(types, argv, recipe.DEFAULTS)
        config = compression.to_config()
        assert (config is None) == (run.row.codec == "none")
        if budget == "full" and script == "cifar":
            assert training.per_device_train_batch_size in (64, 256) and training.num_train_epochs in (10, 80)
