"""Batches of a pipeline: rows of a data set, in an order that a resumed run finds again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a row that only fills up
INPUTS = ("input_ids", "pixel_values")
# Side inputs: what later stages need besides the activation.
SIDE = ("attention_mask", "position_ids")


@dataclass
class Batch:
    """The batch of one step as a rank sees it.

    shape: of the inputs.
    ids: int64 [B], numbers of the samples; -1 for rows that only fill up.
    valid: number of rows that count; they come first.
    side: inputs of every stage (masks, positions).
    labels: on the rank of the last stage.
    inputs, extra: of the first stage, on rank 0 alone.
    """

    shape: tuple[int, ...]
    ids: Tensor
    valid: int
    side: dict[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    inputs: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


def training_batches(
    rows: Sequence[Any], collate: Callable[[list[Any]], Mapping[str, Tensor]], *, size: int, micro_batches: int,
    seed: int, epoch: int, start: int = 0,
) -> Iterator[Batch]:  # fmt: skip
    """The batches of an epoch, shuffled, from number `start` on."""
    generator = torch.Generator().manual_seed(seed * 7919 + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    yield from _batches(rows, order, collate, size, micro_batches, seed * 1009 + epoch, start)


def evaluation_batches(
    rows: Sequence[Any], collate: Callable[[list[Any]], Mapping[str, Tensor]], *, size: int, micro_batches: int,
    seed: int,
) -> Iterator[Batch]:  # fmt: skip
    """All rows in their own order."""
    yield from _batches(rows, list(range(len(rows))), collate, size, micro_batches, seed * 1009, 0)


def _batches(
    rows: Sequence[Any], order: list[int], collate: Callable[[list[Any]], Mapping[str, Tensor]], size: int,
    micro_batches: int, seed: int, start: int,
) -> Iterator[Batch]:  # fmt: skip
    for number in range(start, math.ceil(len(order) / size)):
        # Augmentation has a seed for each batch, so that a run can be resumed in the middle of an epoch.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed * 1000003 + number)
            batch = _batch(rows, order[number * size : (number + 1) * size], collate, micro_batches)
        yield batch  # outside of the fork: dropout draws from the rank's own generator


def _batch(
    rows: Sequence[Any], chosen: list[int], collate: Callable[[list[Any]], Mapping[str, Tensor]], micro_batches: int
) -> Batch:
    valid = len(chosen)
    fill = -valid % micro_batches  # micro-batches are equally large
    values = dict(collate([rows[i] for i in chosen + [chosen[-1]] * fill]))
    labels = values.pop("labels")
    if fill:
        labels = labels.clone()
        labels[valid:] = math.nan if labels.is_floating_point() else IGNORED
    name = next((name for name in INPUTS if name in values), None)
    if name is None:
        raise ValueError(f"A batch needs one of {', '.join(INPUTS)}; collate gave {sorted(values)}.")
    inputs = values.pop(name)
    side = {k: values.pop(k) for k in SIDE if k in values}
    ids = torch.tensor(chosen + [-1] * fill)
    return Batch(tuple(inputs.shape), ids, valid, side, labels, inputs, values)
