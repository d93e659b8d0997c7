"""Tensors that autograd saves for the backward pass, kept compressed between forward and backward.

Forward values stay exact; gradients are computed from what is decoded.  The operation that saved a tensor decides what
may be rounded (rules.py), one pass at a time (passes.py); what a cheap operation makes of a kept tensor is made again.
Sources: ActNN (Chen et al., 2021), GACT (Liu et al., 2022), Mesa (Pan et al., 2021).
This file knows codecs and autograd's hooks, not trainers.  Who counts or measures is a listener (observe/events.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec, raw_nbytes
from ..observe.events import Event, Listener
from ..observe.nonfinite import Nonfinite, check
from . import kept
from .masks import pack_two_values
from .passes import Pass
from .slots import Decoded, Untouched
from .weights import Weights

logger = logging.getLogger(__name__)

_running = threading.local()  # .passes: the passes of this thread, the innermost last


def _passes() -> list[Pass]:
    if not hasattr(_running, "passes"):
        _running.passes = []
    return _running.passes


def pack(x: Tensor) -> Any:
    """What autograd holds in place of `x`."""
    passes = _passes()
    return passes[-1].pack(x) if passes else Untouched(x)


def unpack(packed: Any) -> Tensor:
    passes = _passes()
    return passes[-1].unpack(packed) if passes else packed.unpack()


class SavedTensors:
    """Packs and unpacks the saved tensors of one model.

    model: whose passes are compressed.
    codec: for floating point activations.
    bits: of each tensor by name, for a codec whose bits a budget chooses (budget.py).
    seed: of stochastic rounding.
    nonfinite: what happens where NaN or Inf is in a tensor, of which its group becomes NaN (codecs/base.py): "pass"
        counts it; "raise" also raises FloatingPointError, at once on a CPU, elsewhere at the next forward pass.
    """

    def __init__(
        self, model: nn.Module, codec: Codec, bits: Mapping[str, int] | None = None, *, seed: int = 0,
        nonfinite: str = "pass",
    ) -> None:  # fmt: skip
        self.model, self.codec, self.bits = model, codec, bits
        self.found = Nonfinite("saved", nonfinite == "raise")
        self.state = self.codec.init_state("saved", seed)
        self.enabled = True
        self.listeners: list[Listener] = []
        self.trial: Any = None
        self.first: list[Any] = []  # called with model, args and kwargs before a pass begins
        self.rows: list[dict[str, Any]] = []  # of the last pass
        self._said: set[str] = set()
        self._entered = 0
        module = sys.modules.get(f"{__package__}.compiled")
        self._graphs = 0 if module is None else len(module.graphs_of(self.codec))  # that were compiled before

    # -- measurements -------------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def isolated(self, *listeners: Listener) -> Iterator[None]:
        """While the context lasts, codecs work on a copy of their state, and only these listeners are told."""
        before = self.state, self.listeners, self.found
        self.state, self.listeners = None if self.state is None else self.state.snapshot(), list(listeners)
        self.found = Nonfinite("saved")
        try:
            yield
        finally:
            self.state, self.listeners, self.found = before

    @contextlib.contextmanager
    def trying(self, trial: Any) -> Iterator[None]:
        """While the context lasts, `trial` (sensitivity.py) keeps the tensors that a codec would take, and is the only
        listener.  The site is enabled."""
        before = self.listeners, self.enabled, self.found
        self.listeners, self.enabled, self.trial, self.found = [trial], True, trial, trial.found
        try:
            yield
        finally:
            self.listeners, self.enabled, self.found = before
            self.trial = None

    # -- around a forward pass ----------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        """Whether a pass of this site runs in this thread."""
        return any(one.site is self for one in _passes())

    @contextlib.contextmanager
    def running(self, outputs: list[Any]) -> Iterator[None]:
        """A pass: what autograd saves in this thread while the context lasts is compressed.

        outputs: to which the caller adds what the pass returns.
        """
        if not self.enabled or not torch.is_grad_enabled() or self.active:
            yield
            return
        check([self.found])
        current = Pass(self, Weights(self.model))
        self.tell("", calls=1)
        hooks, before = self._hooks(), self._compiled()
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
        _passes().append(current)
        try:
            yield
        finally:
            found = [] if not outputs else list(_tensors(outputs))
            try:
                current.finish(found)
            finally:
                _passes().pop()
                torch._C._autograd._pop_saved_tensors_default_hooks()
                self._entered += 1
                self._note(current, before)

    def _hooks(self) -> tuple[Any, Any]:
        """Functions; or, where torch.compile may meet them, GraphModules that call them or are inlined."""
        if self.bits is None and self.trial is None and "torch._dynamo" in sys.modules:
            from . import compiled

            with contextlib.suppress(ValueError):  # a codec that cannot be used there; in eager mode it can
                return compiled.graph_hooks(self.codec, pack, unpack, self.state)
        return pack, unpack

    def _compiled(self) -> tuple[int, int]:
        """Bytes so far that compiled graphs would have held, and bytes that they held."""
        module = sys.modules.get(f"{__package__}.compiled")
        total = None if module is None else module.totals(self.codec)
        return (0, 0) if total is None else (total.raw, total.held)

    def _note(self, done: Pass, before: tuple[int, int]) -> None:
        raw, held = (now - then for now, then in zip(self._compiled(), before, strict=True))
        if raw:
            from . import compiled

            self.tell("compiled graphs", raw, held)
            done.report.update(compiled.report(self.codec, self._graphs, raw, held))
        self.rows = [
            {"operation": operation, "kept": how, "tensors": n, "raw_bytes": raw, "held_bytes": held}
            for (operation, how), (n, raw, held) in sorted(done.report.items(), key=lambda row: -row[1][2])
        ]
        if done.passed_by and self.trial is None:
            self._say(
                "past",
                f"saved: {done.passed_by} operations of this model saved their tensors past this site, as under "
                "activation checkpointing, which runs them again instead: there is nothing to compress there. Use "
                "one of the two, or checkpoint fewer layers.",
            )
        elif not done.handled and not raw and self.trial is None:
            self._say("none", "saved: a forward pass with gradients saved nothing, so nothing was compressed.")

    def unused(self) -> None:
        """To be called when the site is taken off: says so if no pass was ever compressed."""
        if not self._entered and self.enabled:
            self._say(
                "unused",
                "saved: no forward pass of the model was run with gradients while compression was attached, so "
                "nothing was compressed. If another method of the model is what you run, or the loss is computed "
                "outside of it, run that under `with handle.saving():`.",
                warn=True,
            )

    def _say(self, key: str, text: str, warn: bool = False) -> None:
        if key in self._said:
            return
        self._said.add(key)
        if warn:
            import warnings

            warnings.warn(text, stacklevel=4)
        else:
            logger.warning(text)

    # -- what a pass asks ---------------------------------------------------------------------------------------
    @property
    def smallest(self) -> int:
        return kept.SMALLEST

    def decoded(self) -> Decoded:
        """What decodes for a pass."""
        return Decoded(again=self.trial is None)

    def takes(self, local: Tensor) -> bool:
        """Whether it is a tensor with values that lie at their strides; subclasses keep what is theirs."""
        return type(local) is Tensor and local.layout == torch.strided and local.device.type != "meta"

    def two_values(self, x: Tensor) -> kept.Flags | None:
        """A mask in one bit a value, if `x` is one.  This one and the next look at values."""
        run, _, _ = kept.flatten(x)
        found = pack_two_values(run)
        return None if found is None else kept.Flags(found[0], run.numel(), *found[1:], x.dtype, exact=True)

    def narrowest(self, x: Tensor) -> torch.dtype | None:
        return kept.narrowest(x)

    def gains(self, run: Tensor) -> bool:
        """Whether the codec takes such a tensor, and saves bytes."""
        codec = self.trial.codec if self.trial is not None else self.codec
        try:
            return codec.payload_nbytes(tuple(run.shape), run.dtype) < raw_nbytes(tuple(run.shape), run.dtype)
        except ValueError:  # a rank above its features
            return False

    def encode(self, place: str, run: Tensor, rows: bool) -> Any:
        """Codes of a contiguous tensor, which is saved at the place of that name."""

        def by(codec: Codec) -> Any:
            found = kept.encode(codec, run, self.state, self.found.on(run.device), rows)
            self.found.check_at_once(run)
            return found

        if self.trial is not None:
            return self.trial.keep(place, run, by)
        return by(self.codec if self.bits is None else self.codec.with_bits(self.bits[place]))

    def tell(self, name: str, raw: int = 0, payload: int = 0, calls: int = 0, **more: Any) -> None:
        event = Event("saved", name, "saved", raw, payload, calls=calls, nonfinite=self.found, **more)
        for listener in self.listeners:
            listener(event)


def _tensors(value: Any, depth: int = 4) -> Iterable[Tensor]:
    """The tensors with a history in what a model returns: containers, mappings, dataclasses and plain objects."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif depth and value is not None and not isinstance(value, (str, bytes, int, float, nn.Module)):
        if isinstance(value, Mapping):
            parts: Iterable[Any] = value.values()
        elif isinstance(value, (list, tuple, set)):
            parts = value
        elif dataclasses.is_dataclass(value):
            parts = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
        else:
            parts = vars(value).values() if hasattr(value, "__dict__") else ()
        for part in parts:
            yield from _tensors(part, depth - 1)
