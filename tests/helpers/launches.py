"""Counts what a GPU would be given to do, without a GPU, and refuses what would wait for one.

Code runs eagerly on tensors without values (FakeTensorMode) whose device says "cuda"; a dispatch mode sees each
operation that would start a kernel.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_actcompress.ops.library import FORMS

# Kernels of our operators' Triton forms; all that is not named here has one.
KERNELS = {"select_largest": 7, "keep_largest": 7, "place_values": 3}
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "device")


class Waits(AssertionError):
    """A value was read back, or copied from the host."""


class Launches(TorchDispatchMode):
    """The names of operations that start kernels, in order."""

    def __init__(self, plain=False, first=False):
        super().__init__()
        self.names, self.plain, self.first = [], plain, first

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        if self.plain and space == "actcompress":
            with self:
                return FORMS[name]["reference"](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        # A number on the host is handed to a kernel as it is, unless it is to be copied.
        devices = {t.device.type for t in tensors if t.dim() or name in ("_to_copy", "copy_")}
        if devices == {"cpu", "cuda"} and not self.first:
            raise Waits(f"{func} copies between the host and the device")
        if any(t.device.type == "cuda" for t in tensors):
            if space == "actcompress":
                self.names += [name] * KERNELS.get(name, 1)
            elif name not in NO_KERNEL and not _is_view(func):
                self.names.append(name)
        return result


def _is_view(func):
    infos = [r.alias_info for r in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


@contextlib.contextmanager
def no_values():
    """New tensors have no values; those of "cuda" need no GPU.  Reading one raises DataDependentOutputException."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@contextlib.contextmanager
def launches(plain=False, first=False):
    """A list that gets the name of each kernel that is started while the context lasts.

    plain: our operators are computed in plain torch, as without Triton.
    first: constants that are kept may still be copied from the host.
    """
    mode = Launches(plain, first)
    with mode:
        yield mode.names


@torch.no_grad()
def backward(loss):
    """`loss.backward()` node by node: autograd's engine asks for a GPU's streams, which are not there."""
    waiting, nodes = {}, [loss.grad_fn]
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is not None:
                if node not in waiting:
                    nodes.append(node)
                waiting[node] = waiting.get(node, 0) + 1
    gradients, ready = {loss.grad_fn: {loss.output_nr: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        own = gradients.pop(node, None)
        call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
        found = None if own is None else call(*(own.get(i) for i in range(len(node._input_metadata))))
        found = found if isinstance(found, tuple) else (found,) * len(node.next_functions)
        for (following, place), gradient in zip(node.next_functions, found, strict=False):
            if following is None:
                continue
            if gradient is not None:
                shape = following._input_metadata[place].shape
                gradient = gradient if gradient.shape == shape else gradient.sum_to_size(shape)
                before = gradients.setdefault(following, {})
                before[place] = gradient if place not in before else before[place] + gradient
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
