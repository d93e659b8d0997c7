"""The process of a rank: joining the others, sharing small values with them, ending when something fails."""

from __future__ import annotations

import gc
import hmac
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .links import LinkError, report
from .wire import WireError

logger = logging.getLogger(__name__)


def join(timeout: float, secret: str | None = None) -> tuple[int, int]:
    """(rank, number of ranks) of a process that torchrun or accelerate has launched.

    secret: a token that all ranks must know; None: the environment variable HF_ACTCOMPRESS_SECRET, or none.
    Raises LinkError if the others do not come within `timeout` seconds or the port is taken, ValueError for a single
    process and for a rank that does not know the secret.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) < 2:
        raise ValueError(
            "A pipeline needs two processes or more, and this is the only one: launch it by `torchrun "
            "--nproc_per_node 2 SCRIPT ...` (on each of two hosts: `torchrun --nnodes 2 --node_rank R ...`)."
        )
    if not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo", timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
                raise LinkError(
                    f"Rank {os.environ['RANK']}: port {os.environ.get('MASTER_PORT')} on this machine is in use by "
                    "another program. Give all ranks another --master_port."
                ) from error
            raise LinkError(
                f"Rank {os.environ['RANK']}: not all {os.environ['WORLD_SIZE']} processes came within {timeout:g} s. "
                f"Start the others, or raise --timeout. ({str(error).splitlines()[0][:200]})"
            ) from error
    prove(os.environ.get("HF_ACTCOMPRESS_SECRET", "") if secret is None else secret)
    return dist.get_rank(), dist.get_world_size()


def prove(secret: str) -> None:
    """Every rank shows the others that it knows `secret`, without sending it: a keyed hash of random bytes of all.

    Keeps processes out that do not know it.  What is sent later is neither encrypted nor signed.
    Raises ValueError, which names the ranks that have another one.
    """
    rank, size = dist.get_rank(), dist.get_world_size()

    def everyones(data: bytes) -> list[bytes]:
        found = [torch.empty(32, dtype=torch.uint8) for _ in range(size)]
        dist.all_gather(found, torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return [bytes(one.numpy()) for one in found]

    def answer(number: int) -> bytes:
        return hmac.digest(secret.encode(), b"".join(challenges) + number.to_bytes(4, "big"), "sha256")

    challenges = everyones(secrets.token_bytes(32))
    answers = everyones(answer(rank))
    wrong = [k for k in range(size) if not hmac.compare_digest(answers[k], answer(k))]
    if wrong:
        raise ValueError(
            f"Rank {rank}: {'ranks' if len(wrong) > 1 else 'rank'} {', '.join(map(str, wrong))} of this run has "
            "another --secret than this one, or none. Give all the same, or look who has joined."
        )


def share(value: Any, source: int = 0) -> Any:
    """A small JSON value of rank `source` on every rank."""
    data = json.dumps(value).encode() if dist.get_rank() == source else b""
    length = torch.tensor([len(data)])
    dist.broadcast(length, source)
    buffer = torch.frombuffer(bytearray(data.ljust(int(length))), dtype=torch.uint8)
    dist.broadcast(buffer, source)
    return json.loads(bytes(buffer.numpy()))


def leave() -> None:
    """End the process group and its threads at the end of a program; does nothing where there is no group.

    A gloo thread that frees tensors while the interpreter shuts down aborts a finished program ("terminate called
    without an active exception", https://github.com/pytorch/pytorch/issues/190489).  `destroy_process_group` waits for
    these threads only if nothing else refers to the group.  A Trainer's DistributedDataParallel does, in cycles that
    only the garbage collector frees, so it is collected first.  Do not call this in a program that failed: waiting for
    the others would hang.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        time.sleep(0.1)  # DTensor's caches may still refer to a group: time for its threads to finish


def guarded(main: Callable[[], Any]) -> Any:
    """Run `main` as a rank's whole program: a failure ends this process with one line that says what happened.

    An interpreter that ends in the usual way would wait for peers that are gone.
    """
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)  # prints its whole plan on errors
    try:
        value = main()
        if dist.is_initialized():
            dist.barrier()
        leave()
        return value
    except Exception as error:
        if os.environ.get("HF_ACTCOMPRESS_TRACEBACK"):
            logger.exception("The program has failed.")
        rank = os.environ.get("RANK", "0")
        told = isinstance(error, (LinkError, WireError, ValueError))
        text = str(error) if told else f"{type(error).__name__}: {_short(error)}"
        if dist.is_initialized():
            report(text)
        print(f"\nerror: {'' if text.startswith('Rank ') else f'rank {rank}: '}{text}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


def _short(error: BaseException) -> str:
    """torch wraps a stage's own error into a description of its arguments."""
    said = " ".join(str(error).split())[:300]
    return f"{said} ({_short(error.__cause__)})" if error.__cause__ is not None else said
