"""Tensors that autograd saves for the backward pass, kept compressed between forward and backward.

    forward:   operation ──saves x──▶ pack(x) ──▶ payload (held by the graph)
    backward:  operation ◀──x'──── unpack(payload)

Forward values stay exact; gradients are computed from x'.  Values are rounded stochastically, so that where a gradient
is linear in what was saved it is right on average.  What carries no value but a choice is kept exactly: masks in one
bit, indices in the fewest bytes.  Of what goes into GELU and SiLU only the slope is kept.
Sources: ActNN (Chen et al., 2021), GACT (Liu et al., 2022), Mesa (Pan et al., 2021).
This file knows codecs and modules, not trainers.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..codecs import Block, Codec, raw_nbytes
from ..ops.memory import Pool
from .budget import Auto
from .forms import Bits, Coded, Integers, Kept, Sharded, Slopes, View, flatten, narrowest
from .masks import pack_flags, pack_two_values
from .rules import asks, slopes_of
from .slopes import encode_slopes

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
    """What is done with the saved tensors of one model.

    codec: for floating point activations, rounded stochastically unless the user named a rounding.  Or an
        `Auto`, which gives every tensor its own number of bits.
    nonfinite: "pass" keeps tensors with NaN or Inf as they are and counts them; "raise" stops.
    """

    def __init__(self, codec: Codec | Auto, *, seed: int = 0, nonfinite: str = "pass") -> None:
        self.auto = codec if isinstance(codec, Auto) else None
        self.codec = (Block() if self.auto else codec).for_saved()
        self.nonfinite = nonfinite
        self.state = self.codec.init_state("saved", seed)
        self.enabled = True
        self.record = Record()
        self._reset()

    def _reset(self) -> None:
        self._entered: list[bool] = []  # for each forward pass under way whether its hooks were pushed
        self._modules: list[tuple[str, nn.Module]] = []  # those that are running, the innermost last
        self._counts: Counter[str] = Counter()
        self._seen: dict[int, tuple[StorageWeakRef, dict]] = {}
        self._constant: set[int] = set()
        self._frozen: set[tuple[int, ...]] = set()
        self._pool = Pool()
        self.trial: Any = None  # a measurement of sensitivities that is under way

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a running forward pass stays with it: copies of a model start without.
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "trial"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __str__(self) -> str:
        return str(self.auto or self.codec)

    # -- around a forward pass ----------------------------------------------------------------------------------
    @property
    def active(self) -> bool:
        return any(self._entered)

    def enter(self, model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        first = self.enabled and torch.is_grad_enabled() and not self.active
        if first and torch.compiler.is_compiling():
            raise RuntimeError(COMPILED)
        if first and self.auto is not None and self.trial is None:
            self.auto.before(self, model, args, kwargs or {})
        self._entered.append(False)
        if not first:
            return
        self._seen.clear()
        self._counts.clear()
        self._constant = {_address(t) for t in model.buffers()}
        frozen = [tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.numel() >= SMALLEST]
        self._frozen = {*frozen, *(shape[::-1] for shape in frozen)}
        if self.trial is None:
            self.record.passes += 1
        torch._C._autograd._push_saved_tensors_default_hooks(self.pack, unpack)
        self._entered[-1] = True

    def leave(self) -> None:
        if self._entered and self._entered.pop():
            torch._C._autograd._pop_saved_tensors_default_hooks()
            self._seen.clear()
            self._modules.clear()
            self._pool = Pool()  # the graph alone keeps the other

    def begin(self, name: str, module: nn.Module) -> None:
        """What is packed from now on is saved by this module."""
        if self.active:
            self._modules.append((name, module))

    def end(self, module: nn.Module) -> None:
        if self._modules and self._modules[-1][1] is module:
            self._modules.pop()

    # -- one tensor -----------------------------------------------------------------------------------------------
    def pack(self, x: Tensor) -> Kept | View | Sharded:
        """What the graph is to hold in place of `x`."""
        if type(x).__name__ == "DTensor" and not isinstance(x, nn.Parameter):
            return Sharded(self.pack(x._local_tensor), x)
        if type(x) is not Tensor or x.layout != torch.strided or _of_parameter(x) or _address(x) in self._constant:
            return Kept(x)  # parameters and buffers are there anyway
        if not self._worth(x):
            return self._kept(x)
        found = flatten(x)
        run, layout = (x.detach().contiguous(), None) if found is None else (found[0].detach(), found[1])
        name, use = self._modules[-1] if self._modules else ("", None)
        cores, place = self._cores(x), (x.storage_offset(), run.numel(), x.dtype, x._version, found is None)
        key = (asks(use), *place)
        known = cores.get(key)
        core = None if known is None else known()
        if core is None:
            # A rectifier and the layer after it save the same memory, which autograd would hold once.
            raw = 0 if ("raw", *place) in cores else run.numel() * run.element_size()
            slot = f"{name}#{self._counts[name]}"
            self._counts[name] += 1
            core = self._encode(slot, run, use, made_by_operation=x.grad_fn is not None or x.requires_grad)
            if core is None:
                return self._kept(x)
            cores[key] = weakref.ref(core)
            cores[("raw", *place)] = lambda: None
            self._count(slot, raw, core.nbytes, exact=not isinstance(core, (Coded, Slopes)))
        if self.trial is not None:
            self.trial.use(core, use)
        return View(core, layout, tuple(x.shape), self._pool)

    def _worth(self, x: Tensor) -> bool:
        rows = 1 if self.trial is None else self.trial.scale
        if x.numel() * rows < SMALLEST or x.device.type == "meta":
            return False
        if x.dtype in FLOATS and x.dim() > 1 and x.shape[-1] == 1:
            return False  # means and deviations of norms: few, and everything depends on them
        if x.dtype in (torch.bfloat16, torch.float16) and not x.requires_grad and tuple(x.shape) in self._frozen:
            return False  # autocast's copy of a frozen weight
        return x.dtype in FLOATS or x.dtype in INTS or x.dtype == torch.bool

    def _cores(self, x: Tensor) -> dict:
        """What of this storage has been packed.  The weak reference keeps its address from being used again."""
        storage = x.untyped_storage()
        entry = self._seen.get(storage._cdata)
        if entry is None or entry[0].expired():
            entry = self._seen[storage._cdata] = (StorageWeakRef(storage), {})
        return entry[1]

    def _kept(self, x: Tensor) -> Kept:
        name = f"{self._modules[-1][0] if self._modules else ''} (kept)"
        size, own = x.untyped_storage().nbytes(), x.numel() * x.element_size()
        if size > 4 * own:  # one token of every row: not worth all the others that lie between
            self._count(name, own, own, exact=True)
            return Kept(x.detach().clone())
        cores = self._cores(x)
        if "kept" not in cores:
            cores["kept"] = lambda: None
            self._count(name, size, size, exact=True)
        return Kept(x)

    def _count(self, slot: str, raw: int, kept: int, exact: bool) -> None:
        if self.trial is None:
            self.record.count(raw, kept)
        else:
            self.trial.count(slot, raw, kept, exact)

    def _encode(
        self, slot: str, run: Tensor, use: nn.Module | None, made_by_operation: bool
    ) -> Bits | Integers | Coded | Slopes | Any | None:
        """None where nothing would be gained."""
        shape, dtype = tuple(run.shape), run.dtype
        if dtype == torch.bool:
            return Bits(pack_flags(run), shape, 0, 1, dtype)
        if dtype in INTS:
            narrow = narrowest(run)
            return None if narrow is None else Integers(run, narrow)
        if isinstance(use, nn.ReLU):  # its gradient asks for no more
            return Bits(pack_flags(run), shape, 0.0, 1.0, dtype)  # NaN passes, as without
        if isinstance(use, nn.Hardtanh):  # nor does that of ReLU6
            inside = pack_flags(run, use.min_val, use.max_val)
            return Bits(inside, shape, use.min_val, (use.min_val + use.max_val) / 2, dtype)
        if not made_by_operation:
            found = pack_two_values(run)
            if found is not None:
                return Bits(found[0], shape, 0.0, found[1], dtype)
        if self.trial is not None:
            return self.trial.hold(slot, run, lambda codec: self._coded(codec, run, use))
        bits = None if self.auto is None else self.auto.bits_of(slot)
        return self._coded(self.codec if bits is None else self.codec.with_bits(bits), run, use)

    def _coded(self, codec: Codec, run: Tensor, use: nn.Module | None) -> Coded | Slopes | None:
        slopes, bits = slopes_of(use), codec.traits.bits
        if slopes is not None and bits is not None and run.dtype != torch.float64:
            # Three bits of a slope are worth four of a value: nothing of the error is multiplied on the way back.
            bits = 3 if bits == 4 and self.auto is None else min(bits, 8)
            codes = encode_slopes(run, slopes, bits, self.state)
            if codes is not None:
                return Slopes(codes, run, slopes, bits)
        raw = raw_nbytes(tuple(run.shape), run.dtype)
        try:
            nbytes = codec.payload_nbytes(tuple(run.shape), run.dtype)
        except ValueError:  # a rank above its features
            return None
        if nbytes >= raw:
            return None
        payload = codec.encode(run, self.state)
        if payload.raw:
            if self.trial is not None:  # the pass itself sees the same tensors once more
                self.trial.strange = True
                return None
            self.record.nonfinite += 1
            if self.nonfinite == "raise":
                raise FloatingPointError(
                    f"saved: NaN, Inf or a magnitude above 2**48 in a saved tensor of shape {tuple(run.shape)}. With "
                    "nonfinite='pass' it would be kept as it is and counted."
                )
            return None
        return Coded(codec, payload)


@dataclasses.dataclass
class Record:
    """Bytes that autograd would have held, and bytes that are held instead (parameters and buffers in neither)."""

    passes: int = 0
    raw_bytes: int = 0
    kept_bytes: int = 0
    nonfinite: int = 0

    def count(self, raw: int, kept: int) -> None:
        self.raw_bytes += raw
        self.kept_bytes += kept

    def since(self, earlier: "Record") -> "Record":
        """What came after `earlier`, a copy of this record."""
        return Record(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(earlier), strict=True)))

    def row(self, codec: str) -> dict[str, Any]:
        """The same as one more row beside those of the boundaries."""
        return {
            "boundary": "saved for backward", "layer": None, "direction": "saved", "codec": codec,
            "calls": self.passes, "ratio": self.raw_bytes / self.kept_bytes if self.kept_bytes else None,
            "rel_error": None, "cosine": None, "raw_bytes": self.raw_bytes, "payload_bytes": self.kept_bytes,
            "bytes_saved": self.raw_bytes - self.kept_bytes, "nonfinite": self.nonfinite, "seconds": None,
        }  # fmt: skip


def unpack(packed: Kept | View | Sharded) -> Tensor:
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
