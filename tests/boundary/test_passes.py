"""A boundary that the model never comes by is an error in the first training pass."""

import pytest
import torch
from helpers import stack
from helpers.boundaries import values
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model


class Skips(nn.Module):
    """Block 2 is run by another method than its call, where that is asked for."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = stack(dropout=0.0).blocks, nn.Linear(8, 3)

    def forward(self, x, skip=False):
        for i, block in enumerate(self.blocks):
            x = block.forward(x) if skip and i == 2 else block(x)
        return self.head(x)


def config(**more):
    return ActCompressConfig(codec="block:bits=4", first=1, last=0, layers={"blocks.2": "block:bits=4"}, **more)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_training_pass_names_it_and_what_ran(compiled):
    torch._dynamo.reset()
    model, x = Skips().train(), values(4, 8)
    with compress_model(model, config(), example_inputs=x):
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with torch.no_grad():
            run(x, skip=True)
        with pytest.raises(RuntimeError, match=r"after blocks\.2 compressed nothing.*passed: blocks\.0\."):
            run(x, skip=True)


def test_what_ran_once_may_be_skipped_later():
    model, x = Skips().train(), values(4, 8)
    with compress_model(model, config(), example_inputs=x):
        model(x)
        model(x, skip=True)


def test_an_exception_of_the_model_is_the_one_that_is_seen():
    model = Skips().train()
    with compress_model(model, config(), example_inputs=values(4, 8)), pytest.raises(RuntimeError, match="shapes"):
        model(values(4, 5))


def test_a_model_that_drops_layers_at_random_has_more_passes():
    model, x = Skips().train(), values(4, 8)
    model.layerdrop = 0.1
    with compress_model(model, config(), example_inputs=x):
        for _ in range(31):
            model(x, skip=True)
        with pytest.raises(RuntimeError, match="blocks.2"):
            model(x, skip=True)
