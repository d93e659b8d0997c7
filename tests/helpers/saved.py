"""Compress only the tensors that autograd saves: configurations, gradients, and functions as models."""

import torch
from torch import nn

from hf_actcompress import ActCompressConfig, compress_model


def only(codec, **options):
    return ActCompressConfig(first=0, last=0, saved=codec, **options)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Wrapped(nn.Module):
    """A function as a model."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function, self.own = function, nn.ParameterList(parameters)

    def forward(self, *args):
        return self.function(*args, *self.own)


def backward_of(function, x, codec="block:bits=2", parameters=(), **options):
    """Output, gradient of x and the bytes held, with the function's saved tensors packed."""
    model, x = Wrapped(function, *parameters), x.detach().clone().requires_grad_()
    with compress_model(model, only(codec, **options)) as handle:
        y = model(x)
        y.sum().backward()
        return y.detach(), x.grad, handle.meters["saved"].counts()
