"""Counts steps of one model without values: built once, then stepped in several methods and batch sizes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .counts import DEEP, SHALLOW, Count, Unlike, at, count_of
from .methods import Method
from .models import Subject, empty_of
from .step import Counted, count, prepare


@dataclass(frozen=True)
class Setting:
    """How the step is done.

    device: "cuda" counts what a GPU's kernels keep, "cpu" what a CPU's do; neither needs to be there.
    """

    optimizer: str = "adamw"
    autocast: bool = False
    device: str = "cuda"


class Session:
    """A model of a number of layers (None: all), whose tensors have no values."""

    def __init__(self, subject: Subject, setting: Setting, depth: int | None = None) -> None:
        self.subject, self.setting, self.depth = subject, setting, depth
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = subject.make(depth)
        self.layers = None if depth is None else _list_of(model, depth)
        with self._context():
            self.model = empty_of(model, "cpu")
            self.optimizer = prepare(self.model, setting.optimizer)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        with self.mode, _as_on_gpu(self.setting.device == "cuda"):
            yield

    def step(self, method: Method, rows: int, size: int) -> Counted:
        with self._context():
            batch = self.subject.batch(rows, size)
            on_cpu = self.setting.device == "cpu"
            return count(self.model, batch, method, self.optimizer, autocast=self.setting.autocast, on_cpu=on_cpu)

    def count(self, method: Method, rows: int, size: int) -> Count:
        return count_of(self.step(method, rows, size), self.layers, self.depth)


class Counter:
    """Counts of a model with all its layers; where they are alike, from models with three and four of them."""

    def __init__(self, subject: Subject, setting: Setting, *, whole: bool = False) -> None:
        self.subject, self.setting = subject, setting
        self._known: dict[tuple, Count] = {}
        self._whole: Session | None = None
        self.reduced = not whole and subject.depth is not None and subject.depth > DEEP + 1 and _alike(subject)
        self.sessions = [Session(subject, setting, depth) for depth in (SHALLOW, DEEP)] if self.reduced else []

    @property
    def whole(self) -> Session:
        if self._whole is None:
            self._whole = Session(self.subject, self.setting)
        return self._whole

    def __call__(self, name: str, method: Method, rows: int, size: int) -> Count:
        key = name, rows, size
        if key not in self._known:
            self._known[key] = self._count(method, rows, size)
        return self._known[key]

    def _count(self, method: Method, rows: int, size: int) -> Count:
        if self.reduced:
            counts = [session.count(method, rows, size) for session in self.sessions]
            try:
                return at((SHALLOW, DEEP), counts, self.subject.depth)
            except Unlike:  # something besides the layers depends on their number
                self.reduced, self.sessions = False, []
                self._known.clear()
        return self.whole.count(method, rows, size)


def _list_of(model: nn.Module, depth: int) -> str:
    """The path of the list that holds the layers."""
    return next(name for name, module in model.named_modules()
                if isinstance(module, nn.ModuleList) and len(module) == depth)  # fmt: skip


def _alike(subject: Subject) -> bool:
    """Whether all layers have the same class and parameters of the same shapes, and their number can be chosen."""
    model = subject.make(None)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == subject.depth]
    if len(lists) != 1:
        return False
    looks = {(type(layer), tuple((name, p.shape, p.requires_grad) for name, p in layer.named_parameters()))
             for layer in lists[0]}  # fmt: skip
    few = [m for m in subject.make(SHALLOW).modules() if isinstance(m, nn.ModuleList) and len(m) == SHALLOW]
    return len(looks) == 1 and len(few) == 1


@contextlib.contextmanager
def _as_on_gpu(yes: bool) -> Iterator[None]:
    """Dropout keeps a mask of bools, and fused attention draws its own, as kernels of a GPU do.  On a CPU dropout
    keeps numbers, and attention with dropout all its weights."""
    if not yes:
        yield
        return
    functions = nn.functional
    attention, dropout = functions.scaled_dot_product_attention, functions.dropout

    @functools.wraps(attention)
    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any):  # noqa: ANN202
        return attention(query, key, value, attn_mask, 0.0, **more)

    @functools.wraps(dropout)
    def masked(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):  # noqa: ANN202
        return torch.native_dropout(input, p, training)[0] if training and p else input

    functions.scaled_dot_product_attention, functions.dropout = fused, masked
    try:
        yield
    finally:
        functions.scaled_dot_product_attention, functions.dropout = attention, dropout
