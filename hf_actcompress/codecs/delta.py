"""Delta: the change of each sample's activation since it was last seen.

      sender                                      receiver
      x ──▶ x - m ──inner──▶ payload ═══ link ═══▶ m + decoded change = y
            m = 8 bits of y                        m = 8 bits of y

Fine-tuning changes activations little from epoch to epoch, so a change takes fewer bits than the value.  Both sides
keep the same cache `m`, made of what the receiver decoded.  Samples are told apart by numbers that the caller gives;
this file knows neither data sets nor links.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Codec, CodecState, Payload, Traits, check_choice, check_int
from .block import Block

GROUP = 128  # values of the cache that share a minimum and a step
_ids: ContextVar[list[int] | None] = ContextVar("sample_ids", default=None)


@contextlib.contextmanager
def sample_ids(ids: Sequence[int] | Tensor) -> Iterator[None]:
    """Tell simulated boundaries with `delta+a` which samples the batch of a training step holds.

        with sample_ids(batch.pop("idx")):
            loss = model(**batch).loss
    """
    token = _ids.set([int(i) for i in ids])
    try:
        yield
    finally:
        _ids.reset(token)


@dataclass(frozen=True)
class Plan:
    """What happens to the rows of one batch: `seen` are sent as changes of the cache's `slots`, `new` in full; of
    these the rows `kept` go to the slots `places`."""

    seen: list[int]
    slots: list[int]
    new: list[int]
    kept: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class DeltaState(CodecState):
    """One side's cache: sample -> slot, and the slots' values in 8 bits.

    Unlike other states it is changed in place, for its size; a snapshot holds copies of the rows in question only.
    """

    def __init__(self, codec: "Delta", site: str, seed: int) -> None:
        self.codec, self.site = codec, site
        self.inner = codec.inner.init_state(f"{site}/change", seed)
        self.full = codec.first.init_state(f"{site}/full", seed)
        self.shape: tuple[int, ...] | None = None  # of one sample
        self.slots: OrderedDict[int, int] = OrderedDict()
        self.codes = torch.empty(0, 0, dtype=torch.uint8)
        self.scales = torch.empty(0, 0, 2)
        self.current: Plan | None = None
        self.ids: list[int] | None = None  # of a snapshot
        self.frozen = False
        self.sent = 0  # bytes of the last payload

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self.codes.numel() + self.scales.numel() * 4

    @property
    def capacity(self) -> int:
        """Samples that the cache may hold."""
        groups = -(-math.prod(self.shape or (1,)) // GROUP)
        return self.codec.cache * 2**20 // max(1, groups * (GROUP + 8))

    def plan(self, ids: Sequence[int] | None, shape: tuple[int, ...]) -> Plan:
        """Decide about the rows of the next batch of `shape`, whose samples are `ids`, and book them.

        Two states that are asked in the same order decide alike.  None, and numbers below 0, are samples that are not
        to be remembered.  Raises ValueError if there are not as many numbers as rows.
        """
        rows = shape[0] if shape else 1
        if ids is None:
            return Plan([], [], list(range(rows)))
        if len(ids) != rows:
            raise ValueError(f"{self.codec}: {len(ids)} sample ids for a batch of {rows} rows; each needs one.")
        if self.shape is None and not self.frozen:
            self.shape = tuple(shape[1:])
        plan, present = Plan([], [], []), set()
        for row, number in enumerate(ids):
            known = number >= 0 and number not in present and self.shape == tuple(shape[1:])
            if known and number in self.slots:
                plan.seen.append(row)
                plan.slots.append(self.slots[number])
                self.slots.move_to_end(number)
            else:
                plan.new.append(row)
                place = self._place(number, present) if known and not self.frozen else None
                if place is not None:
                    plan.kept.append(row)
                    plan.places.append(place)
            present.add(number)
        return plan

    def _place(self, number: int, present: set[int]) -> int | None:
        place = None
        if len(self.slots) < self.capacity:
            place = len(self.slots)
        elif self.codec.evict == "lru" and self.slots and next(iter(self.slots)) not in present:
            place = self.slots.popitem(last=False)[1]
        if place is not None:
            self.slots[number] = place
        return place

    # -- the values ----------------------------------------------------------------------------------------------
    def read(self, slots: list[int], like: Tensor) -> Tensor:
        """fp32 [k, *shape]"""
        index = torch.tensor(slots)
        codes, scales = self.codes[index], self.scales[index]
        rows = codes.view(len(slots), -1, GROUP).float() * scales[..., 1:] + scales[..., :1]
        width = math.prod(self.shape)
        return rows.view(len(slots), -1)[:, :width].reshape(len(slots), *self.shape).to(like.device)

    def check(self, slots: list[int]) -> Tensor:
        """int64 [1]: differs, all but surely, where the caches of the two sides do, in codes or scales."""
        index = torch.tensor(slots)
        words = [t[index].view(len(slots), -1).view(torch.int64) for t in (self.codes, self.scales)]
        words = torch.cat(words, 1).view(-1)
        weights = (2 * torch.arange(words.numel()) + 1) * 0x9E3779B97F4A7C1  # odd, so that no word is lost
        return (words * weights).sum(dim=0, keepdim=True)  # modulo 2**64

    def write(self, slots: list[int], rows: Tensor) -> None:
        """Keep fp32 `rows` [k, *shape] in 8 bits."""
        if not slots or self.frozen:
            return
        flat = rows.reshape(len(slots), -1).cpu()
        # The last group is filled up with values of its own row.
        filled = torch.nn.functional.pad(flat[:, None], (0, -flat.shape[1] % GROUP), mode="replicate")[:, 0]
        groups = filled.view(len(slots), -1, GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        step = (high - low) / 255
        codes = ((groups - low) / step.clamp_min(1e-30)).round_().clamp_(0, 255).to(torch.uint8)
        self._grow(max(slots) + 1, groups.shape[1])
        index = torch.tensor(slots)
        self.codes[index] = codes.view(len(slots), -1)
        self.scales[index] = torch.cat([low, step], dim=-1)

    def _grow(self, slots: int, groups: int) -> None:
        have = len(self.codes)
        if slots > have:
            size = min(self.capacity, max(slots, 2 * have, 64))
            codes = torch.zeros(size, groups * GROUP, dtype=torch.uint8)
            scales = torch.zeros(size, groups, 2)
            if have:
                codes[:have], scales[:have] = self.codes, self.scales
            self.codes, self.scales = codes, scales

    # -- as any state ------------------------------------------------------------------------------------------------
    def snapshot(self) -> "DeltaState":
        """The rows of the samples at hand (`sample_ids`), which a repeated call finds as they are now."""
        copy = DeltaState.__new__(DeltaState)
        copy.__dict__.update(self.__dict__)
        copy.inner = None if self.inner is None else self.inner.snapshot()
        copy.full = None if self.full is None else self.full.snapshot()
        copy.ids = self.ids if self.frozen else _ids.get()
        copy.frozen, copy.current = True, None
        known = [i for i in dict.fromkeys(copy.ids or ()) if i in self.slots]
        index = torch.tensor([self.slots[i] for i in known], dtype=torch.int64)
        copy.slots = OrderedDict((i, k) for k, i in enumerate(known))
        copy.codes, copy.scales = self.codes[index], self.scales[index]
        return copy

    def restore(self, other: CodecState) -> None:
        raise NotImplementedError("The cache of delta cannot be set back.")

    def state_dict(self) -> dict[str, Any]:
        used = len(self.slots)
        return {
            "shape": None if self.shape is None else list(self.shape), "ids": torch.tensor(list(self.slots)),
            "slots": torch.tensor(list(self.slots.values())), "codes": self.codes[:used].clone(),
            "scales": self.scales[:used].clone(),
            "inner": None if self.inner is None else self.inner.state_dict(),
            "full": None if self.full is None else self.full.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._check_entries(values, ("shape", "ids", "slots", "codes", "scales", "inner", "full"))
        self.shape = None if values["shape"] is None else tuple(values["shape"])
        self.slots = OrderedDict(zip(values["ids"].tolist(), values["slots"].tolist(), strict=True))
        self.codes, self.scales = values["codes"].clone(), values["scales"].clone()
        for own, name in ((self.inner, "inner"), (self.full, "full")):
            if own is not None:
                own.load_state_dict(values[name] or {})


@dataclass(frozen=True)
class Delta(Codec):
    """`delta+codec`: for activations [B, ...] of samples that come again.

    inner: codec of the changes; first: of samples that are not in the cache (in a spec, `/` for `:` and `;` for `,`:
        `delta:first=block/bits=6;group=64+block:bits=2`).
    cache: its bound in MiB on each side, 8 bits and 1/16 more for each value.  A full cache keeps what it has
        (evict=keep: best for epochs over one data set, the others are sent in full) or drops the sample not seen for
        longest (evict=lru: for streams).

    A sample whose activation has another shape than the first one's is sent in full: pad to one length.
    Payload: those of `first` and `inner` for the rows they get, and 8 bytes that tell whether the caches agree.
    `payload_nbytes` is that of a batch whose samples are all in the cache.  Without a state, or in evaluation, all
    rows are sent by `first`.
    Raises ValueError in training without `sample_ids`, and where the two sides' caches differ (other hardware may
    round otherwise).
    Source: Wang et al., "Fine-tuning language models over slow networks using activation compression with
    guarantees" (AQ-SGD), 2022.
    """

    inner: Codec
    first: Codec = Block(bits=8)
    cache: int = 1024
    evict: str = "keep"
    name: ClassVar[str] = "delta"

    def __post_init__(self) -> None:
        for role, codec in (("the change", self.inner), ("the first value", self.first)):
            if codec.name in ("ef", "delta"):
                raise ValueError(
                    f"{self.name}: {codec} cannot serve for {role}: the next change contains what the last one lost, "
                    f"so no feedback is needed. Write delta+{getattr(codec, 'inner', codec)}."
                )
        check_int(self.name, "cache", self.cache, 1, 2**30, "It is the bound of the cache in MiB.")
        check_choice(self.name, "evict", self.evict, ("keep", "lru"))

    def __str__(self) -> str:
        first = str(self.first).replace(":", "/").replace(",", ";")
        options = [] if self.first == Block(bits=8) else [f"first={first}"]
        options += [] if self.cache == 1024 else [f"cache={self.cache}"]
        options += [] if self.evict == "keep" else [f"evict={self.evict}"]
        return f"delta{':' if options else ''}{','.join(options)}+{self.inner}"

    def init_state(self, site: str = "", seed: int = 0) -> CodecState:
        return DeltaState(self, site, seed)

    @functools.cached_property
    def traits(self) -> Traits:
        reason = "delta compares activations of the same samples in two epochs; it is for boundaries and links alone."
        stochastic = self.inner.traits.stochastic or self.first.traits.stochastic
        return Traits(
            stateful=True, per_sample=True, stochastic=stochastic, bits=self.inner.traits.bits,
            unfit={"saved": reason, "weights": reason},
        )  # fmt: skip

    def for_gradients(self) -> Codec:
        """Gradients do not stay near those of the last epoch."""
        return self.inner

    def for_evaluation(self, state: CodecState | None) -> tuple[Codec, CodecState | None]:
        """Evaluation has other samples."""
        return self.first, None

    def stochastic(self) -> Codec:
        return replace(self, inner=self.inner.stochastic())

    def with_bits(self, bits: int) -> Codec:
        return replace(self, inner=self.inner.with_bits(bits))

    def example_plan(self, shape: tuple[int, ...], new: int | None, state: DeltaState) -> Plan:
        """A plan for a batch of `shape` of which `new` rows are sent in full, and a cache that suits it."""
        rows = shape[0] if shape else 1
        new = rows if new is None else new
        state.shape, seen = tuple(shape[1:]), list(range(rows - new))
        state.write(seen, torch.zeros(len(seen), *shape[1:]))
        return Plan(seen, seen, list(range(rows - new, rows)))

    # -- coding ------------------------------------------------------------------------------------------------------
    def _encode(self, x: Tensor, state: CodecState | None) -> Payload:
        return self._both(x, state)[0]

    def _roundtrip(self, x: Tensor, state: CodecState | None) -> Tensor:
        return self._both(x, state)[1]

    def _both(self, x: Tensor, state: CodecState | None) -> tuple[Payload, Tensor]:
        plan = self._planned(x, state)
        tensors, parts = {}, {}
        if plan.new:
            rows = x if not plan.seen else x[torch.tensor(plan.new, device=x.device)]
            parts["full"] = self.first.encode(rows, getattr(state, "full", None), check=False)
        if plan.seen:
            rows = x if not plan.new else x[torch.tensor(plan.seen, device=x.device)]
            tensors["check"] = state.check(plan.slots)
            change = rows.float() - state.read(plan.slots, x)
            parts["change"] = self.inner.encode(change, state.inner, check=False)
        payload = self._payload(x, tensors, parts)
        if isinstance(state, DeltaState):
            state.sent = payload.nbytes
        return payload, self._rebuild(payload, state, plan)

    def _planned(self, x: Tensor, state: CodecState | None) -> Plan:
        if not isinstance(state, DeltaState):
            return Plan([], [], list(range(x.shape[0] if x.dim() else 1)))
        plan, state.current = state.current, None
        if plan is None:
            ids = state.ids if state.frozen else _ids.get()
            if ids is None and not state.frozen:
                raise ValueError(
                    f"{self}: training needs to know which samples a batch holds. Run the forward pass within "
                    "hf_actcompress.codecs.sample_ids(ids); transformers.Trainer does not hand them on, the loop of "
                    "hf_actcompress.pipeline does."
                )
            plan = state.plan(ids, tuple(x.shape))
        return plan

    def _decode_with(self, payload: Payload, state: CodecState | None) -> Tensor:
        if isinstance(state, DeltaState) and state.current is not None:
            plan, state.current = state.current, None
        else:
            plan = Plan([], [], list(range(payload.shape[0] if payload.shape else 1)))
        if ("change" in payload.parts) != bool(plan.seen):
            raise ValueError(f"{self}: a change is decoded with the receiver's own state, which has to know the ids.")
        if plan.seen:
            own = state.check(plan.slots)
            if int(own) != int(payload.tensors["check"]):
                raise ValueError(
                    f"{self}: the caches of the two sides differ. Resume both from the same step, and use the same "
                    "kind of device and version on both sides."
                )
        return self._rebuild(payload, state, plan)

    def _rebuild(self, payload: Payload, state: CodecState | None, plan: Plan) -> Tensor:
        """What the receiver gets, and the new state of the cache; the same steps on both sides."""
        full = self.first.decode(payload.parts["full"]) if plan.new else None
        if plan.kept:
            at = {row: k for k, row in enumerate(plan.new)}
            state.write(plan.places, full[torch.tensor([at[row] for row in plan.kept])].float())
        if not plan.seen:
            return full.view(payload.shape)
        change = self.inner.decode(payload.parts["change"])
        changed = state.read(plan.slots, change) + change
        state.write(plan.slots, changed)
        if full is None:
            return changed.to(payload.dtype).view(payload.shape)
        y = full.new_empty(payload.shape)
        y[torch.tensor(plan.new, device=y.device)] = full
        y[torch.tensor(plan.seen, device=y.device)] = changed.to(payload.dtype)
        return y

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return self.inner.payload_nbytes(shape, torch.float32) + 8

    def sent_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, state: CodecState | None) -> int:
        return state.sent if isinstance(state, DeltaState) else self.first.payload_nbytes(shape, dtype)
