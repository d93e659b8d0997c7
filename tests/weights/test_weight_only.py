"""Weights of few bits: the codes are what they say, files are small, and loading gives the same model."""

import copy
import json

import pytest
import torch
from helpers.small_models import Net, bert, images, inputs, texts
from torch import nn

from hf_actcompress.weights.weight_only import (
    ABOUT,
    WEIGHTS,
    Binarize,
    binarize,
    finish_binarize,
    load_few_bits,
    quantize_weights,
    save_few_bits,
)


@pytest.mark.parametrize(("bits", "most", "share"), [(8, 0.02, 0.31), (4, 0.3, 0.22)])
def test_int8_and_int4(tmp_path, bits, most, share):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model, batch = bert(layers=2, hidden=64), inputs(texts())
    expected = model(**batch, output_hidden_states=True).hidden_states[-1]
    linear = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen = quantize_weights(model, bits, layers="bert.encoder.*")
    assert len(chosen) == 12
    error = (model(**batch, output_hidden_states=True).hidden_states[-1] - expected).norm() / expected.norm()
    assert 0 < error.item() < most
    weight = model.bert.encoder.layer[0].output.dense.weight
    assert int(weight.qdata.min()) >= -(2 ** (bits - 1)) and int(weight.qdata.max()) < 2 ** (bits - 1)
    logits = model(**batch).logits
    save_few_bits(model, tmp_path)
    loaded = load_few_bits(tmp_path)
    assert torch.equal(loaded(**batch).logits, logits)
    whole = sum(p.numel() for p in bert(layers=2, hidden=64).parameters())
    few = sum(linear[name] for name in chosen)
    file = (tmp_path / WEIGHTS).stat().st_size
    assert (file - 4 * (whole - few) - 12000) / (4 * few) < share  # 12 kB of names in the header


def test_binary_weights_are_signs_with_a_scale_per_row():
    w = torch.tensor([[0.5, -1.5, 1.0], [0.0, 2.0, -0.25]], requires_grad=True)
    binary = Binarize()(w)
    torch.testing.assert_close(binary, torch.tensor([[1.0, -1, 1], [0.75, 0.75, -0.75]]))
    binary.backward(torch.ones(2, 3))
    assert w.grad.tolist() == [[1, 0, 1], [1, 0, 1]]  # straight through where |w| <= 1


def test_binarized_layers_train_and_fit_in_a_bit_each(tmp_path):
    torch.manual_seed(0)
    net, batch = Net(width=32), images(8)
    assert binarize(net, "block.*") == ["block.0", "block.3"]
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    losses = []
    for _ in range(25):
        loss = net(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    net.eval()
    expected = net(**inputs(batch))["logits"]
    assert finish_binarize(net) == ["block.0", "block.3"]
    assert all(len(row.abs().unique()) == 1 for row in net.block[0].weight)
    assert torch.equal(net(**inputs(batch))["logits"], expected)
    save_few_bits(net, tmp_path)
    loaded = load_few_bits(tmp_path, Net(width=32))
    assert torch.equal(loaded(**inputs(batch))["logits"], expected)
    codes = sum(m.weight.numel() for m in (net.block[0], net.block[3]))
    rest = sum(v.nbytes for n, v in net.state_dict().items() if n not in ("block.0.weight", "block.3.weight"))
    assert (tmp_path / WEIGHTS).stat().st_size < codes / 8 + rest + 4000


def test_bad_input(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="8 and 4"):
        quantize_weights(bert(), 3)
    with pytest.raises(ValueError, match="matches no linear"):
        quantize_weights(bert(), 8, layers="nose*")
    with pytest.raises(ValueError, match="does not divide the 32"):
        quantize_weights(bert(), 4, group=48)
    with pytest.raises(ValueError, match="matches no linear or conv"):
        binarize(Net(), "nose*")
    with pytest.raises(ValueError, match="No weights of few bits"):
        save_few_bits(Net(), tmp_path)
    with pytest.raises(ValueError, match="not written by save_few_bits"):
        load_few_bits(tmp_path / "none")
    net = Net()
    binarize(net, "block.*")
    finish_binarize(net)
    save_few_bits(net, tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:-50])
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_few_bits(tmp_path, Net())


@pytest.mark.parametrize(("change", "message"), [
    (lambda about: about["packed"]["block.0.weight"].update(bits=3), r"packed\['block.0.weight'\]=.*not understood"),
    (lambda about: about["shapes"]["shapes"].update({"block.0.weight": [10**15, 4]}), "bytes of codes and"),
    (lambda about: about["shapes"]["shapes"].update({"block.0.weight": [-1, 4]}), r"shapes\['block.0.weight'\]"),
    (lambda about: about["shapes"]["modules"]["block.0"].update(forward=3), r"modules\['block.0'\] cannot be right"),
    (lambda about: about["shared"].update({"head.bias": "nobody"}), "does not fit|no tensor of the same shape"),
    (lambda about: about.update(format=9), "not of format 1"),
    (lambda about: about.pop("packed"), "no mapping"),
])  # fmt: skip
def test_a_json_that_cannot_be_right_is_refused_before_anything_is_changed(tmp_path, change, message):
    net = Net(width=32)
    binarize(net, "block.*")
    finish_binarize(net)
    save_few_bits(net, tmp_path)
    about = json.loads((tmp_path / ABOUT).read_text())
    change(about)
    (tmp_path / ABOUT).write_text(json.dumps(about))
    other = Net(width=32)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        load_few_bits(tmp_path, other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
