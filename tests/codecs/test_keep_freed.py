"""keep_freed_memory: what a process frees is its next tensors' memory, without page faults."""

import ctypes

import pytest
from helpers.processes import run

from hf_actcompress import keep_freed_memory

SCRIPT = """
import ctypes, resource, sys, torch
from hf_actcompress import keep_freed_memory

torch.set_num_threads(1)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is 4096 bytes
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in (1 << 20, 100 << 20):  # what glibc takes from its heap by then, and what it always maps
    for _ in range(3):
        torch.ones(size // 4)
    before = faults()
    for _ in range(10):
        torch.ones(size // 4)
    print("faults", (faults() - before) * 4096 / size)
"""


def glibc() -> bool:
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.mark.skipif(not glibc(), reason="malloc is not glibc's")
def test_a_freed_tensor_is_the_next_ones_memory(tmp_path):
    (tmp_path / "faults.py").write_text(SCRIPT)
    fresh = [float(line.split()[1]) for line in run(tmp_path / "faults.py", "as it is").stdout.splitlines()]
    kept = [float(line.split()[1]) for line in run(tmp_path / "faults.py", "keep").stdout.splitlines()]
    # Of ten tensors. One may find something small where the last one ended, and move on.
    assert fresh[1] > 9
    assert max(kept) < 2


def test_another_malloc_is_left_alone(monkeypatch):
    """Of another libc nothing is called, and the answer says so."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
