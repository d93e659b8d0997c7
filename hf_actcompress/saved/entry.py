"""Runs a model's forward pass inside a pass of its saved tensors.

The model's class becomes a subclass of it under the same name, whose call opens the pass and closes it again whatever
is raised.  Hooks could not do that: those for the end of a call run after an Exception, not after a KeyboardInterrupt.
A copy or a pickle of the model is one of its own class and carries no compression.
"""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch import nn

from .tensors import SavedTensors


def _uncompiled(function: Any) -> Any:
    """The function itself is not compiled by torch.compile; what it calls is."""
    frames = torch._C._dynamo.eval_frame
    action = frames._FrameAction
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(action.SKIP, action.DEFAULT))
    return function


def _new(cls: type, *args: Any) -> Any:
    return cls.__new__(cls, *args)


class _Entered:
    """Marks the classes of this file."""


def _entered(cls: type, site: SavedTensors) -> type:
    call, inner = cls.__call__, cls._call_impl

    @_uncompiled
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return run(call, self, args, kwargs)

    @_uncompiled
    def _call_impl(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(inner, self, args, kwargs)

    @_uncompiled
    def run(function: Any, self: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():  # inlined into a larger graph, around which a pass is open or is not
            return function(self, *args, **kwargs)
        outputs: list[Any] = []
        compiler = torch._C._dynamo.eval_frame.set_eval_frame
        before = compiler(None)  # what the site does is not to be compiled
        try:
            if not site.active:
                for hook in site.first:
                    hook(self, args, kwargs)
            context = site.running(outputs)
            context.__enter__()
        finally:
            compiler(before)
        try:
            result = function(self, *args, **kwargs)
            outputs.append(result)
            return result
        finally:
            before = compiler(None)
            try:
                context.__exit__(None, None, None)
            finally:
                compiler(before)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:  # noqa: N807
        function, arguments, *rest = super(kind, self).__reduce_ex__(protocol)
        plain = tuple(cls if a is kind else a for a in arguments)
        # pickle compares the class of the object with that of copyreg.__newobj__, which is another one here
        return (_new if function is copyreg.__newobj__ else function), plain, *rest  # type: ignore[attr-defined]

    names = {"__call__": __call__, "_call_impl": _call_impl, "__reduce_ex__": __reduce_ex__,
             "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}  # fmt: skip
    kind = type(cls)(cls.__name__, (_Entered, cls), names)
    kind._saved_site = site
    return kind


class Entry:
    """Opens a pass of `site` around every call of `model`, until `remove`."""

    def __init__(self, model: nn.Module, site: SavedTensors) -> None:
        self.model, self.site, self.before = model, site, type(model)
        self.kind = model.__class__ = _entered(type(model), site)

    def remove(self) -> None:
        self.site.unused()
        self.site.enabled = False
        if type(self.model) is self.kind:  # else another class was put on top, as by fully_shard
            self.model.__class__ = self.before


def site_of(model: nn.Module) -> SavedTensors | None:
    """The site whose passes a model's calls open, if there is one."""
    site = getattr(type(model), "_saved_site", None)
    return site if site is not None and site.enabled else None


def release(model: nn.Module) -> bool:
    """Take it off a model whose handle is lost; returns whether there was one."""
    site = site_of(model)
    if site is None:
        return False
    site.enabled = False
    if issubclass(type(model), _Entered) and type(model).__mro__[1] is _Entered:
        model.__class__ = type(model).__mro__[2]
    return True
