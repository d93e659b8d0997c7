"""Tensors that autograd saves for the backward pass, kept compressed between forward and backward.

    forward:   operation ──saves x──▶ pack(x) ──▶ payload (held by the graph)
    backward:  operation ◀──x'──── unpack(payload)

Forward values stay exact; gradients are computed from x'.  Values are rounded stochastically, so a gradient that is
linear in what was saved is right on average.  Masks and indices are kept exactly: a mask in one bit an element, an
index in the fewest bytes (on a GPU as it is: to find out how many are needed would wait for it).  Of the input of GELU
and SiLU only the slope is kept.
Sources: ActNN (Chen et al., 2021), GACT (Liu et al., 2022), Mesa (Pan et al., 2021).
This file knows codecs and modules, not trainers.  Who counts or measures is a listener (observe/events.py).
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..codecs import Codec, raw_nbytes
from ..observe.events import Event, Listener
from ..observe.nonfinite import Nonfinite, check
from ..ops.memory import Pool
from .forms import Encoded, Packed, Passthrough, Sharded, Shared, flatten, integers, slopes, two_valued
from .masks import pack_flags, pack_two_values
from .rules import needed_by, slopes_of
from .slopes import LARGEST

# Elements; smaller tensors are a thousandth of the bytes.  What a pooler or a classifier takes is among them, and half
# of the error of all gradients would come from there.
SMALLEST = 1 << 14
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32, torch.int16)
COMPILED = (
    "saved= does not work inside torch.compile: compiled graphs save their tensors past these hooks, so nothing would "
    "be compressed. Train without torch_compile, or without saved=."
)


class SavedTensors:
    """Packs and unpacks the saved tensors of one model.

    codec: for floating point activations, rounded stochastically unless it names a rounding.
    bits: of each tensor by name, for a codec whose bits a budget chooses (budget.py).
    seed: of stochastic rounding.
    nonfinite: what happens where NaN or Inf is in a tensor, of which its group becomes NaN (codecs/base.py): "pass"
        counts it; "raise" also raises FloatingPointError, at once on a CPU, elsewhere at the next forward pass.
    """

    def __init__(
        self, codec: Codec, bits: Mapping[str, int] | None = None, *, seed: int = 0, nonfinite: str = "pass"
    ) -> None:
        self.codec, self.bits = codec.for_saved(), bits
        self.found = Nonfinite("saved", nonfinite == "raise")
        self.state = self.codec.init_state("saved", seed)
        self.enabled = True
        self.listeners: list[Listener] = []
        self._reset()

    def _reset(self) -> None:
        self._entered: list[bool] = []  # for each running forward pass of the model whether it pushed hooks
        self._modules: list[tuple[str, nn.Module]] = []  # those that are running, the innermost last
        self._counts: Counter[str] = Counter()
        self._stored: dict[int, tuple[StorageWeakRef, dict]] = {}
        self._buffers: set[int] = set()
        self._frozen: set[tuple[int, ...]] = set()
        self._pool = Pool()
        self._trial: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model starts outside of any forward pass.
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

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
        self.listeners, self.enabled, self._trial, self.found = [trial], True, trial, trial.found
        try:
            yield
        finally:
            self.listeners, self.enabled, self.found = before
            self._trial = None

    # -- around a forward pass ----------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        return any(self._entered)

    def enter(self, model: nn.Module, name: str = "") -> None:
        """A forward pass of `model` begins."""
        first = self.enabled and torch.is_grad_enabled() and not self.active
        if first and torch.compiler.is_compiling():
            raise RuntimeError(COMPILED)
        self._entered.append(False)
        if not first:
            return
        check([self.found])
        self._stored.clear()
        self._counts.clear()
        self._buffers = {_address(t) for t in model.buffers()}
        frozen = [tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.numel() >= SMALLEST]
        self._frozen = {*frozen, *(shape[::-1] for shape in frozen)}
        self._tell("", calls=1)
        torch._C._autograd._push_saved_tensors_default_hooks(self.pack, unpack)
        self._entered[-1] = True

    def leave(self, model: nn.Module, name: str = "") -> None:
        """The forward pass that began last has ended, or failed."""
        if self._entered and self._entered.pop():
            torch._C._autograd._pop_saved_tensors_default_hooks()
            self._stored.clear()
            self._modules.clear()
            self._pool = Pool()  # from now on only the graph refers to the old one

    def begin(self, module: nn.Module, name: str) -> None:
        """Tensors that are packed from now on are saved by this module."""
        if self.active:
            self._modules.append((name, module))

    def end(self, module: nn.Module, name: str) -> None:
        if self._modules and self._modules[-1][1] is module:
            self._modules.pop()

    # -- one tensor -----------------------------------------------------------------------------------------------
    def pack(self, x: Tensor) -> Passthrough | Shared | Sharded:
        """What the graph holds in place of `x`."""
        if type(x).__name__ == "DTensor" and not isinstance(x, nn.Parameter):
            return Sharded(self.pack(x._local_tensor), x)
        if type(x) is not Tensor or x.layout != torch.strided or _of_parameter(x) or _address(x) in self._buffers:
            return Passthrough(x)  # parameters and buffers are in memory anyway
        if not self._is_large_activation(x):
            return self._keep(x)
        found = flatten(x)
        run, layout = (x.detach().contiguous(), None) if found is None else (found[0].detach(), found[1])
        name, user = self._modules[-1] if self._modules else ("", None)
        stored, place = self._stored_of(x), (x.storage_offset(), run.numel(), x.dtype, x._version, found is None)
        key = (needed_by(user), *place)
        known = stored.get(key)
        content = None if known is None else known()
        if content is None:
            slot = f"{name}#{self._counts[name]}"
            self._counts[name] += 1
            content = self._encode(slot, run, user, made_by_operation=x.grad_fn is not None or x.requires_grad)
            if content is None:
                return self._keep(x)
            # A rectifier and the layer after it save the same memory, which autograd would hold once.
            raw = 0 if ("raw", *place) in stored else run.numel() * run.element_size()
            stored[key] = weakref.ref(content)
            stored[("raw", *place)] = lambda: None
            self._tell(slot, raw, content.nbytes, codec=content.codec, x=run, decode=content.unpack)
        if self._trial is not None:
            self._trial.use(content, user)
        return Shared(content, layout, tuple(x.shape), self._pool)

    def _is_large_activation(self, x: Tensor) -> bool:
        rows = 1 if self._trial is None else self._trial.scale
        if x.numel() * rows < SMALLEST or x.device.type == "meta":
            return False
        if x.dtype in FLOATS and x.dim() > 1 and x.shape[-1] == 1:
            return False  # means and deviations of norms: few, and everything depends on them
        if x.dtype in (torch.bfloat16, torch.float16) and not x.requires_grad and tuple(x.shape) in self._frozen:
            return False  # autocast's copy of a frozen weight
        return x.dtype in FLOATS or x.dtype in INTS or x.dtype == torch.bool

    def _stored_of(self, x: Tensor) -> dict:
        """What of this storage has been packed.  The weak reference keeps its address from being used again."""
        storage = x.untyped_storage()
        entry = self._stored.get(storage._cdata)
        if entry is None or entry[0].expired():
            entry = self._stored[storage._cdata] = (StorageWeakRef(storage), {})
        return entry[1]

    def _keep(self, x: Tensor) -> Passthrough:
        name = f"{self._modules[-1][0] if self._modules else ''} (kept)"
        size, own = x.untyped_storage().nbytes(), x.numel() * x.element_size()
        if size > 4 * own:  # one token of every row: a copy is smaller than the storage with all tokens
            self._tell(name, own, own, x=x, decode=lambda: x)
            return Passthrough(x.detach().clone())
        stored = self._stored_of(x)
        if "kept" not in stored:
            stored["kept"] = lambda: None
            self._tell(name, size, size, x=x, decode=lambda: x)
        return Passthrough(x)

    def _tell(self, name: str, raw: int = 0, payload: int = 0, calls: int = 0, **more: Any) -> None:
        event = Event("saved", name, "saved", raw, payload, calls=calls, nonfinite=self.found, **more)
        for listener in self.listeners:
            listener(event)

    def _encode(self, slot: str, run: Tensor, user: nn.Module | None, made_by_operation: bool) -> Any:
        """The tensor as a `Packed` or `Encoded`; None where nothing would be gained."""
        shape, dtype = tuple(run.shape), run.dtype
        if dtype == torch.bool:
            return two_valued(pack_flags(run), shape, 0, 1, dtype)
        if dtype in INTS:
            return integers(run)
        if isinstance(user, nn.ReLU):  # its gradient needs the sign only; NaN counts as positive, as in torch
            return two_valued(pack_flags(run), shape, 0.0, 1.0, dtype)
        if isinstance(user, nn.Hardtanh):  # inside or outside of the range; ReLU6 is one
            low, high = user.min_val, user.max_val
            return two_valued(pack_flags(run, low, high), shape, low, (low + high) / 2, dtype)
        found = None if made_by_operation else pack_two_values(run)
        if found is not None:
            return two_valued(found[0], shape, 0.0, found[1], dtype)
        if self._trial is not None:
            return self._trial.keep(slot, run, lambda codec: self._by_codec(codec, run, user))
        codec = self.codec if self.bits is None else self.codec.with_bits(self.bits[slot])
        return self._by_codec(codec, run, user)

    def _by_codec(self, codec: Codec, run: Tensor, user: nn.Module | None) -> Encoded | Packed | None:
        nonfinite = self.found.on(run.device)
        function, bits = slopes_of(user), codec.traits.bits
        if function is not None and bits is not None and run.dtype != torch.float64:
            # A slope at 3 bits has the error of a value at 4: the backward pass multiplies it by nothing.
            bits = 3 if bits == 4 and self.bits is None else min(bits, LARGEST)
            packed = slopes(run, function, bits, self.state, nonfinite)
            self.found.check_at_once(run)
            return packed
        raw = raw_nbytes(tuple(run.shape), run.dtype)
        try:
            nbytes = codec.payload_nbytes(tuple(run.shape), run.dtype)
        except ValueError:  # a rank above its features
            return None
        if nbytes >= raw:
            return None
        payload = codec.encode(run, self.state, nonfinite=nonfinite)
        self.found.check_at_once(run)
        return Encoded(codec, payload)


def unpack(packed: Passthrough | Shared | Sharded) -> Tensor:
    return packed.unpack()


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata if type(x) in (Tensor, nn.Parameter) else id(x)


def _of_parameter(x: Tensor) -> bool:
    """A parameter, a view of one, or the cast of one that autocast made."""
    if isinstance(x._base if x._base is not None else x, nn.Parameter):
        return True
    node = x.grad_fn
    while node is not None and node.name() in ("ToCopyBackward0", "TBackward0", "ViewBackward0", "TransposeBackward0"):
        node = node.next_functions[0][0]
        if node is not None and node.name() == "torch::autograd::AccumulateGrad":
            return isinstance(node.variable, nn.Parameter)
    return False
