"""Runs scripts in forks of one process, which has imported what takes long.  `processes.forked` talks to it.

An order is a line of JSON on stdin: {"argv", "processes", "path"}; the answer one on stdout: [[exit code, what the
process wrote last], ...] by rank.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
import torch.distributed.fsdp  # noqa: E402, F401
import torch.distributed.pipelining  # noqa: E402, F401
import torch.distributed.tensor.parallel  # noqa: E402, F401
from torch.distributed import TCPStore  # noqa: E402

from helpers import build, trainers  # noqa: E402, F401

DEADLINE = 240.0


def child(order: dict[str, Any], rank: int, port: int, output: str) -> None:
    """Never returns."""
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(target, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.enable(file=2)  # says where it hangs; without a thread, as scripts may fork too
        if order["processes"] > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["processes"]), MASTER_ADDR="127.0.0.1",
                LOCAL_WORLD_SIZE=str(order["processes"]), MASTER_PORT=str(port),
                TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0",
            )  # fmt: skip
        if order["path"]:
            sys.path.insert(0, order["path"])
            importlib.invalidate_caches()
        sys.argv = order["argv"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def hold_store() -> tuple[int, int]:
    """A process that holds a store, and its port.  As under torchrun, the store outlives the ranks.

    This process must not hold it itself: a store answers in threads that look names up, and a rank forked meanwhile
    inherits the resolver's lock as taken, and waits for it for ever.
    """
    read, write = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(write, str(store.port).encode() + b"\n")
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)
    os.close(write)
    with open(read) as lines:
        return pid, int(lines.readline())


def wait(pid: int, until: float) -> int | None:
    """The exit code, or None for a process that had to be killed."""
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGABRT)
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def carry_out(order: dict[str, Any]) -> list[list[Any]]:
    keeper, port = hold_store() if order["processes"] > 1 else (None, 0)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/{rank}" for rank in range(order["processes"])]
        pids = []
        for rank, output in enumerate(outputs):
            pid = os.fork()
            if pid == 0:
                child(order, rank, port, output)
            pids.append(pid)
        until, codes = time.monotonic() + DEADLINE, []
        for pid in pids:
            codes.append(wait(pid, until))
            if codes[-1] != 0:
                until = min(until, time.monotonic() + 10)  # the other one may wait for it for ever
        words = [Path(output).read_text(errors="replace")[-5000:] for output in outputs]
    if keeper is not None:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
    return [list(one) for one in zip(codes, words, strict=True)]


def main() -> None:
    torch.set_num_threads(1)
    build("bert")  # what is imported late
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed is no answer
    for line in sys.stdin:
        answers.write(json.dumps(carry_out(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
