"""Boundaries beside what else wraps, shards, copies or compiles a model: identity to the bit, other codecs as alone.

One process stands for many: what is tested is which tensors and modules the hooks meet.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import batch_of, build, loss_of, points, stack
from helpers.boundaries import attach, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from hf_actcompress import ActCompressConfig, compress_model

CODECS = ["identity", "block:bits=4"]


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(model, run=None, steps=2):
    """Parameters after some steps; the optimizer is made when everything is attached."""
    run, optimizer = run or model, torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(steps):
        loss_of(run, points(seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [full(p.detach()).clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def alone(codec):
    """Without compression, and with it."""
    found = []
    for compressed in (False, True):
        model = stack(dropout=0.0).train()
        handle = compress_model(model, codec, example_inputs=points()[0]) if compressed else None
        found.append(trained(model))
        if handle is not None:
            handle.remove()
    return found


def check(codec, parameters, handle):
    plain, compressed = alone(codec)
    assert same(parameters, compressed)
    assert same(parameters, plain) == (codec == "identity")
    assert {row["calls"] for row in handle.stats()} == {2}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("options", [
    {}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True},
], ids=str)  # fmt: skip
def test_ddp(group, codec, options):
    model = DistributedDataParallel(stack(dropout=0.0).train(), **options)
    with compress_model(model, codec, example_inputs=points()[0]) as handle:
        check(codec, trained(model), handle)


def test_gradients_that_ddp_does_not_reduce_yet(group):
    model = DistributedDataParallel(stack(dropout=0.0).train())
    with compress_model(model, "block:bits=4", example_inputs=points()[0]) as handle:
        with model.no_sync():
            loss_of(model, points()).backward()
        loss_of(model, points(seed=1)).backward()
        assert {row["calls"] for row in handle.stats()} == {2}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("first", ["attach", "shard"])
def test_fsdp(group, codec, first):
    def shard(model):
        for block in model.blocks:
            fully_shard(block, mesh=group)
        fully_shard(model, mesh=group)

    model = stack(dropout=0.0).train()
    if first == "shard":
        shard(model)
    with compress_model(model, codec, example_inputs=points()[0]) as handle:
        if first == "attach":
            shard(model)
        check(codec, trained(model), handle)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_dtensor_is_compressed_by_its_shard_and_so_is_its_gradient(group, compiled):
    torch._dynamo.reset()
    layer = nn.Identity().train()
    boundary = attach(layer, "uniform:bits=2", "uniform:bits=2")
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    x, g = values(6, 8), values(6, 8, seed=1)
    leaf = DTensor.from_local(x, group, [Shard(0)]).requires_grad_()
    y = run(leaf)
    assert isinstance(y, DTensor) and y.placements == (Shard(0),)
    assert torch.equal(y.to_local(), boundary.forward(x))
    y.backward(DTensor.from_local(g, group, [Shard(0)]))
    assert torch.equal(leaf.grad.to_local(), boundary.backward(g))


@pytest.mark.parametrize("codec", CODECS)
def test_tensor_parallel_layers(group, codec):
    def made():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4))).train()

    found = []
    for parallel in (False, True):
        model, x = made(), points()[0].detach()
        if parallel:
            for block in model:
                parallelize_module(block, group, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        config = ActCompressConfig(codec, blocks=["0", "1", "2", "3"])
        with compress_model(model, config, example_inputs=x) as handle:
            model(x).square().sum().backward()
            assert {row["calls"] for row in handle.stats()} == {1}
        found.append([full(p.grad) for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("codec", CODECS)
def test_an_adapter_that_is_disabled_or_merged(codec):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    model.train(False)
    batch = batch_of("llama")
    with torch.no_grad():
        plain = model(**batch).logits
        with compress_model(model, codec) as handle:
            compressed = model(**batch).logits
            with model.disable_adapter():  # a reference model, as in DPO: LoRA starts at zero
                assert torch.equal(model(**batch).logits, compressed)
            model.merge_adapter()
            assert torch.equal(model(**batch).logits, compressed)
            model.unmerge_adapter()
            assert {row["calls"] for row in handle.stats() if row["direction"] == "forward"} == {3}
    assert torch.equal(plain, compressed) == (codec == "identity")


@pytest.mark.parametrize("codec", CODECS)
def test_quantized_linears(codec):
    quantization = pytest.importorskip("torchao.quantization")
    model = stack(dropout=0.0).train()

    def chosen(module, name):
        return "blocks" in name and isinstance(module, nn.Linear)

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=chosen)
    x = points()[0]
    plain = model(x)
    with compress_model(model, codec, example_inputs=x) as handle:
        y = model(x)
        y.sum().backward()
        assert torch.equal(y, plain) == (codec == "identity")
        assert {row["calls"] for row in handle.stats()} == {1}


class Outer(nn.Module):
    """As a LightningModule: the model is an attribute, and a step returns the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return loss_of(self.model, batch)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_outer_module(compiled):
    torch._dynamo.reset()
    found = []
    for outside in (False, True):
        model = stack(dropout=0.0).train()
        run = Outer(model)
        with compress_model(model, "block:bits=4", example_inputs=points()[0]) as handle:
            step = torch.compile(run, backend="aot_eager", fullgraph=True) if outside and compiled else run
            step(points()).backward()
            assert {row["calls"] for row in handle.stats()} == {1}
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: torch.optim.swa_utils.AveragedModel(model)])
def test_a_copy_that_is_made_during_training_says_so_and_leaves_the_run_alone(duplicate, caplog):
    model, batch = stack(dropout=0.0).train(), points()
    with compress_model(model, "ef+topk:ratio=0.3", example_inputs=batch[0]) as handle:
        loss_of(model, batch).backward()
        twin, before = duplicate(model), repr(handle.state_dict())
        assert "A copy of a compressed model" in caplog.text
        loss_of(twin, batch).backward()
        assert repr(handle.state_dict()) == before
        assert {row["calls"] for row in handle.stats()} == {1}
