"""Profiles of the property tests, one thread for tiny tensors, and the implementations the operations are tested for.

RESA_TEST_PROFILE picks a profile: `dev` (default), `ci` (default where the variable CI is set: the same examples on
every run) or `nightly` (fresh randomness, many more examples, failures kept in .hypothesis/ for the next run).
"""

import os
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# A first call that loads libraries is slow without being wrong, so nothing is timed.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", max_examples=40, **common)
settings.register_profile("ci", max_examples=60, derandomize=True, database=None, **common)
settings.register_profile(
    "nightly", max_examples=2000, database=DirectoryBasedExampleDatabase(".hypothesis/examples"), **common
)
settings.load_profile(os.environ.get("RESA_TEST_PROFILE", "ci" if os.environ.get("CI") else "dev"))

# The tensors here are too small to share: more threads only add waiting, and vary with the machine.
torch.set_num_threads(1)

# Every package named here runs all tests of the operations.
IMPLEMENTATIONS = ["resa.reference"]


@pytest.fixture(scope="session", params=IMPLEMENTATIONS)
def ops(request):
    """The five operations of one implementation, found under the same file and function names in each."""
    blocks, attention = (import_module(f"{request.param}.{name}") for name in ("blocks", "attention"))
    return SimpleNamespace(
        block_bounds=blocks.block_bounds,
        score_blocks=blocks.score_blocks,
        select_blocks=blocks.select_blocks,
        sparse_attention=attention.sparse_attention,
        dense_attention=attention.dense_attention,
    )
