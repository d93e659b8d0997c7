"""One training step, counted: forward, loss, backward, optimizer."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .tracker import BACKWARD, OPTIMIZER, Event, Storage, Tracker

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


@dataclass(frozen=True)
class Counted:
    """What a step was counted to take, in bytes.

    always: parameters, buffers, optimizer state and the batch.
    held: what is there after the forward pass and was not before: what autograd holds, and the loss.
    """

    parameters: int
    trained: int  # of the parameters, those with gradients
    gradients: int
    optimizer: int
    batch: int
    held: int
    events: list[Event]
    flops: dict[str, int]
    moved: dict[str, int]
    alive_at: Callable[[int], list[Storage]] = field(repr=False)
    shapes: set[tuple[int, ...]] = field(repr=False)

    @property
    def always(self) -> int:
        return self.parameters + self.optimizer + self.batch

    @property
    def peak(self) -> int:
        return max(event.live for event in self.events)

    @property
    def peak_event(self) -> int:
        """The index of the event with the most bytes."""
        lives = [event.live for event in self.events]
        return lives.index(max(lives))


def loss_of(outputs: Any, labels: Tensor | None) -> Tensor:
    """The model's own loss, else cross entropy of its logits."""
    loss = getattr(outputs, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    logits = outputs if isinstance(outputs, Tensor) else outputs[0]
    assert labels is not None
    return nn.functional.cross_entropy(logits.float(), labels)


def forward(model: nn.Module, batch: dict[str, Any], autocast: bool, device: str) -> Tensor:
    """The loss of a batch, whose values under "args" are given by position."""
    named = {key: value for key, value in batch.items() if key not in ("args", "targets")}
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        return loss_of(model(*batch.get("args", ()), **named), batch.get("targets"))


def prepare(model: nn.Module, optimizer: str) -> torch.optim.Optimizer:
    """The optimizer, with the state that it has after its first step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    made = OPTIMIZERS[optimizer](trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    made.step()
    made.zero_grad()
    return made


def count(
    model: nn.Module, batch: dict[str, Any], method: Callable[[nn.Module, Tracker], Any],
    optimizer: torch.optim.Optimizer, *, autocast: bool = False, device: str = "cpu", on_cpu: bool = True,
) -> Counted:  # fmt: skip
    """Count a step of `model` in `method`.  Where tensors have no values, this is called under FakeTensorMode.

    optimizer: with its state (`prepare`).  on_cpu: see Tracker.
    """
    tracker = Tracker(device, on_cpu)
    parameters = tracker.watch((*model.parameters(), *model.buffers()), "parameters")
    state = tracker.watch(tensors_of(optimizer.state.values()), "optimizer")
    rows = tracker.watch(tensors_of([batch]), "batch")
    trained = [p for p in model.parameters() if p.requires_grad]
    with _no_collection(), method(model, tracker), tracker.modules_of(model), tracker:
        before = tracker.live
        loss = forward(model, batch, autocast, device)
        held = tracker.sweep() - before
        tracker.phase = BACKWARD
        loss.backward()
        tracker.phase = OPTIMIZER
        del loss
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        names = {tracker.number_of(p.grad) for p in trained if p.grad is not None}
        optimizer.step()
        tracker.events.append(Event(OPTIMIZER, "", "optimizer", tracker.sweep()))
    for number in names - {None}:
        tracker.storages[number] = tracker.storages[number]._replace(kind="gradients")
    optimizer.zero_grad()
    return Counted(parameters, sum(p.nbytes for p in trained), gradients, state, rows, held, tracker.events,
                   dict(tracker.flops), dict(tracker.moved), tracker.alive_at,
                   {storage.shape for storage in tracker.storages.values()})  # fmt: skip


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """What is in cycles is freed at a time that depends on what ran before."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def tensors_of(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_of(value.values())
        elif isinstance(value, (list, tuple)):
            yield from tensors_of(value)
