"""A boundary on one layer, the codecs that its tests use, and their input."""

import torch

from hf_actcompress.boundary.channel import Channel
from hf_actcompress.boundary.hook import Boundary
from hf_actcompress.codecs import parse_codec
from hf_actcompress.observe.meter import Meter

SPECS = [
    "identity", "uniform:bits=3", "block:bits=4,group=16", "block:bits=2,round=stochastic", "sort:bits=4,splits=2",
    "kmeans:bits=3", "topk:ratio=0.1", "lowrank:rank=2", "float8", "topk:ratio=0.2|uniform:bits=8",
    "ef+topk:ratio=0.1",
]  # fmt: skip
STATEFUL = ["block:bits=2,round=stochastic", "kmeans:bits=2", "lowrank:rank=2", "ef+topk:ratio=0.1"]


def attach(layer, codec="identity", grad_codec="identity", meter_every=10, **options):
    """The boundary, whose channels have a meter as their listener."""
    boundary = Boundary("the.layer", parse_codec(codec), parse_codec(grad_codec), **options)
    for channel in boundary.channels.values():
        channel.listeners.append(Meter(meter_every))
    layer.register_forward_hook(boundary)
    return boundary


def meter(channel):
    return channel.listeners[0]


def metered(spec, every=1):
    channel = Channel("c", "forward", parse_codec(spec))
    channel.listeners.append(Meter(every))
    return channel


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
