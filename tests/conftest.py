"""Settings for the whole suite: one thread (machines are shared) and reproducible property tests.

TEST_DEVICE=cuda makes new tensors there, so that the tests of codecs and sites run on a GPU.
"""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if device := os.environ.get("TEST_DEVICE"):
    torch.set_default_device(device)
settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
