"""Other processes: the interpreter, torchrun and accelerate of this environment, offline and with one thread."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    # torch looks the names of loopback sockets up; a resolver that does not answer must not cost ten seconds each.
    ours = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "RES_OPTIONS": "timeout:1 attempts:1"}
    return {**kept, **ours, **extra}


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def run(*command: object, timeout: int = 240, check: bool = True, **extra: str) -> subprocess.CompletedProcess:
    """`python command...`; a failure shows the process's own words."""
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment(**extra), capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    if check and result.returncode:
        words = f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        raise AssertionError(f"{command} ended with {result.returncode}:\n{words}")
    return result


def torchrun(*command: object, **extra: str) -> subprocess.CompletedProcess:
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_addr", "127.0.0.1", "--master_port")
    return run(*launcher, free_port(), *command, **extra)


@functools.cache
def _forks() -> subprocess.Popen:
    """helpers/forks.py, for as long as this process runs."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forks.py"))], cwd=ROOT, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    atexit.register(server.stdin.close)  # which ends it
    return server


def forked(script: Path, *arguments: object, processes: int = 1, path: Path | None = None) -> None:
    """`python script arguments...` in processes that begin with torch and transformers imported, as that takes longer
    than most of what they are there for.

    With two processes each has the environment of torchrun.  path: in front of their sys.path.
    """
    server = _forks()
    order = {"argv": list(map(str, (script, *arguments))), "processes": processes, "path": path and str(path)}
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise AssertionError(f"helpers/forks.py has ended with {server.wait()}")
    for code, words in json.loads(answer):
        assert code == 0, f"{script} ended with {code}:\n{words}"
