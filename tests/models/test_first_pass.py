"""A model whose inputs cannot be made up: its first real batch is the trace."""

import logging

import pytest
import torch
from helpers.layered_models import Backwards, Residual
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model
from hf_actcompress.models.first_pass import FirstPass


class Picky(Backwards):
    """Takes an argument that nobody guesses; runs its blocks in the opposite of registration order."""

    passes = 0

    def forward(self, x, weights):
        self.passes += 1
        return super().forward(x) * weights["scale"]


def batch():
    return torch.randn(2, 3, 8, 8), {"scale": torch.ones(2, 1)}


FIRST = ActCompressConfig(codec="block:bits=4", first=2, last=0, placement="cuts")


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_boundaries_move_to_where_the_first_batch_ran(caplog):
    model = Picky()
    with compress_model(model, FIRST) as handle:
        assert "untraced" in caplog.text
        assert handle.layers[0].shape is None
        model.passes = 0
        model(*batch()).sum().backward()
        assert model.passes == 1  # no pass of its own
        assert list(handle.boundaries) == ["blocks.2"]
        assert "boundaries are at blocks.2 and no longer at" in caplog.text
        assert handle.layers[1].shape == (2, 8, 6, 6)
        model(*batch()).sum().backward()
        assert [(row["boundary"], row["calls"]) for row in handle.stats()] == [("blocks.2", 1)] * 2
    assert hooks(model) == 0


def test_a_boundary_at_a_module_that_never_runs_moves_before_it_is_an_error(caplog):
    model = Picky()
    config = ActCompressConfig(codec="block:bits=4", first=1, last=0, blocks=["aux", "blocks.*"])
    with compress_model(model, config) as handle:
        assert list(handle.boundaries) == ["aux"]
        model(*batch()).sum().backward()
        assert list(handle.boundaries) == ["conv"]
        assert "left out of the layers" in caplog.text
        model(*batch()).sum().backward()
        assert [row["calls"] for row in handle.stats()] == [1, 1]


class InOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x, weights):
        for block in self.blocks:
            x = block(x)
        return x * weights["scale"]


def test_boundaries_that_were_right_stay_and_have_fired():
    model = InOrder()
    with compress_model(model, FIRST) as handle:
        boundary = handle.boundaries["blocks.1"]
        model(torch.randn(2, 8, 4, 4), {"scale": 1.0}).sum().backward()
        assert handle.boundaries == {"blocks.1": boundary}
        assert handle.cuts["blocks.1"].shape == (2, 8, 4, 4)
        assert [row["calls"] for row in handle.stats()] == [1, 1]
        assert watching(model) == 0


def watching(model):
    return sum(isinstance(getattr(hook, "first", None), FirstPass)
               for m in model.modules() for hook in m._forward_hooks.values())  # fmt: skip


def test_a_pass_that_fails_is_no_trace(caplog):
    model = Picky()
    with compress_model(model, FIRST) as handle:
        with pytest.raises(RuntimeError):
            model(torch.zeros(3), {})
        model(*batch())
        assert list(handle.boundaries) == ["blocks.2"]


def test_where_boundaries_cannot_move_the_remedy_is_named():
    model = Picky()
    with compress_model(model, ActCompressConfig(codec="block:bits=4", first=2, last=0, saved="block:bits=4")):  # noqa: SIM117
        with pytest.raises(ValueError, match=r"belong to .*blocks\.2.*Pass example_inputs="):
            model(*batch())


def test_a_traced_model_is_not_watched(caplog):
    model = Backwards()
    with caplog.at_level(logging.WARNING), compress_model(model, FIRST):
        assert watching(model) == 0
