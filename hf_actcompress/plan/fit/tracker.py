"""Counts the bytes of the tensors that are alive, at every operation of a training step.

Every storage that an operation makes is counted until it is freed, whoever holds it: autograd, a module, a local
variable.  It makes no difference whether tensors have values, so a step under FakeTensorMode counts a model that would
not fit.  What a kernel allocates for itself while it runs is not seen.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"


class Event(NamedTuple):
    """An operation that made a storage."""

    phase: str  # of the step
    module: str  # whose forward or backward it belongs to; "" outside of all
    operation: str
    live: int  # bytes with what it made


class Storage(NamedTuple):
    """One storage, from the event that made it to the one before which it was freed (or None)."""

    nbytes: int
    kind: str  # "parameters", "gradients", "optimizer", "batch" or "activations"
    module: str
    operation: str
    shape: tuple[int, ...]


class Tracker(TorchDispatchMode):
    """A dispatch mode that counts the storages of one device.

    device: its type; what lies elsewhere (offloaded tensors) is not counted.
    on_cpu: whether to count what a CPU takes besides: copies within kernels, and the pool that is decoded into.
    """

    def __init__(self, device: str, on_cpu: bool = False) -> None:
        super().__init__()
        self.device, self.on_cpu, self.phase = device, on_cpu, FORWARD
        self.live = 0
        self.pooled: Callable[[Tensor], None] | None = None  # takes what our operators make over into a pool
        self.events: list[Event] = []
        self.log: list[tuple[int, int, bool]] = []  # (events so far, storage, whether it was made)
        self.storages: dict[int, Storage] = {}
        self.random: set[int] = set()  # storages that a draw of zeros and ones has filled
        self.flops: Counter[str] = Counter()  # by kind of operation: "dense", "codec"
        self.moved: Counter[str] = Counter()  # bytes that operations read and write, likewise
        # By address, the number of a storage that lives.  Not Python's weak references to storages: those see the
        # end late where another weak reference of torch is left.
        self._known: dict[int, tuple[int, StorageWeakRef]] = {}
        self._always: dict[int, tuple[int, StorageWeakRef]] = {}  # of parameters and the like
        self._stack: list[str] = []
        self._marks: list[tuple[int, str]] = []  # (the first autograd node, the module it belongs to)
        self._next, self._alive = 0, set()

    # -- storages ---------------------------------------------------------------------------------------------
    def watch(self, tensors: Iterable[Tensor], kind: str) -> int:
        """Count what is there already, and stays; returns its bytes."""
        found = sum(self._see(t, "", "", kind) for t in tensors)
        self._always.update(self._known)
        self._known.clear()
        return found

    def number_of(self, x: Tensor) -> int | None:
        key = x.untyped_storage()._cdata
        known = self._always.get(key) or self._known.get(key)
        return None if known is None or known[1].expired() else known[0]

    def sweep(self) -> int:
        """Bytes that are alive now."""
        gone = [key for key, (_, reference) in self._known.items() if reference.expired()]
        for key in gone:
            self.drop(self._known.pop(key)[0])
        return self.live

    def _is_new(self, x: Tensor) -> bool:
        key = x.untyped_storage()._cdata
        return key not in self._known and key not in self._always

    def _see(self, x: Tensor, module: str, operation: str, kind: str = "activations") -> int:
        """Bytes of a storage that was not counted yet, else 0."""
        if x.layout != torch.strided or x.device.type != self.device:
            return 0
        for part in _parts(x):
            storage = part.untyped_storage()
            if storage._cdata in self._known or storage._cdata in self._always:
                return 0
            number = self.add(Storage(storage.nbytes(), kind, module, operation, tuple(x.shape)))
            self._known[storage._cdata] = number, StorageWeakRef(storage)
            return storage.nbytes()
        return 0

    def add(self, storage: Storage) -> int:
        """Count one more; returns its number."""
        number = self._next
        self._next += 1
        self.storages[number] = storage
        self._alive.add(number)
        self.log.append((len(self.events), number, True))
        self.live += storage.nbytes
        return number

    def drop(self, number: int) -> None:
        """It was freed.  Doing so again does nothing."""
        if number in self._alive:
            self._alive.discard(number)
            self.live -= self.storages[number].nbytes
            self.log.append((len(self.events), number, False))

    # -- operations -------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_view(func):
            return result
        if isinstance(result, Tensor):
            outputs = [result]
        else:
            outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if any(self._is_new(x) for x in outputs):
            self._allocated(func, args, outputs)
        self._cost(func, args, kwargs or {}, result, outputs)
        return result

    def _allocated(self, func: Any, args: Any, outputs: list[Tensor]) -> None:
        module, name, before = self.module(), func.name(), self.sweep()
        for x in outputs:
            if self._see(x, module, name) and func.namespace == "actcompress" and self.pooled is not None:
                self.pooled(x)
        inside = INSIDE.get(func._overloadpacket) if self.on_cpu else None
        most = self.live if inside is None else max(self.live, before + inside(args, outputs))
        self.events.append(Event(self.phase, module, name, most))

    def _cost(self, func: Any, args: Any, kwargs: Any, result: Any, outputs: list[Tensor]) -> None:
        packet = func._overloadpacket
        kind = "codec" if func.namespace == "actcompress" else "dense"
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        count = FLOPS.get(packet)
        if count is not None:
            self.flops[kind] += count(*args, **kwargs, out_val=result)
        if packet in DRAWS:
            self.random.update(n for x in outputs if (n := self.number_of(x)) is not None)
        if packet not in NO_WORK:
            self.moved[kind] += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))

    # -- whose operation it is --------------------------------------------------------------------------------
    def module(self) -> str:
        """The innermost module that runs, or whose backward runs."""
        if self._stack:
            return self._stack[-1]
        node = torch._C._current_autograd_node()
        if node is None or not self._marks:
            return ""
        place = bisect_right(self._marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1
        return self._marks[place][1] if place >= 0 else ""

    def _mark(self) -> None:
        self._marks.append((torch.autograd._get_sequence_nr(), self._stack[-1] if self._stack else ""))

    @contextmanager
    def modules_of(self, model: nn.Module) -> Iterator[None]:
        """While this lasts, operations are known by the modules of `model`."""
        removers = []

        def enter(name: str) -> Any:
            def hook(module: nn.Module, args: Any) -> None:
                self._stack.append(name)
                self._mark()

            return hook

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            self._stack.pop()
            self._mark()

        for name, module in model.named_modules():
            if name:
                removers.append(module.register_forward_pre_hook(enter(name), prepend=True))
                removers.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for remover in removers:
                remover.remove()

    # -- what was found ---------------------------------------------------------------------------------------
    def alive_at(self, event: int) -> list[Storage]:
        """The storages that were alive when an event had made its own."""
        alive: dict[int, Storage] = {}
        for before, number, made in self.log:
            if before > event:
                break
            if made:
                alive[number] = self.storages[number]
            else:
                alive.pop(number, None)
        return list(alive.values())


def _parts(x: Tensor) -> list[Tensor]:
    """The local tensor of a DTensor; else itself."""
    return [x._local_tensor] if type(x).__name__ == "DTensor" else [x]  # type: ignore[attr-defined]


@functools.cache
def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _convolution(args: Any, made: list[Tensor]) -> int:
    """Bytes at most of results and of what oneDNN copies into layouts of its own, of which the copy of the result is
    converted back while it exists."""
    x, w, y = args[0].nbytes, args[1].nbytes, made[0].nbytes
    return max(x + w + y, 2 * y)


def _convolution_backward(args: Any, made: list[Tensor]) -> int:
    """The gradient of the input first, that of the weight after it."""
    gy, x, w, (needs_x, needs_w, _) = args[0].nbytes, args[1].nbytes, args[2].nbytes, args[-1]
    gx = x if needs_x else 0
    return max(gy + w + gx if needs_x else 0, 2 * gx, gx + max(x + gy + w, 2 * w) if needs_w else 0)


def _batch_norm_backward(args: Any, made: list[Tensor]) -> int:
    grad, x = args[0], args[1]
    formats = [torch.contiguous_format, *[torch.channels_last] * (x.dim() == 4)]
    alike = any(grad.is_contiguous(memory_format=f) and x.is_contiguous(memory_format=f) for f in formats)
    return (2 if alike else 1) * x.nbytes


def _flash_backward(args: Any, made: list[Tensor]) -> int:
    return sum(x.nbytes for x in made) + args[0].nbytes


def _matrix_product(second: int) -> Callable[[Any, list[Tensor]], int]:
    """In fewer bits oneDNN has the second matrix in a layout of its own."""
    return lambda args, made: made[0].nbytes + (args[second].nbytes if made[0].dtype != torch.float32 else 0)


aten = torch.ops.aten
# Of kernels on a CPU that allocate more than their results: bytes of both at most, by arguments and results.
INSIDE = {
    aten.convolution: _convolution, aten.convolution_backward: _convolution_backward,
    aten.native_batch_norm_backward: _batch_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
    aten.mm: _matrix_product(1), aten.addmm: _matrix_product(2),
}  # fmt: skip
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
DRAWS = {aten.bernoulli_, aten.bernoulli}
NO_WORK = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
