"""How gradients are reduced, as a spec: a codec, or powersgd.

It imports no torch.distributed: configurations check specs where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..codecs import Codec, parse_codec

NAME = "powersgd"


@dataclass(frozen=True)
class PowerSGD:
    """torch's own PowerSGD hook: low-rank factors of each matrix, with error feedback and warm start.

    rank: of the factors.
    start: steps with a plain all-reduce before (2 or more: DDP arranges its buckets anew after the first).
    Source: Vogels et al., "PowerSGD", 2019; torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook.
    """

    rank: int = 4
    start: int = 10

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("start", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"powersgd: {name}={value!r} is not a whole number of {least} or more.")

    def __str__(self) -> str:
        return f"{NAME}:rank={self.rank}" + ("" if self.start == 10 else f",start={self.start}")


def parse_reduce(spec: str | Codec | PowerSGD) -> Codec | PowerSGD:
    """The codec of gradients, or PowerSGD.  Raises ValueError for a spec that is neither, or cannot be used there."""
    if isinstance(spec, PowerSGD):
        return spec
    if isinstance(spec, str) and spec.partition(":")[0].strip() == NAME:
        return _powersgd(spec)
    codec = parse_codec(spec)
    if "wire" in codec.traits.unfit:
        raise ValueError(f"{codec} cannot be used for gradients between processes: {codec.traits.unfit['wire']}")
    if codec.traits.per_sample:
        raise ValueError(f"{codec} remembers samples, and gradients belong to none: use {codec.for_gradients()}.")
    return codec


def _powersgd(spec: str) -> PowerSGD:
    values = {}
    for part in filter(None, spec.partition(":")[2].split(",")):
        name, _, text = part.partition("=")
        try:
            values[name.strip()] = int(text)
        except ValueError:
            raise ValueError(f"{spec!r}: {part!r} is no whole number; write powersgd:rank=4,start=10.") from None
    if unknown := set(values) - {"rank", "start"}:
        raise ValueError(f"{spec!r}: powersgd has the options rank and start, and no {', '.join(sorted(unknown))}.")
    return PowerSGD(**values)
