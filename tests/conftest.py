"""Settings for the whole suite: one thread (machines are shared) and reproducible property tests."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when triton is imported, by whichever test is first: its own functions are interpreted from then on.
    os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile(
    "suite", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def what_is_imported_is_no_garbage():
    """A Trainer collects garbage, which takes half a second where it goes through all that has been imported."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests that share what a module's fixture made run on one worker (--dist loadgroup): it is made once."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        found = [every[-1] for every in item._fixtureinfo.name2fixturedefs.values()]
        if any(fixture.scope == "module" and fixture.baseid == file for fixture in found):
            item.add_marker(pytest.mark.xdist_group(file))
