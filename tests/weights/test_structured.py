"""Structured pruning: what is cut, that the right units go, and that a pruned model lives on by itself."""

import json

import pytest
import torch
from helpers.small_models import Net, bert, distilbert, images, inputs, texts, vit
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_actcompress.weights.depth import drop_layers, layer_influence
from hf_actcompress.weights.manifest import MANIFEST, WEIGHTS, load_pruned, save_pruned
from hf_actcompress.weights.structured import (
    PruningCallback,
    StructuredPruner,
    accumulate_gradients,
    count,
    prune,
)
from hf_actcompress.workloads import load_image_model


def test_channels_of_least_norm_go_and_a_zero_channel_changes_nothing():
    torch.manual_seed(0)
    net, batch = Net().eval(), images()
    with torch.no_grad():  # six inner channels that do nothing: the pruned network must compute the same
        dead = [1, 5, 8, 13, 20, 23]
        net.block[0].weight[dead] = 0
        net.block[0].bias[dead] = 0
        net.block[1].weight[dead] = 0
        net.block[1].bias[dead] = 0
        net.block[3].weight[:, dead] = 0
    kept = net.block[0].weight[[i for i in range(24) if i not in dead]].clone()
    before = net(**inputs(batch))["logits"]
    outcome = prune(net, inputs(batch), channels=0.25, importance="l1", keep=["stem.0", "block.3"])
    assert net.block[0].out_channels == 18 and net.stem[0].out_channels == 16
    assert torch.equal(net.block[0].weight, kept)
    torch.testing.assert_close(net(**inputs(batch))["logits"], before)
    assert outcome.parameters == count(net) < outcome.parameters_before


def test_residual_streams_shrink_together():
    net = Net().eval()
    prune(net, inputs(images()), channels=0.5)
    assert net.stem[0].out_channels == net.block[3].out_channels == net.head.in_features == 8
    assert net.head.out_features == 3
    net(**images())


def test_taylor_keeps_what_the_loss_needs():
    torch.manual_seed(0)
    net, batch = Net().eval(), images()
    with torch.no_grad():  # large weights that nothing reads: the norm would keep them, the gradient does not
        net.block[0].weight[:12] *= 100
        net.block[3].weight[:, :12] = 0
    useful = net.block[0].weight[12:].clone()
    prune(net, inputs(batch), channels=0.5, importance="taylor", keep=["stem.0", "block.3"], batches=[batch])
    assert torch.equal(net.block[0].weight, useful)
    with pytest.raises(ValueError, match="needs gradients"):
        prune(Net(), inputs(batch), channels=0.5, importance="taylor")


@pytest.mark.parametrize(("make", "batch"), [(bert, texts), (distilbert, texts), (vit, images)])
def test_heads_and_neurons_of_transformers(make, batch, tmp_path):
    model, batch = make(), inputs(batch())
    prune(model, batch, heads=0.5, neurons=0.25)
    attention = next(m for m in model.modules() if hasattr(m, "scaling"))
    query = next(m for n, m in attention.named_modules() if n in ("query", "q_proj", "q_lin"))
    heads = next(getattr(attention, n) for n in ("num_attention_heads", "n_heads") if hasattr(attention, n))
    assert (query.out_features, query.in_features, heads) == (16, 32, 2)
    assert any(m.out_features == 48 for m in model.modules() if isinstance(m, nn.Linear))
    expected = model(**batch).logits
    loaded = load_pruned(save_pruned(model, tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded(**batch).logits, expected)


def test_timm_attention_in_one_matrix():
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=3).eval()
    x = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    before = model.blocks[0].attn.num_heads
    prune(model, x, heads=0.5, neurons=0.5)
    attention = model.blocks[0].attn
    assert attention.num_heads == before // 2
    assert attention.qkv.out_features == 3 * attention.num_heads * attention.head_dim
    model(x)


def test_torchvision_googlenet_by_way_of_a_file(tmp_path):
    model, _ = load_image_model("torchvision:googlenet", 3, 32)
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    outcome = prune(model.eval(), x, channels=0.2, round_to=8)
    assert 0.3 < 1 - outcome.parameters / outcome.parameters_before < 0.45
    assert all(m.out_channels % 8 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))
    assert torch.equal(load_pruned(save_pruned(model, tmp_path))(**x).logits, model(**x).logits)


def test_ranked_everywhere_the_useless_layer_loses_all():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():  # 12 of 24 inner channels hardly matter; 10 of all 40 are to go
        net.block[0].weight[:12] *= 1e-3
        net.block[1].weight[:12] *= 1e-3
        net.block[3].weight[:, :12] *= 1e-3
    prune(net, inputs(images()), channels=0.25, everywhere=True)
    assert (net.stem[0].out_channels, net.block[0].out_channels) == (16, 14)


def test_steps_reach_the_share_and_no_further():
    net = Net()
    pruner = StructuredPruner(net, inputs(images()), channels=0.5, steps=2)
    widths = [(pruner.step(), net.block[0].out_channels)[1] for _ in range(2)]
    assert widths == [18, 12]
    with pytest.raises(ValueError, match="All 2 steps"):
        pruner.step()


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_gradually_in_the_trainer(tmp_path, optim):
    torch.manual_seed(0)
    net, data = Net(), images(32)
    rows = [{k: v[i] for k, v in data.items()} for i in range(32)]
    pruner = StructuredPruner(net, inputs(data), channels=0.5, steps=2, importance="taylor")
    callback = PruningCallback(pruner, every=3, start=1)
    args = TrainingArguments(str(tmp_path), max_steps=8, per_device_train_batch_size=8, use_cpu=True, report_to=[],
                             save_strategy="steps", save_steps=5, optim=optim, disable_tqdm=True, learning_rate=1e-2,
                             label_names=["labels"], lr_scheduler_type="constant")  # fmt: skip
    trainer = Trainer(net, args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [1, 4] and net.block[0].out_channels == 12
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    before = net.block[0].weight.clone()
    net(**data)["loss"].backward()
    trainer.optimizer.step()
    assert not torch.equal(net.block[0].weight, before)  # the optimizer moves the new tensors
    shapes = json.loads((tmp_path / "checkpoint-5" / MANIFEST).read_text())["shapes"]
    assert shapes["block.0.weight"] == [12, 8, 3, 3]


def test_gradients_are_a_sum_over_batches_and_statistics_stay():
    net, batches = Net(), [images(), images()]
    mean = net.stem[1].running_mean.clone()
    accumulate_gradients(net, batches)
    assert net.training and torch.equal(net.stem[1].running_mean, mean)
    own = net.head.weight.grad.clone()
    net.eval().zero_grad()
    sum(net(**b)["loss"] for b in batches).backward()
    torch.testing.assert_close(own, net.head.weight.grad)


# Whole layers


def test_dropped_blocks_are_gone_and_the_rest_is_as_before(tmp_path):
    model, batch = bert(layers=5), inputs(texts())
    blocks = list(model.bert.encoder.layer)
    assert drop_layers(model, 2) == [1, 3]
    assert drop_layers(model, [0]) == [0]
    assert list(model.bert.encoder.layer) == [blocks[2], blocks[4]]
    assert model.config.num_hidden_layers == 2 and model.bert.encoder.layer.kept_layers == [2, 4]
    loaded = load_pruned(save_pruned(model, tmp_path))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_the_block_that_does_nothing_goes_first():
    model, batch = bert(layers=4), inputs(texts())
    idle = model.bert.encoder.layer[2]
    with torch.no_grad():  # what it adds to the stream is zero
        for dense in (idle.attention.output.dense, idle.output.dense):
            dense.weight.zero_()
            dense.bias.zero_()
    influence = layer_influence(model, "bert.encoder.layer", [batch])
    assert min(range(4), key=influence.__getitem__) == 2 and influence[2] < 1e-4
    assert drop_layers(model, 1, batches=[batch]) == [2]


# Bad input and files


@pytest.mark.parametrize(("options", "message"), [
    ({"channels": 1.0}, "channels=1.0 is no share"), ({}, "Nothing to prune"),
    ({"channels": 0.5, "importance": "l3"}, "use one of l1, l2, taylor"), ({"heads": 0.5}, "no attention found"),
    ({"channels": 0.5, "keep": ["nose"]}, "nose"), ({"neurons": 0.5}, "no units"),
    ({"channels": 0.5, "steps": 0}, "steps=0"),
])  # fmt: skip
def test_options_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        StructuredPruner(Net(), inputs(images()), **options)


@pytest.mark.parametrize(("drop", "message"), [(5, "drop 1 to 2"), (0, "drop 1 to 2"), ([7], "0 to 2")])
def test_layers_that_cannot_go(drop, message):
    with pytest.raises(ValueError, match=message):
        drop_layers(bert(), drop)


def test_files_that_do_not_fit_change_nothing(tmp_path):
    net = Net().eval()
    prune(net, inputs(images()), channels=0.5)
    save_pruned(net, tmp_path)
    other = Net(width=8)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="no config.json"):
        load_pruned(tmp_path)
    with pytest.raises(ValueError, match="the model a Linear"):
        load_pruned(tmp_path, nn.Linear(2, 2))
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_pruned(tmp_path, other)
    (tmp_path / WEIGHTS).write_bytes(data)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["shapes"]["head.weight"] = [3, 5]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="does not fit the weights at head.weight"):
        load_pruned(tmp_path, other)
    for field, value in (("shapes", {"head.weight": [-3, 5]}), ("modules", {"head": {"forward": 3}}), ("shapes", []),
                         ("kept_layers", {"block": [True]})):  # fmt: skip
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, field: value}))
        with pytest.raises(ValueError, match=f"{MANIFEST}: {field}"):
            load_pruned(tmp_path, other)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_pruned(tmp_path, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
