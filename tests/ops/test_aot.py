"""Triton kernels compile ahead of time for GPUs of two kinds, and keep their values in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4", reason="triton is not installed: kernels are not compiled")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("group", [128, 192])
def test_kernels_for_two_architectures(tmp_path, group):
    # In a process of its own: in this one the kernels may have been imported for Triton's interpreter.
    codec = f"block:bits=4,equalize=none,group={group}"
    command = [sys.executable, "benchmarks/kernels_compiled.py", "--codecs", codec, "--dtypes",
               "bfloat16", "--steps", "--results", str(tmp_path / "kernels.json")]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    record = json.loads((tmp_path / "kernels.json").read_text())
    kernels = record["kernels"]
    operators = {operator for row in kernels.values() for operator in row["operators"]}
    assert operators == {"quantize_groups", "dequantize_groups", "roundtrip_groups"}
    for name, row in kernels.items():
        assert row["targets"].keys() == {"sm_80", "sm_90"}
        for use in row["targets"].values():
            assert use["spilled"] == 0 and 0 < use["registers"] <= 255, (name, use)
    (launches,) = record["launches"].values()
    assert launches == {"encode": [1, 0], "decode": [1, 0], "roundtrip": [1, 0]}  # ours, torch's
