"""Which arithmetic is fast on this machine."""

from __future__ import annotations


def bf16_is_fast() -> bool:
    """Whether bf16 autocast makes training faster here: on accelerators that have bf16, and CPUs that multiply in it.

    Other CPUs emulate it: a convolution then takes about ten times as long as in fp32.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return True
    # torch has no public question for this; where it has changed its private ones, fp32 is never wrong.
    asks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(ask() for ask in asks if ask is not None)
