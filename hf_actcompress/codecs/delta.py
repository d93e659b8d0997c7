"""Delta: the change of each sample's activation since it was last seen.

      sender                                      receiver
      x ──▶ x - m ──inner──▶ payload ═══ link ═══▶ m + decoded change = y
            m = 8 bits of y                        m = 8 bits of y

Fine-tuning changes activations little from epoch to epoch, so a change takes fewer bits than the value.  Both sides
keep the same cache `m`, made of what the receiver decoded.  Samples are told apart by numbers that the caller gives;
this file knows neither data sets nor links.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.scales import to_dtype
from .base import Codec, CodecState, Payload, Traits, check_choice, check_int
from .block import Block
from .sample_cache import Plan, SampleCache, current_ids


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
                    f"{self.name}: {codec} cannot be the codec of {role}: delta makes up for errors by itself, so "
                    f"no feedback is needed. Write delta+{getattr(codec, 'inner', codec)}."
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
        return SampleCache(self, site, seed)

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

    def with_bits(self, bits: int) -> Codec:
        return replace(self, inner=self.inner.with_bits(bits))

    def example_plan(self, shape: tuple[int, ...], new: int | None, state: SampleCache) -> Plan:
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
            parts["full"] = self.first.encode(rows, getattr(state, "full", None))
        if plan.seen:
            rows = x if not plan.new else x[torch.tensor(plan.seen, device=x.device)]
            tensors["check"] = state.check(plan.slots, x.device)
            change = rows.float() - state.read(plan.slots, x)
            parts["change"] = self.inner.encode(change, state.inner)
        payload = self._payload(x, tensors, parts)
        if isinstance(state, SampleCache):
            state.sent = payload.nbytes
        return payload, self._rebuild(payload, state, plan)

    def _planned(self, x: Tensor, state: CodecState | None) -> Plan:
        if not isinstance(state, SampleCache):
            return Plan([], [], list(range(x.shape[0] if x.dim() else 1)))
        plan, state.current = state.current, None
        if plan is None:
            ids = state.ids if state.frozen else current_ids()
            if ids is None and not state.frozen:
                raise ValueError(
                    f"{self}: training needs to know which samples a batch holds. Run the forward pass within "
                    "hf_actcompress.codecs.sample_ids(ids); transformers.Trainer does not hand them on, the loop of "
                    "hf_actcompress.pipeline does."
                )
            plan = state.plan(ids, tuple(x.shape))
        return plan

    def _decode_with(self, payload: Payload, state: CodecState | None) -> Tensor:
        if isinstance(state, SampleCache) and state.current is not None:
            plan, state.current = state.current, None
        else:
            plan = Plan([], [], range(payload.shape[0] if payload.shape else 1))
        if ("change" in payload.parts) != bool(plan.seen):
            raise ValueError(f"{self}: a change is decoded with the receiver's own state, which has to know the ids.")
        for name, rows, dtype in (("full", plan.new, payload.dtype), ("change", plan.seen, torch.float32)):
            if rows:
                part, shape = payload.parts[name], (len(rows), *payload.shape[1:]) if payload.shape else ()
                if (part.shape, part.dtype) != (shape, dtype):
                    raise self._damaged(f"'{name}' has {part.shape} and {part.dtype}, and needs {shape} and {dtype}")
        if plan.seen:
            check, = self._sized(payload, check=(1, torch.int64))
            if int(state.check(plan.slots, check.device)) != int(check):  # what comes over a link is waited for anyway
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
            return to_dtype(changed, payload.dtype).view(payload.shape)
        y = full.new_empty(payload.shape)
        y[torch.tensor(plan.new, device=y.device)] = full
        y[torch.tensor(plan.seen, device=y.device)] = to_dtype(changed, payload.dtype)
        return y

    def _payload_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return self.inner.payload_nbytes(shape, torch.float32) + 8

    def sent_nbytes(self, shape: tuple[int, ...], dtype: torch.dtype, state: CodecState | None) -> int:
        return state.sent if isinstance(state, SampleCache) else self.first.payload_nbytes(shape, dtype)
