"""Memory of decoded tensors: neither the advice nor the pool changes anything but speed."""

from __future__ import annotations

import pytest
import torch

from hf_actcompress.codecs import parse_codec
from hf_actcompress.ops import memory
from hf_actcompress.ops.memory import HUGE_PAGE, MAPPED, POOLED, UNIT, Pool, fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("nbytes", [0, 8, MAPPED, MAPPED + 8, MAPPED + (5 << 20)])
def test_is_an_empty_tensor_of_that_size(nbytes: int, dtype: torch.dtype) -> None:
    out = fresh(nbytes // dtype.itemsize, dtype, torch.device("cpu"))
    assert out.shape == (nbytes // dtype.itemsize,) and out.dtype == dtype
    out.fill_(1)
    assert out.sum(dtype=torch.float64) == out.numel()


def test_a_system_without_the_advice_decodes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = parse_codec("rotated:bits=2"), torch.randn(1 << 14, 768)
    payload = codec.encode(x)
    expected = codec.decode(payload)
    assert expected.nbytes > MAPPED
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert torch.equal(codec.decode(payload), expected)


@pytest.mark.skipif(memory._madvise() is None, reason="this system takes no advice")
@pytest.mark.parametrize("dear", [-1.0, float("inf")])
def test_dear_pages_are_asked_for_no_more(monkeypatch: pytest.MonkeyPatch, dear: float) -> None:
    advised, real = [], memory._madvise()

    def advise(address: int, size: int, what: int) -> int:
        assert size >= 0 and address % HUGE_PAGE == size % HUGE_PAGE == 0
        advised.append((what, size))
        return real(address, size, what)

    monkeypatch.setattr(memory, "_madvise", lambda: advise)
    monkeypatch.setattr(memory, "DEAR", dear)
    monkeypatch.setattr(memory, "_pause_until", 0.0)
    for _ in range(2):
        out = fresh(MAPPED + 3 * HUGE_PAGE, torch.uint8, torch.device("cpu")).fill_(7)
        assert (out == 7).all()
    (kind, whole), *others = advised
    assert kind == memory.MADV_HUGEPAGE and whole >= MAPPED
    if dear < 0:  # two pages, and the rest on small ones; nothing the second time
        assert others == [(memory.MADV_NOHUGEPAGE, whole - 2 * HUGE_PAGE)]
    else:
        assert [what for what, _ in others] == [memory.MADV_HUGEPAGE]


def test_a_pool_gives_memory_again_when_no_view_of_it_is_left() -> None:
    pool, n = Pool(), POOLED
    first = pool.take(n, torch.float32).fill_(1)
    part = first[5:7]  # a view keeps it
    address = first.data_ptr()
    del first
    second = pool.take(n, torch.float32).fill_(2)
    assert second.data_ptr() != address and part.tolist() == [1, 1] and pool.nbytes == 2 * 4 * n
    del part
    third = pool.take(n // 4, torch.bfloat16).fill_(3)
    assert third.data_ptr() == address and third.dtype == torch.bfloat16 and third.numel() == n // 4
    assert (second == 2).all() and pool.nbytes == 2 * 4 * n


def test_a_larger_tensor_takes_the_place_of_a_free_piece() -> None:
    pool = Pool()
    small = pool.take(UNIT, torch.uint8)
    del small
    large = pool.take(UNIT + 1, torch.uint8)
    assert pool.nbytes == 2 * UNIT
    large.fill_(7)
    del pool  # the tensor outlives it
    assert large.sum() == 7 * (UNIT + 1)
    assert Pool().take(0, torch.float32).shape == (0,)


def test_the_smallest_free_piece_that_is_large_enough_is_taken() -> None:
    pool = Pool()
    tensors = [pool.take(n * UNIT, torch.uint8) for n in (4, 1, 3, 2)]
    places = {t.numel() // UNIT: t.data_ptr() for t in tensors}
    held = tensors.pop(1)
    del tensors
    assert pool.take(UNIT, torch.uint8).data_ptr() == places[2]
    again = [pool.take(n * UNIT, torch.uint8) for n in (3, 1, 4)]
    assert [t.data_ptr() for t in again] == [places[3], places[2], places[4]]
    assert pool.nbytes == 10 * UNIT and held.data_ptr() == places[1]


def test_an_operation_that_returns_what_was_saved_does_not_see_it_change() -> None:
    pool = Pool()
    x = pool.take(POOLED, torch.float32).fill_(1).requires_grad_()
    y = x.view(4, -1).sum(0)  # autograd holds views too
    kept = y.detach()
    out = torch.broadcast_to(x.detach()[:1], (8,))
    del x, y
    pool.take(POOLED, torch.float32).fill_(9)
    assert (out == 1).all() and (kept == 4).all()


def test_only_large_tensors_of_this_thread_come_from_the_pool() -> None:
    pool, cpu = Pool(), torch.device("cpu")
    with pool.used():
        assert fresh(POOLED // 4 - 1, torch.float32, cpu).numel() and pool.nbytes == 0
        large = fresh(POOLED // 4, torch.float32, cpu)
        assert pool.nbytes == UNIT
        with Pool().used():
            fresh(POOLED, torch.float32, cpu)
        assert pool.nbytes == UNIT and large.numel() == POOLED // 4
    fresh(POOLED, torch.float32, cpu)
    assert pool.nbytes == UNIT
