"""Gradients of data-parallel training, compressed on their way between processes.

    ActCompressConfig(reduce="ef+block:bits=4")      in DistributedDataParallel and FSDP2, in a Trainer or not
"""

from .spec import PowerSGD, parse_reduce

__all__ = ["PowerSGD", "parse_reduce"]
