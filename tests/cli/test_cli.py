"""The command line tells the truth about layers, cuts and bytes, and refuses without a traceback."""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers
from helpers.records import RECORDS

import hf_actcompress
from hf_actcompress import parse_codec
from hf_actcompress.cli import main
from hf_actcompress.cli.bench import BENCH_CODECS
from hf_actcompress.codecs import codec_names
from hf_actcompress.workloads.results import write_results

SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 40}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertConfig(**SMALL).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def inspect(run, *argv):
    code, out, _ = run("inspect", *argv, "--json")
    assert code == 0
    return json.loads(out)


def test_layers_of_a_folder(run, bert):
    found = inspect(run, bert, "--batch-size", 6, "--seq-len", 20)
    layers = found["layers"]
    assert [layer["name"] for layer in layers] == [f"bert.encoder.layer.{i}" for i in range(4)] + ["classifier"]
    assert [layer["shape"] for layer in layers] == [[6, 20, 16]] * 4 + [[6, 2]]
    assert [layer["kind"] for layer in layers] == ["block"] * 4 + ["head"]
    assert layers[0]["raw_bytes"] == 6 * 20 * 16 * 4
    assert (layers[0]["calls"], layers[0]["output"], layers[0]["dtype"]) == (1, "Tensor", "float32")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {0: ["output of first 1"], 3: ["input of last 1"]}),
        (["--first", 2, "--last", 0], {0: ["output of first 2"], 1: ["output of first 2"]}),
        (["--first", 2, "--last", 2], {0: ["output of first 2"], 1: ["output of first 2"], 2: ["input of last 2"],
                                       3: ["input of last 2"]}),
        (["--first", 2, "--last", 2, "--placement", "cuts"], {1: ["output of first 2"], 2: ["input of last 2"]}),
        (["--first", 3, "--last", 2, "--placement", "cuts"], {2: ["output of first 3", "input of last 2"]}),
        (["--first", 0, "--last", 0], {}),
    ],
)  # fmt: skip
def test_cuts(run, bert, options, expected):
    cuts = inspect(run, bert, "--batch-size", 2, "--seq-len", 8, *options)["cuts"]
    assert {int(cut["layer"].rpartition(".")[2]): cut["cut"] for cut in cuts} == expected


def test_payloads_are_those_of_the_codecs(run, bert):
    specs = ["uniform:bits=8", "block:bits=4", "topk:ratio=0.1", "lowrank:rank=8"]
    cut = inspect(run, bert, "--batch-size", 6, "--seq-len", 20, "--last", 0, "--codec", *specs)["cuts"][0]
    raw = 6 * 20 * 16 * 4
    assert [row["codec"] for row in cut["codecs"]] == specs
    for row in cut["codecs"]:
        nbytes = parse_codec(row["codec"]).payload_nbytes((6, 20, 16), torch.float32)
        assert row["payload_bytes"] == nbytes and row["ratio"] == pytest.approx(raw / nbytes)
    # By hand: a byte per element and two fp32 numbers; factors of 120 x 8 and 16 x 8.
    assert cut["codecs"][0]["payload_bytes"] == 6 * 20 * 16 + 8
    assert cut["codecs"][3]["payload_bytes"] == 4 * 8 * (120 + 16)


def test_tables_show_the_same(run, bert):
    code, out, _ = run("inspect", bert, "--batch-size", 6, "--seq-len", 20, "--codec", "uniform:bits=8")
    assert code == 0
    line = next(line for line in out.splitlines() if "bert.encoder.layer.3" in line)
    assert "6x20x16" in line and "0.008" in line and "input of last 1" in line
    assert "1,928" in out and "3.98" in out


def test_rank_above_the_features_is_a_reason_and_no_crash(run, bert):
    row = inspect(run, bert, "--last", 0, "--seq-len", 8, "--codec", "lowrank:rank=17")["cuts"][0]["codecs"][0]
    assert row["payload_bytes"] is None and "rank=17 is above the 16 features" in row["reason"]
    code, out, err = run("inspect", bert, "--seq-len", 8, "--codec", "lowrank:rank=17", "uniform:bits=8")
    assert code == 0 and "rank=17 is above the 16 features" in err and "3.99" in out


def test_named_layers_have_their_own_codec(run, bert):
    options = ["--last", 0, "--seq-len", 8, "--layers", '{"layer.2": "sort:bits=8"}', "--codec", "block:bits=4"]
    cuts = inspect(run, bert, *options)["cuts"]
    assert [(c["layer"][-1], c["cut"], [r["codec"] for r in c["codecs"]]) for c in cuts] == [
        ("0", ["output of first 1"], ["block:bits=4"]),
        ("2", ["named by --layers"], ["sort:bits=8,splits=2"]),
    ]


def test_timm_and_packaged_models(run):
    found = inspect(run, "resnet18", "--image-size", 64, "--batch-size", 3)
    assert [layer["shape"] for layer in found["layers"]][:2] == [[3, 64, 16, 16]] * 2
    assert len(found["layers"]) == 10 and found["layers"][0]["kind"] == "stem"
    assert found["layers"][-2]["shape"] == [3, 512, 2, 2]
    found = inspect(run, "efficientnet-lite0", "--image-size", 96)
    assert found["layers"][0]["shape"] == [32, 32, 48, 48] and len(found["layers"]) == 18
    # A fixed input size is the model's own affair: 64 pixels in patches of 16, and a class token.
    assert inspect(run, "vit_tiny_patch16_224", "--image-size", 64)["layers"][0]["shape"] == [32, 17, 192]


def test_forward_that_looks_at_values(run, tmp_path):
    """BART's classifier counts end tokens, which meta tensors do not allow: shapes are grown from small batches."""
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 99}
    transformers.BartConfig(**sizes).save_pretrained(tmp_path)
    found = inspect(run, tmp_path, "--batch-size", 7, "--seq-len", 12, "--stack", "decoder")
    assert {tuple(layer["shape"]) for layer in found["layers"] if layer["kind"] == "block"} == {(7, 12, 16)}
    assert [cut["layer"] for cut in found["cuts"]] == ["model.decoder.layers.0", "model.decoder.layers.1"]


def test_a_shared_block_is_noted(run, tmp_path):
    config = transformers.AlbertConfig(**SMALL, embedding_size=8)
    config.save_pretrained(tmp_path)
    code, out, err = run("inspect", tmp_path, "--seq-len", 8, "--json")
    assert json.loads(out)["layers"][0]["calls"] == 4 and "runs 4 times" in json.loads(out)["notes"][0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "BERT", "--seq-len", 8, "--first", 5], "--first 5 is out of range"),
        (["inspect", "BERT", "--seq-len", 41], "No forward pass"),
        (["inspect", "BERT", "--codec", "blok"], "Did you mean 'block'"),
        (["inspect", "BERT", "--layers", "{"], "--layers '{' is not a mapping of glob to codec"),
        (["inspect", "BERT", "--seq-len", 8, "--layers", '{"foo": "block"}'], "--layers['foo'] matches no layer"),
        (["inspect", "BERT", "--layers", '{"x": "block:bits=99"}'], "--layers['x']: block: bits=99"),
        (["inspect", "mobilenetv2_10"], "mobilenetv2_100"),
        (["inspect", "/nowhere/at/all"], "no folder"),
        (["inspect", "WHISPER"], "no text or image classifier"),
        (["bench", "topk:ratio=2"], "topk"),
        (["bench", "--device", "nodevice"], "nodevice"),
    ],
)
def test_errors_are_one_message_and_code_2(run, bert, tmp_path, argv, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    transformers.WhisperConfig().save_pretrained(tmp_path)
    code, out, err = run(*[{"BERT": bert, "WHISPER": tmp_path}.get(word, word) for word in argv])
    assert code == 2 and not out and message in err and err.startswith(f"hf-actcompress {argv[0]}: ")


def test_model_without_layers(run, monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", lambda *a, **k: torch.nn.Linear(4, 4))
    code, out, err = run("inspect", "resnet18")
    assert code == 2 and "no layers in Linear" in err and not out


def test_bench_numbers(run):
    code, out, err = run("bench", "uniform:bits=8", "lowrank:rank=99", "--shape", "32x16", "--repeats", 3, "--json")
    found = json.loads(out)
    first, second = found["codecs"]
    assert code == 0 and found["shape"] == [32, 16]
    assert first["payload_bytes"] == 32 * 16 + 8 and first["ratio"] == pytest.approx(4 * 512 / 520)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    y = parse_codec("uniform:bits=8").roundtrip(x)
    assert first["rel_error"] == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-5)
    for name in ("encode", "decode", "roundtrip"):
        assert 0 < first[name]["clones_p10"] <= first[name]["clones"] <= first[name]["clones_p90"] < math.inf
    assert "rank=99" in second["reason"] and "ratio" not in second


def test_bench_covers_every_codec(run):
    code, out, _ = run("bench", "--shape", "16x32", "--repeats", 1, "--dtype", "bf16", "--distribution", "heavy")
    assert code == 0 and all(str(parse_codec(spec)) in out for spec in BENCH_CODECS)
    assert all(any(line.startswith(name) for line in out.splitlines()) for name in codec_names())


def test_help_version_and_argument_errors(run, capsys):
    assert run()[0] == 0 and "inspect" in run()[1]
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and hf_actcompress.__version__ in capsys.readouterr().out
    for argv in (["inspect"], ["inspect", "x", "--first", "-1"], ["bench", "--shape", "4x0"], ["nosuch"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


@pytest.mark.parametrize(("error", "code", "message"), [
    (ValueError("batch_size=3 is odd; block:bits=3,image_size=4 is a spec"), 2,
     "--batch-size 3 is odd; block:bits=3,image_size=4 is a spec"),
    (PermissionError(13, "Permission denied", "/x"), 2, "/x: Permission denied"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_exit_codes(monkeypatch, capsys, error, code, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("hf_actcompress.cli.inspect.parse_codecs", fail)
    assert main(["inspect", "x"]) == code
    assert capsys.readouterr().err == f"hf-actcompress inspect: {message}\n"


@pytest.mark.parametrize("columns", [None, "80"])
def test_as_a_module_into_a_pipe_that_closes(tmp_path, monkeypatch, columns):
    monkeypatch.delenv("COLUMNS", raising=False) if columns is None else monkeypatch.setenv("COLUMNS", columns)
    write_results(tmp_path, {"runs": RECORDS})
    command = [sys.executable, "-m", "hf_actcompress", "report", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.wait(), process.stderr.read()) == (1, b"")


def test_imports_stay_light():
    """--version and the help of every command load no torch, nor what only some commands need."""
    heavy = "torch", "numpy", "transformers", "timm", "matplotlib", "datasets", "torchvision", "sklearn"
    code = f"""
import contextlib, io, sys
from hf_actcompress.cli import COMMANDS, main
for argv in (["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main(argv)
        except SystemExit as stop:
            assert stop.code == 0, argv
import hf_actcompress.report.figures
print([m for m in {heavy} if m in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_advise_measures_a_model_and_says_what_to_take(run, bert, tmp_path):
    options = ("--model", bert, "--batch-size", 4, "--microbatches", 2, "--seq-len", 16)
    code, out, _ = run("advise", *options, "--bandwidth", "64kbit", "--json", "--codec", "identity",
                       "block:bits=4/block:bits=8", "--png", tmp_path / "step.png")  # fmt: skip
    found = json.loads(out)
    assert code == 0 and found["take"] == "block:bits=4/block:bits=8"
    plain, block = found["codecs"]
    assert plain["bytes_forward"] == plain["bytes_backward"] == 2 * (2 * 16 * 16 * 4 + 64)
    assert block["bytes_forward"] < block["bytes_backward"] < plain["bytes_forward"] / 3
    assert plain["seconds"] > plain["limit_seconds"] == pytest.approx(plain["bytes_forward"] / 8000)
    assert (tmp_path / "step.png").stat().st_size > 5000
    for schedule in ("zbv", "interleaved"):
        code, out, _ = run("advise", *options, "--bandwidth", "1mbit", "--schedule", schedule, "--codec", "identity")
        assert code == 0 and "4 stages on 2 devices" in out
    code, out, _ = run("advise", *options, "--bandwidth", "100gbit", "--compute", "1/2", "1/2", "--timeline")
    assert code == 0 and "Do not compress: no codec makes a step more than 3 % faster" in out
    assert "device 0 > device 1" in out and "F forward, B backward" in out


def test_advise_plans_a_cluster_that_is_not_there(run, tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("""
microbatches: 128
devices: [{name: host, count: 64, flops: 20T}]
stages: [{count: 64, flops: 200G, activation: [4, 64, 64], dtype: bf16}]
links: {bandwidth: 1mbit, latency: 30ms}
codecs: {none: identity, small: "block:bits=4"}
""")
    code, out, _ = run("advise", path)
    assert code == 0 and "64 stages on 64 devices, 128 micro-batches of 4, early-1f1b" in out
    assert "Take small: " in out


MODEL = ("--model", "FOLDER")
SLOW = (*MODEL, "--bandwidth", "1mbit")


@pytest.mark.parametrize(("argv", "message"), [
    ((), "give either the YAML file of a cluster, or --model with --bandwidth"),
    (("x.yaml", "--model", "minilm"), "give either the YAML file"),
    (("x.yaml",), "'x.yaml' cannot be read: No such file"),
    (MODEL, "--model needs --bandwidth, such as --bandwidth 100mbit"),
    ((*MODEL, "--bandwidth", "fast"), "--bandwidth: 'fast' is not a bandwidth above 0 such as 100mbit"),
    ((*SLOW, "--latency", "x"), "--latency: 'x' is not a time such as 40ms"),
    ((*SLOW, "--stages", 2, "--cuts", 1), "give either --stages or --cuts"),
    ((*SLOW, "--batch-size", 9), "--batch-size 9 is not a multiple of --microbatches 8"),
    ((*SLOW, "--stages", 9), "--stages 9 is not a whole number from 1 to the 5"),
    ((*SLOW, "--microbatches", 1), "1 micro-batches; at least 2 are needed"),
    ((*SLOW, "--schedule", "zbv", "--stages", 3), "3 stages do not fit"),
    (SLOW, "does not run with --batch-size 32, --seq-len 128 and --image-size 224: The expanded size"),
    ((*SLOW, "--seq-len", 16, "--compute", "1/2"), "--compute gives 1 stages; there are 2"),
    ((*SLOW, "--seq-len", 16, "--compute", "1/2", "1"), "--compute: '1' is not the seconds of"),
    ((*SLOW, "--seq-len", 16, "--codec", "blok"), "Unknown codec 'blok'"),
])  # fmt: skip
def test_advise_refuses(run, bert, argv, message):
    code, _, err = run("advise", *(bert if word == "FOLDER" else word for word in argv))
    assert code == 2 and message in err


def test_parameters_that_layers_share_are_listed(run, tmp_path):
    config = transformers.DebertaV2Config(**SMALL, relative_attention=True, position_buckets=8, pos_att_type=["p2c"])
    config.save_pretrained(tmp_path)
    tied = inspect(run, tmp_path, "--seq-len", 8)["tied"]
    assert tied == {name: [0, 1, 2, 3] for name in tied} and "deberta.encoder.rel_embeddings.weight" in tied
    shown = run("inspect", tmp_path, "--seq-len", 8)[1]
    assert "tied: layers 0, 1, 2, 3 compute with deberta.encoder.rel_embeddings.weight" in shown
