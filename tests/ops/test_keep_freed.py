"""What a process frees is its next tensors' memory, without page faults: for good, or while a model is compressed."""

import ctypes

import pytest
from helpers.processes import run

from hf_actcompress import keep_freed_memory
from hf_actcompress.ops.cpu.malloc import TUNED, KeptMemory

BEGIN = """
import ctypes, os, resource, sys, torch
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

# Whether this is the process for that part: each begins with what the imports have left of the heap.
def alone(number):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return False
    print("part", number, flush=True)
    return True
"""
PART = """
if alone({number}):
    exec({text!r})
    sys.stdout.flush()
    os._exit(0)
"""
SIZES = """
for size in (1 << 20, 34 << 20):  # what glibc takes from its heap by then, and what it always maps
    faults(size)
"""
ATTACHED = """
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
config = ActCompressConfig(saved="block:bits=4", keep_freed_memory=True)
faults(34 << 20)
first = compress_model(model, config)
second = compress_model(torch.nn.Linear(4, 4), config)
faults(34 << 20)
first.remove()
faults(80 << 20)  # more than any hole that the heap may have by then
before = resident()
second.remove()
second.remove()
print("faults", (before - resident()) / (80 << 20))  # given back
faults(130 << 20)
"""
needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="malloc is not glibc's"
)


def plain(patch):
    for name in (*TUNED, "GLIBC_TUNABLES"):
        patch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    plain(monkeypatch)


def found(tmp_path, *texts, **environment):
    """What each of the texts prints, which run in processes of their own after one import."""
    parts = [PART.format(number=number, text=text) for number, text in enumerate(texts)]
    (tmp_path / "faults.py").write_text(BEGIN + "".join(parts))
    lines = run(tmp_path / "faults.py", **environment).stdout.splitlines()
    numbers = {}
    for line in lines:
        if line.startswith("part"):
            own = numbers.setdefault(int(line.split()[1]), [])
        elif line.startswith("faults"):
            own.append(float(line.split()[1]))
    return list(numbers.values())


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """In an environment without settings: fresh, kept, attached, and attached where the user has turned it on."""
    with pytest.MonkeyPatch.context() as patch:
        plain(patch)
        return found(
            tmp_path_factory.mktemp("faults"), SIZES, "assert keep_freed_memory()" + SIZES, ATTACHED,
            "keep_freed_memory()" + ATTACHED,
        )  # fmt: skip


@needs_glibc
def test_a_freed_tensor_is_the_next_ones_memory(usual):
    fresh, kept = usual[:2]
    # Of ten tensors. One may find something small where the last one ended, and move on.
    assert fresh[1] > 9
    assert max(kept) < 2


@needs_glibc
def test_saved_keeps_it_as_long_as_it_is_attached(usual):
    before, both, one, given_back, after = usual[2]
    assert before > 9 and after > 9
    assert both < 5 and one < 5
    assert given_back > 0.9


@needs_glibc
def test_what_the_user_has_turned_on_stays_on(usual):
    assert len(usual[3]) == 5 and max(usual[3]) < 5


@needs_glibc
@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TOP_PAD_": "1000"},
        {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"},
    ],
)
def test_settings_of_the_environment_stand(tmp_path, environment):
    attached, asked = found(tmp_path, ATTACHED, "assert not keep_freed_memory()\nfaults(34 << 20)", **environment)
    assert min(attached[:3]) > 9
    assert min(asked) > 9


def test_another_malloc_is_left_alone(monkeypatch):
    """Of another libc nothing is called, and the answer says so."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
    kept = KeptMemory()
    assert not kept.held
    kept.remove()
