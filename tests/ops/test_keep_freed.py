"""What a process frees is its next tensors' memory, without page faults: for good, or while a model is compressed."""

import ctypes

import pytest
from helpers.processes import run

from hf_actcompress import keep_freed_memory
from hf_actcompress.ops.cpu.malloc import TUNED, KeptMemory

BEGIN = """
import ctypes, resource, torch
from hf_actcompress import ActCompressConfig, compress_model, keep_freed_memory

torch.set_num_threads(1)
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is 4096 bytes
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def faults(size):
    for _ in range(3):
        torch.empty(size, dtype=torch.uint8)[::4096].fill_(1)
    before = count()
    for _ in range(10):
        torch.empty(size, dtype=torch.uint8)[::4096].fill_(1)
    print("faults", (count() - before) * 4096 / size)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
"""
SIZES = """
for size in (1 << 20, 100 << 20):  # what glibc takes from its heap by then, and what it always maps
    faults(size)
"""
ATTACHED = """
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
config = ActCompressConfig(saved="block:bits=4", keep_freed_memory=True)
faults(100 << 20)
first = compress_model(model, config)
second = compress_model(torch.nn.Linear(4, 4), config)
faults(100 << 20)
first.remove()
faults(300 << 20)  # more than any hole that the heap may have by then
before = resident()
second.remove()
second.remove()
print("faults", (before - resident()) / (300 << 20))  # given back
faults(700 << 20)
"""
needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="malloc is not glibc's"
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*TUNED, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def found(tmp_path, text, **environment):
    (tmp_path / "faults.py").write_text(BEGIN + text)
    lines = run(tmp_path / "faults.py", **environment).stdout.splitlines()
    return [float(line.split()[1]) for line in lines if line.startswith("faults")]


@needs_glibc
def test_a_freed_tensor_is_the_next_ones_memory(tmp_path):
    fresh, kept = found(tmp_path, SIZES), found(tmp_path, "assert keep_freed_memory()" + SIZES)
    # Of ten tensors. One may find something small where the last one ended, and move on.
    assert fresh[1] > 9
    assert max(kept) < 2


@needs_glibc
def test_saved_keeps_it_as_long_as_it_is_attached(tmp_path):
    before, both, one, given_back, after = found(tmp_path, ATTACHED)
    assert before > 9 and after > 9
    assert both < 5 and one < 5
    assert given_back > 0.9


@needs_glibc
@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TOP_PAD_": "1000"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"},
    ],
)
def test_settings_of_the_environment_stand(tmp_path, environment):
    assert min(found(tmp_path, ATTACHED, **environment)[:3]) > 9
    assert min(found(tmp_path, "assert not keep_freed_memory()\nfaults(100 << 20)", **environment)) > 9


@needs_glibc
def test_what_the_user_has_turned_on_stays_on(tmp_path):
    assert max(found(tmp_path, "keep_freed_memory()" + ATTACHED)) < 5


def test_another_malloc_is_left_alone(monkeypatch):
    """Of another libc nothing is called, and the answer says so."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
    kept = KeptMemory()
    assert not kept.held
    kept.remove()
