"""Parameters that stages of several ranks have: tied embeddings and heads, tables that every block reads.

Each rank holds a copy.  After a step's backward passes every rank sends its gradient to the other ranks that have the
parameter, and all add them up in the same order: the copies get the same gradient, to the last bit, and stay equal.

It knows the stages' ranks, and neither codecs nor schedules.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .frames import HEADER, framed, number_of, seal, unseal
from .links import Links

TAG = 1 << 30  # beyond those of stages


class Shared:
    """Which stages of one `split` have which parameters.

    `stages`: {name in the unsplit model: numbers of the stages}, of parameters that two stages or more have.
    """

    def __init__(self) -> None:
        self.stages: dict[str, tuple[int, ...]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._owners: dict[str, int] = {}  # of names in a state dict that are in no layer
        self._finished: dict[int, int] = {}
        self._before: dict[str, Tensor] | None = None
        self.bytes = 0

    def find(self, model: nn.Module, stages: Sequence[nn.Module], parts: Sequence[tuple[str, ...]]) -> None:
        """parts: of each stage, how the names in its own layers begin."""
        having: dict[int, list[int]] = {}
        for number, stage in enumerate(stages):
            for p in stage.parameters():
                having.setdefault(id(p), []).append(number)
        for name, p in model.named_parameters():
            if len(having.get(id(p), ())) > 1:
                self.stages[name], self._parameters[name] = tuple(having[id(p)]), p
        within = tuple(begin for one in parts for begin in one)
        every = dict(model.named_parameters(remove_duplicate=False))
        for name in model.state_dict():
            if not name.startswith(within):
                p = every.get(name)
                self._owners[name] = 0 if p is None else min(having.get(id(p), [0]))

    def owner(self, name: str) -> int | None:
        """The stage whose state dict has a parameter or buffer that is in no layer."""
        return self._owners.get(name)

    def is_shared(self, p: nn.Parameter) -> bool:
        return any(p is one for one in self._parameters.values())

    def counts(self, p: nn.Parameter, stage: Any) -> bool:
        """Whether this rank is the one that counts `p` in what is summed over ranks (norms): the first that has it."""
        for name, one in self._parameters.items():
            if one is p:
                ranks = [stage._resolve_peer_global_rank(k) for k in self.stages[name]]
                return min(ranks) == stage._resolve_peer_global_rank(stage.stage_index)
        return True

    # -- a step ------------------------------------------------------------------------------------------------
    def begin(self) -> None:
        """A step begins: gradients of earlier ones, which are summed already, are put aside."""
        if self._before is None:
            self._before = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
            for name in self._before:
                self._parameters[name].grad = None

    def finish(self, stage: Any, scale: int, links: Links, checksum: bool) -> None:
        """A stage has done all backward passes of the step.  After the last one of this rank gradients are summed.

        scale: what they are divided by.
        """
        if not self.stages:
            return
        own = [k for k in range(stage.num_stages) if stage._is_same_rank(k)]
        self._finished[stage.stage_index] = scale
        if set(own) <= set(self._finished):
            self._finished.clear()
            self._sum(stage, scale, links, checksum)

    def _sum(self, stage: Any, scale: int, links: Links, checksum: bool) -> None:
        here = stage._resolve_peer_global_rank(stage.stage_index)
        ranks = {name: sorted({stage._resolve_peer_global_rank(k) for k in ks}) for name, ks in self.stages.items()}
        mine = {name: having for name, having in ranks.items()
                if here in having and self._parameters[name].requires_grad}  # fmt: skip
        peers = sorted({rank for having in mine.values() for rank in having} - {here})
        grads = {name: {here: _dense(self._parameters[name].grad)} for name in mine}
        number, what = number_of(stage.steps), f"Rank {here}, step {stage.steps}, gradients of tied parameters"
        for peer in peers:
            names = [name for name, having in mine.items() if peer in having]
            size = len(names) + sum(_nbytes(self._parameters[n]) for n in names)
            links.expect(framed(b"", size), peer, _tag(peer, here), f"{what} from rank {peer}")
            body = torch.zeros(size, dtype=torch.uint8)
            at = len(names)
            for place, name in enumerate(names):
                grad = grads[name][here]
                end = at + _nbytes(self._parameters[name])
                if grad is not None:
                    body[place] = 1
                    body[at:end] = grad.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
                at = end
            buffer = framed(body)
            seal(buffer, number, self._fingerprint(names), checksum=checksum)
            self.bytes += buffer.numel()
            links.send(buffer, peer, _tag(here, peer), f"{what} to rank {peer}")
        for peer in peers:
            names = [name for name, having in mine.items() if peer in having]
            buffer = links.collect(_tag(peer, here))
            unseal(
                buffer, number, self._fingerprint(names), f"{what} from rank {peer}", checksum, ", ".join(names)
            )
            body, at = buffer[HEADER:], len(names)
            for place, name in enumerate(names):
                p = self._parameters[name]
                end = at + _nbytes(p)
                grads[name][peer] = body[at:end].clone().view(p.dtype).view(p.shape) if body[place] else None
                at = end
        links.flush()
        for name, by_rank in grads.items():
            p, found = self._parameters[name], [by_rank[rank] for rank in sorted(by_rank)]
            found = [grad.to(p.device) for grad in found if grad is not None]
            if found:
                total = found[0].clone()
                for grad in found[1:]:
                    total += grad
                p.grad = total.div_(scale) if scale != 1 else total
        for name, grad in (self._before or {}).items():
            p = self._parameters[name]
            p.grad = grad if p.grad is None else p.grad + grad
        self._before = None

    def _fingerprint(self, names: Sequence[str]) -> int:
        """Of what is in a message: a rank that ties other parameters sends another one."""
        return zlib.crc32(str([(name, tuple(self._parameters[name].shape)) for name in names]).encode())


def _tag(sender: int, receiver: int) -> int:
    return TAG + sender * 4096 + receiver


def _dense(grad: Tensor | None) -> Tensor | None:
    return grad.to_dense() if grad is not None and grad.is_sparse else grad


def _nbytes(p: Tensor) -> int:
    return p.numel() * p.element_size()
