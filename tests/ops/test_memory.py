"""Encoding holds the input, the payload and little else: the peak of a process of its own."""

import pytest
from helpers.processes import run

SCRIPT = """
import resource, sys, torch
from hf_actcompress.codecs import parse_codec

torch.set_num_threads(1)
codec, dtype = parse_codec(sys.argv[1]), getattr(torch, sys.argv[2])
codec.encode(torch.randn(2000, 256).to(dtype), codec.init_state())  # imports, kernels, small caches
x = torch.empty(2**25 // 256, 256, dtype=dtype)
for part in x.split(4096):
    part.copy_(torch.randn(part.shape))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
payload = codec.encode(x, codec.init_state())
print("bytes", peak() - before - payload.nbytes, x.nbytes)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spec",
    ["uniform:bits=8,round=stochastic", "block:bits=4", "rotated:bits=4", "sort:bits=8", "kmeans:bits=4",
     "topk:ratio=0.1", "float8", "lowrank:rank=4", "rotated:bits=2"],
)  # fmt: skip
def test_scratch_is_a_tile(tmp_path, spec, dtype):
    (tmp_path / "peak.py").write_text(SCRIPT)
    out = run(tmp_path / "peak.py", spec, dtype, HF_ACTCOMPRESS_COMPILE="0").stdout
    extra, size = (int(v) for v in out.split()[-2:])
    # A tile of 2**20 elements in fp32 is 4 MiB, of which a few are alive at once.
    assert extra < 30 * 2**20 < size / 2, f"{extra / 2**20:.0f} MiB beside input and payload"
