"""What a training step takes: counted without values, against a step that is measured."""

import json

import pytest
from transformers import BertConfig, LlamaConfig

from hf_actcompress.cli import main
from hf_actcompress.plan.fit import METHODS, fit, parse_memory
from hf_actcompress.plan.fit.measure import measure
from hf_actcompress.plan.fit.models import empty_of, find_model

LLAMA = LlamaConfig(
    vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=384, max_position_embeddings=256,
)  # fmt: skip
BERT = BertConfig(
    vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=384,
    max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
SHOWN = ("none", "saved 8", "saved 4", "saved 2", "checkpointing", "checkpointing + saved 4")


@pytest.mark.parametrize("config", [LLAMA, BERT], ids=["llama", "bert"])
def test_counts_are_those_of_a_real_step(config):
    found = fit(config, batch_size=8, seq_len=128, device="cpu", methods=SHOWN)
    subject = find_model(config, seq_len=128, image_size=None, config=None, dtype="fp32", lora=None)
    for name in SHOWN:
        model = empty_of(subject.make(None), "cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.fill_(0.01 if tensor.is_floating_point() else 0)
        real = measure(model, subject.batch(8, 128), METHODS[name].method, optimizer="adamw", autocast=False,
                       device="cpu")  # fmt: skip
        row = found.row(name)
        assert row.peak == pytest.approx(real["peak"], rel=0.08), name
        # What is held is counted with one tensor of the logits' size more.
        assert 0.95 * real["held"] < row.held < 1.05 * real["held"] + 8 * 128 * 512 * 4, name


def test_layers_that_are_alike_are_counted_a_few_at_a_time():
    deep = LlamaConfig(**{**LLAMA.to_dict(), "num_hidden_layers": 9})
    few = fit(deep, batch_size=2, seq_len=64, methods=["saved 4"])
    assert few.counter.reduced and any("for 9" in note for note in few.notes)
    whole = few.counter.whole.count(METHODS["saved 4"].method, 2, 64)
    assert few.row("saved 4").held == pytest.approx(whole.held, rel=0.01)
    assert few.row("saved 4").peak == pytest.approx(whole.peak, rel=0.01)


def test_what_fits():
    def row(**options):
        return fit("resnet18", image_size=64, methods=["saved 4"], **options)

    small, large = (row(memory=size, batch_size=4) for size in ("400MB", "4GB"))
    assert small.row("none").rows < small.row("saved 4").rows < large.row("saved 4").rows
    none = large.row("none")
    assert none.fits and row(memory="4GB", batch_size=none.rows).row("none").fits
    over = row(memory="4GB", batch_size=none.rows + 1).row("none")
    assert not over.fits and over.peak == pytest.approx(4e9, rel=0.05)


def test_on_the_command_line(capsys):
    options = ["llama", "--config", "hidden_size=64", "num_hidden_layers=2", "num_attention_heads=2",
               "num_key_value_heads=2", "intermediate_size=128", "vocab_size=256", "--seq-len", "32"]  # fmt: skip
    assert main(["fit", *options, "--memory", "1GB"]) == 0
    shown = capsys.readouterr().out
    assert "checkpointing + saved 4" in shown and "gradient_checkpointing=False" in shown


def test_as_json():
    found = fit(LLAMA, batch_size=2, seq_len=32, memory="1GB", methods=["saved 4"]).to_dict()
    assert json.loads(json.dumps(found))["best"] == "none" and len(found["methods"]) == 2


@pytest.mark.parametrize(("argv", "words"), [
    (["no-such-model"], "no-such-model"), (["resnet18", "--memory", "lots"], "24GB"),
    (["resnet18", "--config", "depth"], "KEY=VALUE"),
])  # fmt: skip
def test_refusals(argv, words, capsys):
    assert main(["fit", *argv]) == 2
    assert words in capsys.readouterr().err


def test_sizes():
    assert [parse_memory(x) for x in ("24GB", "1.5 MiB", 100)] == [24e9, 1.5 * 2**20, 100]
    for wrong in ("", "24", "GB", "-1GB", True):
        with pytest.raises(ValueError, match="is no size"):
            parse_memory(wrong)
