"""A traced pass leaves no trace: random states, what modules remember, attention, sharding."""

import random

import numpy
import pytest
import torch
import torch.distributed
import transformers
from helpers.layered_models import SMALL, Residual, bert
from torch import nn

from hf_actcompress import compress_model, find_layers


class Busy(nn.Module):
    """Changes whatever a forward pass may change."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Residual(), Residual())
        self.attention = nn.Linear(1, 1)
        self.generator = torch.Generator().manual_seed(0)
        self.seen, self.cache, self.mode, self.settings = [], {}, "long", Settings()

    def forward(self, x):
        numpy.random.rand(), random.random(), torch.rand(1), torch.rand(1, generator=self.generator)
        self.seen.append(x.shape)
        self.cache["mask"] = x
        self.settings.attention = self.mode = "short"
        self.attention, self.extra = nn.Linear(2, 2), nn.Linear(1, 1)
        return self.blocks(x)


class Settings:
    attention = "block sparse"

    def __init__(self):
        self.attention = "block sparse"


def test_random_states_of_torch_numpy_python_and_of_the_model():
    model, x = Busy(), torch.zeros(1, 8, 4, 4)
    before = torch.get_rng_state(), numpy.random.get_state(), random.getstate(), model.generator.get_state()
    compress_model(model, "identity", example_inputs=x).remove()
    after = torch.get_rng_state(), numpy.random.get_state(), random.getstate(), model.generator.get_state()
    assert torch.equal(before[0], after[0])
    assert str(before[1]) == str(after[1])
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])


def test_what_modules_and_their_settings_remember():
    model = Busy()
    modules = dict(model.named_modules())
    find_layers(model, torch.zeros(1, 8, 4, 4))
    assert (model.seen, model.cache, model.mode, model.settings.attention) == ([], {}, "long", "block sparse")
    assert dict(model.named_modules()) == modules
    assert not hasattr(model, "extra")


def test_big_bird_keeps_its_attention():
    """For a short input it exchanges its attention for a full one, for good."""
    config = transformers.BigBirdConfig(**SMALL, block_size=4, num_random_blocks=1)
    model = transformers.BigBirdModel(config)
    kinds = {name: type(module) for name, module in model.named_modules()}
    with compress_model(model, "identity"):
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert model.attention_type == config.attention_type == "block_sparse"


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_sharded_model_stays_sharded(one_process):
    """A pass would gather the root's parameters, and an optimizer that is made after it would train the copies."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = bert()
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    with compress_model(model, "block:bits=4") as handle:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [p.to_local().clone() for p in model.parameters()]
        model(input_ids=torch.arange(3, 11)[None]).logits.square().sum().backward()
        optimizer.step()
        changed = [not torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True)]
        assert sum(changed) > len(changed) / 2
        assert [layer.name for layer in handle.layers[:4]] == [f"bert.encoder.layer.{i}" for i in range(4)]
        assert handle.layers[0].shape == (1, 8, 16)  # the first batch was the trace
