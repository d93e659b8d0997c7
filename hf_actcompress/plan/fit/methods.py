"""Ways to train in less memory, each as a context around a model's steps."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._mode_utils import no_dispatch

from ...codecs import parse_codec
from ...ops.memory import POOLED, UNIT, Pool
from ...saved.entry import Entry
from ...saved.kept import Flags, flatten
from ...saved.rules import Bits
from ...saved.slots import Decoded
from ...saved.tensors import SavedTensors, pack, unpack
from .tracker import Storage, Tracker

Method = Callable[[nn.Module, Tracker], Any]


class CountedPool(Pool):
    """What a pool (ops/memory.py) would take, for tensors without values: the same pieces, counted."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.pieces: list[tuple[int, int, StorageWeakRef]] = []  # (bytes, number, what lies in it)
        weakref.finalize(self, _drop_all, tracker, self.pieces)

    def take(self, n: int, dtype: torch.dtype) -> Tensor:
        x = torch.empty(n, dtype=dtype)
        self.adopt(x)
        return x

    def adopt(self, x: Tensor) -> None:
        storage, number = x.untyped_storage(), self.tracker.number_of(x)
        size = storage.nbytes()
        if number is None or size < POOLED or not self.tracker.on_cpu:
            return
        self.tracker.drop(number)
        free = sorted((piece for piece in self.pieces if piece[2].expired()), key=lambda piece: piece[0])
        fitting = next((piece for piece in free if piece[0] >= size), None)
        old = fitting or (free[-1] if free else None)
        if old is not None:
            self.pieces.remove(old)
        if fitting is None:
            size = -(-size // UNIT) * UNIT
            if old is not None:
                self.tracker.drop(old[1])
            number = self.tracker.add(Storage(size, "activations", "", "decoded", tuple(x.shape)))
        else:
            size, number, _ = fitting
        self.pieces.append((size, number, StorageWeakRef(storage)))

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        before, self.tracker.pooled = self.tracker.pooled, self.adopt
        try:
            with super().used():
                yield
        finally:
            self.tracker.pooled = before


def _drop_all(tracker: Tracker, pieces: list[tuple[int, int, Any]]) -> None:
    for _, number, _ in pieces:
        tracker.drop(number)


class CountedDecoded(Decoded):
    """Decodes tensors without values."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self.pool = CountedPool(tracker)

    @staticmethod
    def revived(reference: Any, dtype: torch.dtype, device: torch.device, offset: int, n: int) -> Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        if storage is None:
            return None
        mode = detect_fake_mode()
        assert mode is not None
        with no_dispatch():  # set_ under FakeTensorMode would keep the storage
            meta = torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, (n,))
            return FakeTensor(mode, meta, device)


class CountedSaved(SavedTensors):
    """Saved tensors without values: what would be looked at in their values is known from how they were made."""

    tracker: Tracker

    def _hooks(self) -> tuple[Any, Any]:
        return pack, unpack  # nothing is compiled

    def decoded(self) -> Decoded:
        return super().decoded() if detect_fake_mode() is None else CountedDecoded(self.tracker)

    def takes(self, local: Tensor) -> bool:
        return type(local) is FakeTensor or super().takes(local)

    def two_values(self, x: Tensor) -> Flags | None:
        if not isinstance(x, FakeTensor):
            return super().two_values(x)
        if self.tracker.number_of(x) not in self.tracker.random:
            return None
        return Flags.of(flatten(x)[0], Bits(0.0, None, 0.0, 1.0), exact=True)

    def narrowest(self, x: Tensor) -> torch.dtype | None:
        """Of the indices of pooling what holds a place in a plane of twice the height and width."""
        if not isinstance(x, FakeTensor):
            return super().narrowest(x)
        places = 4 * x.shape[-1] * x.shape[-2] if x.dim() == 4 else 2**16
        found = torch.uint8 if places <= 2**8 else torch.int16 if places <= 2**15 else torch.int32
        return found if found.itemsize < x.dtype.itemsize else None


@contextlib.contextmanager
def none(model: nn.Module, tracker: Tracker) -> Iterator[None]:
    yield


def saved(spec: str) -> Method:
    @contextlib.contextmanager
    def method(model: nn.Module, tracker: Tracker) -> Iterator[Any]:
        site = CountedSaved(model, parse_codec(spec))
        site.tracker = tracker
        entry = Entry(model, site)
        try:
            yield site
        finally:
            entry.remove()

    return method


@contextlib.contextmanager
def checkpointing(model: nn.Module, tracker: Tracker) -> Iterator[None]:
    """As the Trainer's `gradient_checkpointing=True`, or timm's `set_grad_checkpointing()`."""
    before = [m for m in model.modules() if hasattr(m, "set_grad_checkpointing")]
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif before:
        before[0].set_grad_checkpointing(True)
    else:
        raise ValueError(f"{type(model).__name__} has no gradient checkpointing.")
    try:
        yield
    finally:
        if hasattr(model, "gradient_checkpointing_disable"):
            model.gradient_checkpointing_disable()
        else:
            before[0].set_grad_checkpointing(False)


def both(spec: str) -> Method:
    @contextlib.contextmanager
    def method(model: nn.Module, tracker: Tracker) -> Iterator[None]:
        with checkpointing(model, tracker), saved(spec)(model, tracker):
            yield

    return method


@contextlib.contextmanager
def offload(model: nn.Module, tracker: Tracker) -> Iterator[None]:
    """As torch's `save_on_cpu`, which moves nothing on a CPU."""
    if tracker.on_cpu or detect_fake_mode() is None:
        hooks: Any = torch.autograd.graph.save_on_cpu()
    else:
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: x.to("meta"), lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        )
    with hooks:
        yield


@dataclass(frozen=True)
class Plan:
    """A method, and what there is to write for it.

    bits: of saved tensors, where the count follows from those of others; 0: chosen by a budget.
    budget: torch's activation_memory_budget, of a compiled model.
    """

    method: Method
    spec: str | None = None
    bits: int | None = None
    checkpointing: bool = False
    offload: bool = False
    budget: float | None = None


METHODS: dict[str, Plan] = {
    "none": Plan(none),
    "saved 8": Plan(saved("block:bits=8"), "block:bits=8"),
    "saved 4": Plan(saved("block:bits=4"), "block:bits=4"),
    "saved 2": Plan(saved("block:bits=2"), "block:bits=2", bits=2),
    "saved auto": Plan(saved("block:bits=4"), "auto:budget=0.1", bits=0),
    "checkpointing": Plan(checkpointing, checkpointing=True),
    "checkpointing + saved 4": Plan(both("block:bits=4"), "block:bits=4", checkpointing=True),
    "offload": Plan(offload, offload=True),
}
