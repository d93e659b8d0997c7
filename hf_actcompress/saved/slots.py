"""What autograd's graph holds in place of a saved tensor, and the memory that is decoded in backward."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..ops.memory import Pool
from .kept import Again, Exact, Layout

LOOKED_UP = 8  # decoded tensors that are looked up, should something still hold them


class Untouched:
    """The tensor itself: a parameter, or what is none of ours."""

    __slots__ = ("tensor", "version")

    def __init__(self, x: Tensor) -> None:
        # Not x, whose grad_fn would make a cycle of an output and the node that saved it.  But a parameter or a view
        # of one itself: its storage may be freed while it is sharded.
        self.tensor, self.version = x if is_parameter(x) else x.detach(), x._version

    def value(self) -> Tensor:
        x = self.tensor
        unchanged(x, self.version)
        if x.numel() and not x.untyped_storage().nbytes():
            raise RuntimeError(
                f"saved: backward needs a parameter of shape {tuple(x.shape)} whose memory was freed, as by FSDP "
                "after the forward pass. Shard that layer and the one that takes its output together, or with "
                "reshard_after_forward=False."
            )
        return x

    unpack = value


class Slot:
    """A tensor that is held itself until its operation is known, and then as the table says.

    tensor: without a graph; None once something else is held.
    node: the node that made it, and which of its results it is; made: those of the tensor that it is a view of, and
        that tensor's layout.  Only while it is not decided, else the graph would lead to itself.
    follows: whether it depends on what is trained.
    """

    __slots__ = (
        "__weakref__", "content", "decoded", "dtype", "follows", "layout", "made", "node", "shape", "tensor",
        "version", "wrap",
    )  # fmt: skip

    def __init__(self, x: Tensor, local: Tensor, decoded: Decoded, wrap: Callable[[Tensor], Tensor] | None) -> None:
        """x: as the operation has it.  local: its values here, another tensor than `x` where that is sharded."""
        self.decoded, self.tensor, self.version = decoded, local.detach(), local._version
        base = x if x._base is None else x._base
        self.node = None if x.grad_fn is None else (x.grad_fn, x.output_nr)
        known = base.grad_fn is not None and base.dtype == x.dtype and wrap is None
        self.made = (base.grad_fn, base.output_nr, Layout.of(base)) if known else None
        self.follows, self.wrap = x.requires_grad, wrap
        self.shape, self.dtype = tuple(local.shape), local.dtype
        self.content: Any = None
        self.layout: Layout | None = None

    def settle(self, content: Any, layout: Layout | None) -> None:
        """From now on `content` is what is held."""
        self.content, self.layout, self.node, self.made = content, layout, None, None
        if not isinstance(content, Exact):
            self.tensor = None

    def value(self) -> Tensor:
        """With the shape and the strides of the tensor."""
        if self.tensor is not None:
            unchanged(self.tensor, self.version)
            return self.tensor
        assert self.layout is not None
        return self.layout.restore(self.decoded.of(self.content))

    def unpack(self) -> Tensor:
        if self.tensor is None and torch.is_grad_enabled():
            raise RuntimeError(
                "saved= keeps what second derivatives need (create_graph=True) in codes, so they would be wrong. "
                "Compute them in a forward pass under `with handle.disabled():`."
            )
        x = self.value()
        return x if self.wrap is None else self.wrap(x)


def is_parameter(x: Tensor) -> bool:
    """Whether `x` is a parameter or a view of one."""
    return isinstance(x if x._base is None else x._base, nn.Parameter)


def unchanged(x: Tensor, version: int) -> None:
    """Like autograd, refuse a tensor that was changed in place since it was saved."""
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a saved "
            f"tensor of shape {tuple(x.shape)} is at version {x._version}, expected version {version}. Use the "
            "operation's version that is not in place, or clone its input first."
        )


def local_shard(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """The values of `x` here, and what makes of them a tensor like `x`, where that is a DTensor."""
    if type(x).__name__ != "DTensor" or isinstance(x, nn.Parameter):
        return x, None
    return x._local_tensor, partial(_sharded, type(x), x._spec)  # type: ignore[attr-defined]


def _sharded(kind: type, spec: Any, local: Tensor) -> Tensor:
    return kind(local, spec, requires_grad=False)


class Decoded:
    """Decodes what the slots of one pass hold.

    Neighbouring operations often saved the same tensor, so the last one of codes and the last one that was made again
    stay, and what an operation still uses is found again.

    again: whether a content may be looked up; not in a trial, where each backward pass rounds anew.
    """

    def __init__(self, again: bool = True) -> None:
        self.again, self.pool = again, Pool()
        self._known: list[tuple[weakref.ref, StorageWeakRef, tuple]] = []
        self._last: dict[bool, Tensor] = {}

    @staticmethod
    def revived(
        reference: StorageWeakRef, dtype: torch.dtype, device: torch.device, offset: int, n: int
    ) -> Tensor | None:
        """A flat tensor in that storage, if something still holds it."""
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        return None if storage is None else torch.empty(0, dtype=dtype, device=device).set_(storage, offset, (n,))

    def of(self, content: Any) -> Tensor:
        """The memory of a content, flat."""
        for known, storage, layout in self._known:
            if known() is content and (flat := self.revived(storage, *layout)) is not None:
                return flat
        with torch.no_grad(), self.pool.used(), _full_precision():
            flat = content.get()
        if self.again and flat.is_floating_point() and not isinstance(flat, nn.Parameter):
            layout = (flat.dtype, flat.device, flat.storage_offset(), flat.numel())
            reference = StorageWeakRef(flat.untyped_storage())
            self._known = [*self._known[1 - LOOKED_UP :], (weakref.ref(content), reference, layout)]
            if getattr(content, "shared", True):
                self._last[isinstance(content, Again)] = flat
        return flat


def _full_precision() -> contextlib.AbstractContextManager:
    """What is made again was not cast: a backward pass may run under autocast, where operations would be."""
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack
