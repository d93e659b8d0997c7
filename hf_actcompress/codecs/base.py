"""The contract of a codec: tensor -> payload -> tensor, with state kept apart.

A codec is a frozen dataclass whose fields are its hyperparameters.  It knows no module, rank or transport; what
changes during training lives in a `CodecState` that the caller keeps, copies and saves.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.layout import dense
from ..ops.ranges import count_nonfinite
from .payload import FLOAT_DTYPES, Payload, all_tensors, flaw_of

# The shape and dtype of each payload tensor that a chain's second codec compresses.
LeafShapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


class CodecState:
    """What a codec remembers between calls at one site.

    Tensors in a state are replaced, never changed in place, so that `snapshot()` is a cheap, true copy: a
    recomputed forward pass (activation checkpointing) replays the snapshot and gets the same values.
    """

    def snapshot(self) -> "CodecState":
        return copy.copy(self)

    def restore(self, other: "CodecState") -> None:
        self.__dict__.update(other.__dict__)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers only, so that it can be saved with safetensors and JSON."""
        return dict(self.__dict__)

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._check_entries(values, self.__dict__)
        self.__dict__.update(values)

    def _check_entries(self, values: dict[str, Any], known: Iterable[str]) -> None:
        if set(values) != set(known):
            raise ValueError(
                f"{type(self).__name__} got the entries {sorted(values)}; it holds {sorted(known)}. The checkpoint "
                "was written with another codec: start with fresh state."
            )


SITES = ("boundary", "saved", "wire", "weights")


@dataclass(frozen=True)
class Traits:
    """What a site has to know of a codec.

    stateful: `init_state` returns a state, which the site keeps and hands in.
    stochastic: it draws random numbers, so that two calls give different values.
    per_sample: it remembers samples.  Both sides of a link keep a state, which has to be told the samples of a batch
        (`state.plan(ids, shape)`, then `state.current`).
    keeps_tensors: its state holds whole tensors, so copies of it are large.
    rotates: groups of values are rotated before they are coded, for the least error at the same bits.
    bits: bits of a code; None where a value has no fixed number of them.
    unfit: {site: why} for the sites where it cannot be used.
    """

    stateful: bool = False
    stochastic: bool = False
    per_sample: bool = False
    keeps_tensors: bool = False
    rotates: bool = False
    bits: int | None = None
    unfit: Mapping[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> frozenset[str]:
        """Where the codec may be used: of "boundary", "saved", "wire" and "weights"."""
        return frozenset(SITES) - frozenset(self.unfit)


class Codec:
    """Base class of codecs: a frozen dataclass whose fields are its options.

    A subclass implements `_encode`, `_decode` and `_payload_nbytes`; one that remembers something returns a
    `CodecState` from `init_state`.  `register_codec` makes its name known to specs.
    """

    name: ClassVar[str] = ""
    # Names of the payload tensors that hold floats a second codec of a chain can compress further.
    leaves: ClassVar[tuple[str, ...]] = ()
    # Whether `_encode` and `_roundtrip` take `nonfinite` and count in the pass that they make anyway.
    counts_nonfinite: ClassVar[bool] = False

    # -- what sites ask ------------------------------------------------------------------------------------------
    @functools.cached_property
    def traits(self) -> Traits:
        stochastic = getattr(self, "round", None) == "stochastic"
        return Traits(
            stateful=self.init_state() is not None, stochastic=stochastic, bits=getattr(self, "bits", None)
        )

    def for_gradients(self) -> "Codec":
        """The codec of the gradients that come back, where this one is given for activations."""
        return self

    def for_evaluation(self, state: CodecState | None) -> tuple["Codec", CodecState | None]:
        """Codec and state for data that training must not remember: a copy of `state`, which may be changed."""
        return self, None if state is None else state.snapshot()

    def in_rows(self, width: int) -> tuple["Codec", int | None]:
        """The codec for rows of `width` values, of which no two should share a scale: with groups that divide a row,
        and the length that rows have to be filled up to; None where they stay as they are."""
        return self, None

    def with_bits(self, bits: int) -> "Codec":
        """The same codec with another number of bits.  Raises ValueError for a codec that has no bits to choose."""
        if not any(f.name == "bits" for f in fields(self)):  # type: ignore[arg-type]
            raise ValueError(f"{self} has no option bits; use a codec that has, such as block:bits=4.")
        return dataclasses.replace(self, bits=bits)  # type: ignore[type-var]

    # -- what users call ---------------------------------------------------------------------------------------
    def encode(self, x: Tensor, state: CodecState | None = None, *, nonfinite: Tensor | None = None) -> Payload:
        """Compress `x` (any shape; fp32, bf16, fp16 or fp64; contiguous or not).

        Where NaN or Inf is in `x`, NaN is decoded: of its group, or of the whole tensor for codecs whose scale belongs
        to all of it.  The state stays usable.  Nothing waits for the device.
        nonfinite: int64 [1] on the device of `x`, to which the number of such groups or tensors is added.
        Raises ValueError for what is not a dense floating point tensor.
        """
        self._accepts(x)
        if x.numel() == 0:
            return Payload(str(self), tuple(x.shape), x.dtype, {"empty": x.detach().reshape(-1)})
        with _full_precision(x):
            return self._encode(_plain(x), state, **self._counter(x, nonfinite))

    def decode(self, payload: Payload, state: CodecState | None = None) -> Tensor:
        """The tensor again: original shape, dtype and device, contiguous.

        state: the receiver's own, for codecs whose `traits.per_sample` is set; others need none.
        Raises ValueError for a payload that is damaged or was made by another codec.
        """
        if flaw := flaw_of(payload):
            raise self._damaged(flaw)
        first = next(iter(all_tensors(payload)))
        if math.prod(payload.shape) == 0:
            return first.new_empty(payload.shape, dtype=payload.dtype)
        with torch.no_grad(), _full_precision(first):
            try:
                return self._decode_with(payload, state)
            except KeyError as error:
                raise self._damaged(f"a payload has no tensor or part {error}") from error

    def roundtrip(self, x: Tensor, state: CodecState | None = None, *, nonfinite: Tensor | None = None) -> Tensor:
        """The same values as `decode(encode(x, state))`, bit for bit, and the same change of `state`.

        A new tensor: contiguous, or with the strides of `x` where that saves moving it.
        """
        self._accepts(x)
        if x.numel() == 0:
            return x.detach().clone(memory_format=torch.contiguous_format)
        with _full_precision(x):
            return self._roundtrip(dense(_plain(x)), state, **self._counter(x, nonfinite))

    def _counter(self, x: Tensor, nonfinite: Tensor | None) -> dict[str, Tensor]:
        """`nonfinite` for a codec that counts by itself; for others the values are counted here."""
        if nonfinite is None:
            return {}
        if self.counts_nonfinite:
            return {"nonfinite": nonfinite}
        count_nonfinite(x.detach(), nonfinite)
        return {}

    def payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of the payload of a finite tensor of that shape and dtype, known before encoding."""
        if math.prod(shape) == 0:
            return 0
        return self._payload_nbytes(tuple(shape), dtype)

    def sent_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, state: CodecState | None) -> int:
        """Bytes of the payload that was made last with `state`."""
        return self.payload_nbytes(shape, dtype)

    def init_state(self, site: str = "", seed: int = 0) -> CodecState | None:
        """Fresh state for one site, or None for a codec that remembers nothing."""
        return None

    # -- what subclasses implement -----------------------------------------------------------------------------
    # x has elements and no graph; it may hold NaN and Inf, which must come out as NaN.
    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        raise NotImplementedError

    def _decode(self, payload: Payload) -> Tensor:
        raise NotImplementedError

    def _decode_with(self, payload: Payload, state: CodecState | None) -> Tensor:
        return self._decode(payload)

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        return self._decode(self._encode(x, state))

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        raise NotImplementedError

    def _payload(self, x: Tensor, tensors: dict[str, Tensor], parts: dict[str, Payload] | None = None) -> Payload:
        return Payload(str(self), tuple(x.shape), x.dtype, tensors, parts or {})

    def _sized(self, payload: Payload, **expected: int | tuple) -> list[Tensor]:
        """The named tensors of a payload: `codes=12` is uint8 [12], `scales=(3, 2, torch.bfloat16)` bf16 [3, 2].

        A payload may come from a file or a link: no kernel may read beyond what is there.  Raises ValueError.
        """
        found = []
        for name, form in expected.items():
            *shape, dtype = (form, torch.uint8) if isinstance(form, int) else form
            tensor = payload.tensors.get(name)
            if tensor is None or list(tensor.shape) != shape or tensor.dtype != dtype:
                have = "nothing" if tensor is None else f"shape {list(tensor.shape)} and {tensor.dtype}"
                raise self._damaged(
                    f"'{name}' of a payload of shape {tuple(payload.shape)} has {have}, and needs {shape} and {dtype}"
                )
            found.append(tensor.contiguous())
        return found

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self}: {what}. The payload is damaged, or that of another codec.")

    def _accepts(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dtype not in FLOAT_DTYPES or x.layout != torch.strided:
            got = f"tensor of dtype {x.dtype} and layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"{self} got a {got}; codecs compress dense floating point tensors "
                f"({', '.join(str(d).removeprefix('torch.') for d in FLOAT_DTYPES)}). Leave integer and bool "
                "tensors alone, or convert with .float() first."
            )

    # -- the spec: a codec is its own configuration --------------------------------------------------------------
    def __str__(self) -> str:
        """Canonical spec: the name and the options that differ from their defaults, plus `bits`, `rank`, `ratio`."""
        return self._spec

    @functools.cached_property
    def _spec(self) -> str:  # once: every payload has it
        options = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value != f.default or f.name in ("bits", "rank", "ratio"):
                short = f"{value:g}" if isinstance(value, float) else str(value).lower()
                text = repr(value) if isinstance(value, float) and float(short) != value else short
                options.append(f"{f.name}={text}")
        return f"{self.name}:{','.join(options)}" if options else self.name


def _plain(x: Tensor) -> Tensor:
    """Without a graph, and without a lazy negative bit, which native code and numpy do not see."""
    return x.detach().resolve_neg()


def _full_precision(x: Tensor) -> AbstractContextManager:
    """Products inside a codec (rotation, factors) must not be cast to bf16 by a surrounding autocast."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not for "meta"
    return torch.autocast(device, enabled=False) if autocast else nullcontext()




def check_int(codec: str, option: str, value: Any, low: int, high: int, remedy: str = "") -> None:
    """Raise the ValueError that every integer option shares."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{codec}: {option}={value!r} is not an integer from {low} to {high}. {remedy}".rstrip())


def check_choice(codec: str, option: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        names = ", ".join("none" if a is None else str(a) for a in allowed)
        raise ValueError(f"{codec}: {option}={value!r} is not known; choose one of: {names}.")


def site_hash(site: str) -> int:
    """A stable 32-bit number for a site's name (Python's own `hash` changes between processes)."""
    return zlib.crc32(site.encode())
