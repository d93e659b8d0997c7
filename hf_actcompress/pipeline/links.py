"""Buffers between ranks: posted ahead, waited for with a bound, and errors that say who did not answer.

It knows neither codecs nor stages.  Everything goes over gloo, from memory of the host: slow links are networks.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from .engine import default_store
from .frames import HEADER, framed, seal, unseal

REASON = "hf_actcompress/reason"


class LinkError(RuntimeError):
    """A peer that does not answer."""


class Links:
    """The sends and receives of one stage.

    timeout: seconds that a wait may take.
    `waited` counts the seconds spent waiting, `bytes` what was sent.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout={timeout!r}: give the seconds that a stage waits for a peer, above 0.")
        if "cpu:gloo" not in dist.get_backend_config(group):
            raise ValueError(
                f"Payloads travel over gloo, and the process group has {dist.get_backend_config(group)!r}: use "
                "init_process_group('gloo'), or 'cpu:gloo,cuda:nccl' where NCCL is needed besides."
            )
        self.group, self.timeout, self.waited, self.bytes = group, timeout, 0.0, 0
        self._sent: dict[int, tuple[dist.Work, str, int, Tensor]] = {}
        self._awaited: dict[int, tuple[dist.Work, Tensor, str, int]] = {}

    def send(self, buffer: Tensor, peer: int, tag: int, what: str) -> None:
        """Send `buffer`, which must stay as it is until `flush`."""
        self._settle(tag)
        self.bytes += buffer.numel()
        try:
            self._sent[tag] = dist.isend(buffer, peer, group=self.group, tag=tag), what, peer, buffer
        except RuntimeError as error:
            raise self._lost(what, peer, error) from error

    def expect(self, buffer: Tensor, peer: int, tag: int, what: str) -> None:
        """Post a receive of the message with `tag` into `buffer`, without waiting."""
        try:
            self._awaited[tag] = dist.irecv(buffer, peer, group=self.group, tag=tag), buffer, what, peer
        except RuntimeError as error:
            raise self._lost(what, peer, error) from error

    def expects(self, tag: int) -> bool:
        return tag in self._awaited

    def collect(self, tag: int) -> Tensor:
        """Wait for the message with `tag`; returns its buffer."""
        work, buffer, what, peer = self._awaited.pop(tag)
        self._wait(work, what, peer)
        return buffer

    def flush(self) -> None:
        """Wait until everything is sent."""
        for tag in list(self._sent):
            self._settle(tag)

    def _settle(self, tag: int) -> None:
        if tag in self._sent:
            self._wait(*self._sent.pop(tag)[:3])

    def _wait(self, work: dist.Work, what: str, peer: int) -> None:
        began = time.perf_counter()
        try:
            work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise self._lost(what, peer, error) from error
        finally:
            self.waited += time.perf_counter() - began

    def _lost(self, what: str, peer: int, error: RuntimeError) -> LinkError:
        if "timed out" in str(error).lower():
            said = reason()
            why = f"rank {peer} did not answer within {self.timeout:g} s. It hangs, or computes longer than that "
            why += "(then raise the timeout)."
        else:
            said = reason(patience=1.0)  # the peer writes before it goes
            why = f"the connection to rank {peer} has closed: the process there has ended."
        return LinkError(f"{what}: {why}" + (f" Reported before: {said}" if said else ""))


def report(text: str) -> None:
    """Tell the other processes why this one fails; the first report is kept."""
    try:
        default_store().compare_set(REASON, "", f"rank {dist.get_rank()}: {text}")
    except (RuntimeError, ValueError):
        pass  # the store has gone with the process that kept it


def reason(patience: float = 0.0) -> str | None:
    """The report of another process, if there is one within `patience` seconds."""
    until = time.monotonic() + patience
    try:
        store = default_store()
        while not store.check([REASON]):
            if time.monotonic() > until:
                return None
            time.sleep(0.05)
        return store.get(REASON).decode()
    except (RuntimeError, ValueError):
        return None


def exchange(texts: dict[int, str], links: Links, tags: dict[int, tuple[int, int]], what: str) -> dict[int, str]:
    """Send a text to each peer and return theirs, {key: text}.  tags: {key: (peer, tag)}."""
    for key, (peer, tag) in tags.items():
        links.expect(framed(b"", TEXT), peer, tag, what)
        buffer = framed(texts[key].encode()[:TEXT], TEXT)
        seal(buffer, 0)
        links.send(buffer, peer, tag, what)
    found = {}
    for key, (_, tag) in tags.items():
        buffer = links.collect(tag)
        unseal(buffer, 0, where=what)
        found[key] = bytes(buffer[HEADER:].numpy()).rstrip(b"\0").decode()
    links.flush()
    return found


TEXT = 16384
