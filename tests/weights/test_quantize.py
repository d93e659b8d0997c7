"""Static int8: close to the float model, small on disk, the same after loading; QAT that trains."""

import gzip
import json
import pickle
from unittest.mock import Mock

import pytest
import torch
from helpers.files import Touch
from helpers.small_models import Net, bert, images, inputs, texts
from torch import nn
from torch.nn import functional as F

from hf_actcompress.cli import main
from hf_actcompress.weights.quantize import (
    ABOUT,
    WEIGHTS,
    convert,
    load_quantized,
    prepare_qat,
    quantize_static,
    save_quantized,
)

pytest.importorskip("torchao")


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    net = Net(width=32).eval()
    batches = [images(8) for _ in range(3)]
    return net, batches, quantize_static(net, batches)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_it_is_int8_and_close(quantized):
    net, batches, model = quantized
    batch = inputs(batches[0])
    expected = net(**batch)["logits"]
    assert 0 < relative(model(**batch).logits, expected) < 0.05
    dtypes = {name: value.dtype for name, value in model.graph.state_dict().items()}
    weights = [n for n, d in dtypes.items() if d == torch.int8 and model.graph.state_dict()[n].dim() > 1]
    assert len(weights) == 4  # three convolutions and the linear layer; nothing of fp32 stays beside them
    assert not any(v.dim() > 1 for v in model.graph.state_dict().values() if v.dtype == torch.float32)
    assert not net.training and next(net.parameters()).dtype == torch.float32


def test_ranges_come_from_the_batches():
    """Calibrated on small images, large ones are clipped."""
    net = Net(width=32).eval()
    small, large = [{"pixel_values": s * images(8)["pixel_values"]} for s in (0.05, 5.0)]
    model = quantize_static(net, [small])
    assert relative(model(**small).logits, net(**small)["logits"]) < 0.1
    assert relative(model(**large).logits, net(**large)["logits"]) > 0.3


def test_files_are_small_and_give_the_same(quantized, tmp_path):
    net, batches, model = quantized
    save_quantized(model, tmp_path)
    loaded = load_quantized(tmp_path)
    for rows in (8, 1, 3):
        batch = {"pixel_values": batches[1]["pixel_values"][:rows]}
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    wide = Net(width=192).eval()
    save_quantized(quantize_static(wide, batches[:1]), tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size < 0.4 * sum(p.nbytes for p in wide.parameters())


def test_lowered_kernels_compute_the_same(quantized, tmp_path):
    _, batches, model = quantized
    model = load_quantized(save_quantized(model, tmp_path))
    batch = inputs(batches[2])
    expected = model(**batch).logits
    model.lower(batch)
    assert len(model._fast) == 1
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0.02, atol=0.02)
    model._fast.clear()


@pytest.mark.parametrize(("vnni", "given", "top"), [(True, None, 255), (False, None, 127), (True, True, 127),
                                                    (False, False, 255)])  # fmt: skip
def test_activations_take_seven_bits_where_sums_would_overflow(monkeypatch, vnni, given, top):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    net, batch = Net(width=32).eval(), images(8)
    model = quantize_static(net, [batch], reduce_range=given)
    tops = {node.args[4] for node in model.graph.graph.nodes if "quantize_per_tensor.default" in str(node.target)
            and "dequantize" not in str(node.target)}  # fmt: skip
    assert tops == {top}


def test_texts_of_any_length(tmp_path):
    torch.manual_seed(0)
    model, batch = bert(layers=1), inputs(texts(4, 9))
    quantized = quantize_static(model, [batch])
    assert relative(quantized(**batch).logits, model(**batch).logits) < 0.1
    other = inputs(texts(3, 6))
    assert relative(quantized(**other).logits, model(**other).logits) < 0.1
    assert quantized(**other, labels=torch.tensor([0, 1, 2])).loss.dim() == 0
    loaded = load_quantized(save_quantized(quantized, tmp_path))
    assert loaded.config.model_type == "bert" and torch.equal(loaded(**other).logits, quantized(**other).logits)


@pytest.fixture
def patterns_of_the_net(monkeypatch):
    """torchao looks for 96 patterns of convolution and BatchNorm, and exports each one anew at every call, which takes
    most of a minute.  `Net` has two of them: 2-d, per channel, with a bias that is not quantized.
    """
    from torchao.quantization.pt2e import qat_utils

    for name in ("_fuse_conv_bn_qat_helper", "_fold_conv_bn_qat_helper"):
        search = getattr(qat_utils, name)
        monkeypatch.setattr(
            qat_utils, name,
            lambda m, conv, *args, search=search, **kw: search(m, conv, *args, **kw) if conv is F.conv2d else m,
        )  # fmt: skip
    # is_per_channel, has_bias, bias_is_quantized, bn_is_training
    monkeypatch.setattr(qat_utils, "itertools", Mock(product=lambda *_: [(True, True, False, False)]))


def test_training_with_rounding_lowers_the_loss_and_converts(tmp_path, patterns_of_the_net):
    torch.manual_seed(0)
    batch = images(8)
    model = prepare_qat(Net(), batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model.train()
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.85 * losses[0]
    with pytest.raises(ValueError, match="still in training"):
        model.lower(inputs(batch))
    model.eval()
    simulated = model(**inputs(batch)).logits
    final = convert(model)
    assert not any("batch_norm" in str(node.target) for node in final.graph.graph.nodes)  # folded
    assert relative(final(**inputs(batch)).logits, simulated) < 0.05
    save_quantized(final, tmp_path)
    assert torch.equal(load_quantized(tmp_path)(**inputs(batch)).logits, final(**inputs(batch)).logits)


def test_bad_input(quantized, tmp_path):
    net, batches, model = quantized
    with pytest.raises(ValueError, match="batches is empty"):
        quantize_static(net, [])
    with pytest.raises(ValueError, match="two rows"):
        quantize_static(net, [{"pixel_values": torch.zeros(1, 3, 16, 16)}])
    with pytest.raises(ValueError, match="pixel_values is missing"):
        model(input_ids=torch.zeros(1))
    with pytest.raises(ValueError, match="prepare_qat"):
        convert(model)
    with pytest.raises(ValueError, match="save_quantized takes"):
        save_quantized(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match=f"no {ABOUT}"):
        load_quantized(tmp_path)
    save_quantized(model, tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(ValueError, match="cut off"):
        load_quantized(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(data)
    (tmp_path / ABOUT).write_text((tmp_path / ABOUT).read_text()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_quantized(tmp_path)


@pytest.mark.parametrize("name", ["int8.pt2.gz", WEIGHTS, ABOUT])
def test_a_pickle_in_any_of_the_files_is_not_executed(quantized, tmp_path, name):
    folder, mark = tmp_path / "model", tmp_path / "executed"
    save_quantized(quantized[2], folder)
    data = pickle.dumps(Touch(mark))
    pickle.loads(data).close()
    assert mark.exists()  # so it would work
    mark.unlink()
    if name == "int8.pt2.gz":  # as version 0.1 wrote
        (folder / WEIGHTS).unlink()
        data = gzip.compress(data)
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match="version 0.1" if name == "int8.pt2.gz" else "damaged"):
        load_quantized(folder)
    assert main(["card", str(folder)]) == 2
    assert not mark.exists()


@pytest.mark.parametrize(("field", "value", "message"), [
    ("target", "torch.serialization.os.system", "may call"),
    ("target", "aten.from_file.default", "may call"),
    ("target", "aten._unsafe_index.Tensor", "may call"),
    ("target", "aten.conv2d.__class__", "may call"),
    ("op", "call_module", "is a 'call_module'"),
    ("args", [{"node": "nobody"}], "not complete"),
    ("args", [{"dtype": "load"}], "not understood"),
    ("name", "x; import os", "no proper name"),
])  # fmt: skip
def test_a_graph_can_name_only_operators_on_tensors(quantized, tmp_path, field, value, message):
    save_quantized(quantized[2], tmp_path)
    about = json.loads((tmp_path / ABOUT).read_text())
    node = next(node for node in about["nodes"] if node["target"] == "aten.conv2d.default")
    node[field] = value
    (tmp_path / ABOUT).write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"{ABOUT} is damaged .*{message}"):
        load_quantized(tmp_path)
