"""Bytes from every rank to every other one, at the full rate of the link in both directions.

gloo sends one message over a connection at a time: a large one keeps what comes the other way waiting, so that a link
carries one direction at a time.  In segments of 64 KiB, eight under way, both directions run (3 MB each way over
100 Mbit/s: 0.25 s, in one message 0.48 s).

It knows tensors of bytes and a process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch.distributed as dist
from torch import Tensor

SEGMENT, UNDER_WAY = 1 << 16, 8


class Transport:
    """Exchanges over `group`, several at a time: each has a thread, so that their order may differ between ranks."""

    def __init__(self, group: dist.ProcessGroup | None, most: int) -> None:
        self.group = group
        self.ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        self.rank = dist.get_rank(group)
        self.host = "cpu:gloo" in dist.get_backend_config(group)
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="hf_actcompress transport")

    def swap(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], tag: int) -> Future[None]:
        """Send `outgoing[k]` to rank k of the group and receive `incoming[k]` from it (uint8 [n] each).

        tag: another one for each exchange under way, alike on all ranks.
        """
        if self.host and outgoing[0].device.type == "cpu":
            return self._pool.submit(self._segments, outgoing, incoming, tag)
        done: Future[None] = Future()
        dist.all_to_all(list(incoming), list(outgoing), group=self.group)  # in the order of the current stream
        done.set_result(None)
        return done

    def _segments(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor], tag: int) -> None:
        incoming[self.rank].copy_(outgoing[self.rank])
        others = [k for k in range(len(self.ranks)) if k != self.rank]
        under_way: list[list[dist.Work]] = []
        pieces = {k: (outgoing[k].split(SEGMENT), incoming[k].split(SEGMENT)) for k in others}
        for at in range(max((len(pieces[k][0]) for k in others), default=0)):
            works = []
            for k in others:
                works.append(dist.isend(pieces[k][0][at], self.ranks[k], group=self.group, tag=tag))
                works.append(dist.irecv(pieces[k][1][at], self.ranks[k], group=self.group, tag=tag))
            under_way.append(works)
            if len(under_way) == UNDER_WAY:
                for work in under_way.pop(0):
                    work.wait()
        for work in (work for works in under_way for work in works):
            work.wait()

    def close(self) -> None:
        self._pool.shutdown()
