"""bf16 only where the hardware has it."""

import pytest
import torch

from hf_actcompress.workloads.results import bf16_is_fast


@pytest.mark.parametrize(("amx", "avx512", "fast"), [(True, False, True), (False, True, True), (False, False, False)])
def test_cpus(monkeypatch, amx, avx512, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert bf16_is_fast() is fast


def test_a_torch_without_these_functions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert bf16_is_fast() is False
