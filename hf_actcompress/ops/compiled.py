"""Pure tensor functions that run compiled where that pays, and eager elsewhere, with the same bits.

(On a GPU the compiler fuses multiplications with additions: a few values then fall on the other side of a rounding
step.)

`torch.compile` makes C++ of them on a CPU and Triton on a GPU.  A compilation takes seconds, so by default one starts
only when its function has seen so many elements that it has cost about as much: a short run never waits for a
compiler, a long one loses little, and the same run always compiles at the same call.
The environment variable HF_ACTCOMPRESS_COMPILE says otherwise: 0 never compiles, 1 compiles at the first call.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .memory import is_out_of_memory

logger = logging.getLogger(__name__)

VARIABLE = "HF_ACTCOMPRESS_COMPILE"
SMALLEST = 1 << 16  # elements; below, the eager function takes about as long as a call of a compiled one
PATIENCE = 1 << 30  # elements a function has to have seen before it is compiled: about the eight seconds of compiling

# Chains of more than 30 operations would be cut into passes over memory, with whole tensors of scratch in between.
OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 10_000, "realize_reads_threshold": 1_000}

_said: set[str] = set()


def policy() -> str:
    """ "0", "1" or "auto", from the environment.  Raises ValueError for anything else."""
    value = os.environ.get(VARIABLE, "auto").strip().lower()
    if value not in ("0", "1", "auto"):
        raise ValueError(
            f"{VARIABLE}={value!r} is not known: 0 never compiles codecs, 1 compiles them at their first call, auto "
            "(or nothing) compiles them once they have cost more than compiling would."
        )
    return value


def compiler_for(device_type: str) -> str | None:
    """What would compile for such a device, or None.  Does not import the compiler."""
    if device_type == "cpu":
        names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
        return next((path for path in map(shutil.which, names) if path), None)
    return "triton" if importlib.util.find_spec("triton") else None


class _Variant:
    """One function with one set of static arguments."""

    def __init__(self) -> None:
        self.elements = 0
        self.compiled: Callable[..., Any] | None = None
        self.failed = False


class Kernel:
    """A pure function of tensors (and Nones) with static keyword arguments.

    fn must give the same bits compiled and eager: elementwise arithmetic, minima and maxima do, sums of floats do not
    (their order differs).  Sizes of dimension 0 and 1 of every tensor may change without a new compilation.
    smallest: below so many elements of its largest tensor it runs eager.
    weight: how many times the work of quantizing a value it does for each element.
    """

    def __init__(self, fn: Callable[..., Any], smallest: int = SMALLEST, weight: int = 1) -> None:
        self.fn, self.smallest, self.weight = fn, smallest, weight
        self.variants: dict[Any, _Variant] = {}
        self.__doc__ = fn.__doc__

    def __call__(self, *args: Tensor | None, **static: Any) -> Any:
        """Eager, whatever the environment says."""
        return self.fn(*args, **static)

    def choose(self, x: Tensor, *tag: Any, **static: Any) -> Callable[..., Any] | None:
        """The compiled function for calls whose largest tensor is like `x`, or None where eager is to run.

        tag: what else makes a variant (whether optional tensors are given).
        """
        chosen = policy()
        if chosen == "0" or x.numel() < self.smallest and chosen != "1" or torch.compiler.is_compiling():
            return None
        variant = self._variant(x, tag, static)
        if variant.failed:
            return None
        if chosen == "auto" and variant.compiled is None and variant.elements < PATIENCE:
            variant.elements += x.numel() * self.weight
            return None
        if variant.compiled is None:
            found = compiler_for(x.device.type)
            if found is None:
                variant.failed = True
                _say(x.device.type, f"no compiler for {x.device.type} was found: codecs run eager")
                return None
            _say(x.device.type, f"codecs for {x.device.type} are compiled ({found}); {VARIABLE}=0 turns that off")
            variant.compiled = self._compile(variant, static)
        return variant.compiled

    def _variant(self, x: Tensor, tag: tuple, static: dict[str, Any]) -> _Variant:
        key = (x.device.type, x.dtype, tag, tuple(static.items()))
        variant = self.variants.get(key)
        if variant is None:
            variant = self.variants.setdefault(key, _Variant())
        return variant

    def _compile(self, variant: _Variant, static: dict[str, Any]) -> Callable[..., Any]:
        # Dynamo counts recompilations per code object and gives up after eight: every variant gets its own.
        code = self.fn.__code__.replace(co_name=f"{self.fn.__name__}_{len(self.variants)}")
        own = types.FunctionType(code, self.fn.__globals__, code.co_name, self.fn.__defaults__, self.fn.__closure__)
        own.__kwdefaults__ = self.fn.__kwdefaults__
        compiled = torch.compile(own, fullgraph=True, options=OPTIONS)
        marked: set[tuple[bool, ...]] = set()

        def run(*args: Tensor | None) -> Any:
            if variant.failed:
                return self.fn(*args, **static)
            # The last dimension is a constant, the others (N and K of a grid) are any numbers; 0 and 1 are special to
            # the compiler.  Marks are needed where it compiles and cost a third of a call elsewhere.
            dynamic = tuple(size > 1 for arg in args if arg is not None for size in arg.shape[:-1])
            if dynamic not in marked:
                for arg in args:
                    for dim in range(0 if arg is None else arg.dim() - 1):
                        if arg.shape[dim] > 1:
                            torch._dynamo.mark_dynamic(arg, dim)
                marked.add(dynamic)
            try:
                with torch.no_grad():
                    return compiled(*args, **static)
            except Exception as error:  # whatever the compiler raises, the eager function has the same result
                if is_out_of_memory(error):
                    raise
                variant.failed = True
                logger.warning("%s could not be compiled and runs eager: %s", self.fn.__name__, error)
                return self.fn(*args, **static)

        return run


def _say(device: str, text: str) -> None:
    if device not in _said:
        _said.add(device)
        logger.info(text)
