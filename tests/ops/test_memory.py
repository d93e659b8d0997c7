"""Encoding takes memory for the input, the payload and little else: the peak of a process for each case."""

import json

import pytest
from helpers.operators import needs_compiler
from helpers.processes import run

pytestmark = needs_compiler  # in plain torch it is the same for most codecs, and takes minutes

SPECS = [
    "uniform:bits=8,round=stochastic", "block:bits=4", "rotated:bits=4", "sort:bits=8", "kmeans:bits=4",
    "topk:ratio=0.1", "float8", "lowrank:rank=4", "rotated:bits=2",
]  # fmt: skip
# bfloat16 is the harder one: what is computed in fp32 takes twice the input's bytes.
CASES = [*((spec, "bfloat16") for spec in SPECS), ("block:bits=4", "float32"), ("sort:bits=8", "float32")]
LIMIT = 30 * 2**20  # a tile of 2**20 elements in fp32 is 4 MiB, of which a few are alive at once
# Imports once and forks a process for each case, whose peak begins at what the parent has.
SCRIPT = """
import json, os, resource, sys, torch
from hf_actcompress.codecs import parse_codec

def measure(spec, dtype):
    codec, dtype = parse_codec(spec), getattr(torch, dtype)
    codec.encode(torch.randn(2000, 256).to(dtype), codec.init_state())  # kernels, small caches
    x = torch.empty(2**25 // 256, 256, dtype=dtype)
    values = torch.randn(4096, 256)
    for part in x.split(4096):
        part.copy_(values)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = peak()
    payload = codec.encode(x, codec.init_state())
    return peak() - before - payload.nbytes, x.nbytes

torch.set_num_threads(1)
for case in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        print("found", json.dumps([case, measure(*case)]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    script = tmp_path_factory.mktemp("peaks") / "peak.py"
    script.write_text(SCRIPT)
    peaks, cases = {}, CASES
    # A case's peak differs by some MiB from one start of Python to the next, with the holes that the imports leave in
    # the heap: what is over the limit is measured in other processes, and the least is what it needs.
    for _ in range(3):
        for case, found in measured(script, cases).items():
            peaks[case] = min(found, peaks.get(case, found))
        cases = [case for case in cases if peaks[case][0] >= LIMIT]
        if not cases:
            break
    return peaks


def measured(script, cases):
    # Large tensors are mapped and given back at once, so that the peak is what is alive and not what malloc keeps.
    lines = run(script, json.dumps(cases), timeout=290, MALLOC_MMAP_THRESHOLD_=str(1 << 20)).stdout.splitlines()
    found = [json.loads(line.removeprefix("found ")) for line in lines if line.startswith("found ")]
    return {tuple(case): numbers for case, numbers in found}


@pytest.mark.parametrize(("spec", "dtype"), CASES)
def test_scratch_is_a_tile(peaks, spec, dtype):
    extra, size = peaks[spec, dtype]
    assert extra < LIMIT < size / 2, f"{extra / 2**20:.0f} MiB beside input and payload"
