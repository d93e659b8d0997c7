"""What both sides of a link remember of each sample: the last decoded activation, in 8 bits.

Used by delta.py.  Samples are told apart by numbers that the caller gives.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import CodecState

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


def current_ids() -> list[int] | None:
    """The samples that `sample_ids` named, or None outside of it."""
    return _ids.get()


@dataclass(frozen=True)
class Plan:
    """What happens to the rows of one batch: `seen` are sent as changes of the cache's `slots`, `new` in full; of
    these the rows `kept` go to the slots `places`."""

    seen: list[int]
    slots: list[int]
    new: Sequence[int]
    kept: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class SampleCache(CodecState):
    """One side's cache: sample -> slot, and the slots' values in 8 bits.

    codec: the `delta` codec whose state this is (its `cache` in MiB, `evict`, and the states of its two codecs).

    It is large, so unlike other states it is changed in place; a snapshot holds copies of the batch's rows only.  It
    lies on the device of the activations, so that nothing waits for it.
    """

    def __init__(self, codec: Any, site: str, seed: int) -> None:
        self.codec, self.site = codec, site
        self.inner = codec.inner.init_state(f"{site}/change", seed)
        self.full = codec.first.init_state(f"{site}/full", seed)
        self.shape: tuple[int, ...] | None = None  # of one sample
        self.slots: OrderedDict[int, int] = OrderedDict()
        self.codes = torch.empty(0, 0, dtype=torch.uint8)
        self.scales = torch.empty(0, 0, 2, dtype=torch.float32)
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
        """Decide how each row of the next batch is sent, and make room for those that are new.

        ids: the samples of a batch of `shape`; None, and numbers below 0, are not to be remembered.
        Two caches that see the same batches in the same order decide alike.
        Raises ValueError if there are not as many numbers as rows.
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
        """fp32 [k, *shape] on the device of `like`."""
        codes, scales = self._rows(slots, like.device)
        rows = codes.view(len(slots), -1, GROUP).float() * scales[..., 1:] + scales[..., :1]
        width = math.prod(self.shape)
        return rows.view(len(slots), -1)[:, :width].reshape(len(slots), *self.shape)

    def _rows(self, slots: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Codes and scales of those slots; the cache moves to that device."""
        self.codes, self.scales = self.codes.to(device), self.scales.to(device)
        index = torch.tensor(slots, device=device)
        return self.codes[index], self.scales[index]

    def check(self, slots: list[int], device: torch.device) -> Tensor:
        """int64 [1]: differs, all but surely, where the caches of the two sides do, in codes or scales."""
        words = [t.view(len(slots), -1).view(torch.int64) for t in self._rows(slots, device)]
        words = torch.cat(words, 1).view(-1)
        # Odd, so that no word is lost.
        weights = (2 * torch.arange(words.numel(), device=device) + 1) * 0x9E3779B97F4A7C1
        return (words * weights).sum(dim=0, keepdim=True)  # modulo 2**64

    def write(self, slots: list[int], rows: Tensor) -> None:
        """Keep fp32 `rows` [k, *shape] in 8 bits; groups whose range is not finite stay as they were."""
        if not slots or self.frozen:
            return
        flat = rows.reshape(len(slots), -1)
        # The last group is filled up with values of its own row.
        filled = torch.nn.functional.pad(flat[:, None], (0, -flat.shape[1] % GROUP), mode="replicate")[:, 0]
        groups = filled.view(len(slots), -1, GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        step = (high - low) / 255
        codes = ((groups - low) / step.clamp_min(1e-30)).round_().clamp_(0, 255).nan_to_num_(0.0).to(torch.uint8)
        self._grow(max(slots) + 1, groups.shape[1])
        before, scales = self._rows(slots, rows.device)
        good = step.isfinite()
        index = torch.tensor(slots, device=rows.device)
        self.codes[index] = torch.where(good, codes, before.view(codes.shape)).view(len(slots), -1)
        self.scales[index] = torch.where(good, torch.cat([low, step], dim=-1), scales)

    def _grow(self, slots: int, groups: int) -> None:
        have = len(self.codes)
        if slots > have:
            size = min(self.capacity, max(slots, 2 * have, 64))
            codes = self.codes.new_zeros(size, groups * GROUP)
            scales = self.scales.new_zeros(size, groups, 2)
            if have:
                codes[:have], scales[:have] = self.codes, self.scales
            self.codes, self.scales = codes, scales

    # -- as any state ------------------------------------------------------------------------------------------------
    def snapshot(self) -> "SampleCache":
        """The rows of the samples at hand (`sample_ids`), which a repeated call finds as they are now."""
        copy = SampleCache.__new__(SampleCache)
        copy.__dict__.update(self.__dict__)
        copy.inner = None if self.inner is None else self.inner.snapshot()
        copy.full = None if self.full is None else self.full.snapshot()
        copy.ids = self.ids if self.frozen else _ids.get()
        copy.frozen, copy.current = True, None
        known = [i for i in dict.fromkeys(copy.ids or ()) if i in self.slots]
        index = torch.tensor([self.slots[i] for i in known], dtype=torch.int64, device=self.codes.device)
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
