"""Profiles of the property tests, one thread for tiny tensors, Triton's interpreter, and the backends to test.

RESA_TEST_PROFILE picks a profile: `dev` (default), `ci` (default where the variable CI is set: the same examples on
every run) or `nightly` (fresh randomness, many more examples, failures kept in .hypothesis/ for the next run).

RESA_TEST_DEVICE says where the Triton kernels run: `cpu` (default), in Triton's interpreter, or `cuda`, compiled.
`pytest -m fast` runs just the tests of the kernels.
"""

import os
import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

import interpreter
from backends import BACKENDS, REFERENCE, TRITON
from strategies import DEVICE

# A first call that loads libraries is slow without being wrong, so nothing is timed.
common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", max_examples=40, **common)
settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **common)
settings.register_profile(
    "nightly", max_examples=2000, database=DirectoryBasedExampleDatabase(".hypothesis/examples"), **common
)
PROFILE = os.environ.get("RESA_TEST_PROFILE", "ci" if os.environ.get("CI") else "dev")
settings.load_profile(PROFILE)
if PROFILE == "nightly":  # thousands of examples take longer than pytest-timeout allows a test
    os.environ["PYTEST_TIMEOUT"] = "0"

# The tensors here are too small to share: more threads only add waiting, and vary with the machine.
torch.set_num_threads(1)

# `make test-vllm` runs these, in an environment of their own.
collect_ignore = [] if find_spec("vllm") else ["serving"]

# Triton reads this when it is imported, its own library of functions included.
if "triton" in sys.modules:
    raise ImportError("triton was imported before the tests could say whether to interpret it")
os.environ.pop("TRITON_INTERPRET", None)
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure():
    """Fail at the start rather than skip what was asked for."""
    if DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"RESA_TEST_DEVICE: got {DEVICE}; allowed: cpu, cuda")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("RESA_TEST_DEVICE=cuda, but torch sees no GPU")


if DEVICE == "cpu" and find_spec("triton"):
    interpreter.harden()
    if PROFILE != "nightly":  # which so shows that it changes nothing
        interpreter.quicken()


@pytest.fixture(scope="session")
def backend(request):
    """Each rendering of the operations in turn; what runs kernels carries the mark `fast`."""
    if not request.param.is_reference and not find_spec("triton"):
        pytest.skip("triton is not installed: it comes for Linux only")
    return request.param


BROUGHT = {"dtype": "dtypes", "wide": "wide", "operation": "operations"}


def pytest_generate_tests(metafunc):
    """Run a test of `backend` for each of them and, if it asks for a dtype or operation, for each that this one has."""
    if "backend" in metafunc.fixturenames:
        asked = [name for name in BROUGHT if name in metafunc.fixturenames]
        rows = []
        for backend in BACKENDS:
            marks = [] if backend.is_reference else [pytest.mark.fast]
            for value in getattr(backend, BROUGHT[asked[0]]) if asked else [None]:
                values = (backend, value) if asked else (backend,)
                label = f"{backend.name}-{str(value).removeprefix('torch.')}" if asked else backend.name
                rows.append(pytest.param(*values, id=label, marks=marks))
        metafunc.parametrize(("backend", *asked), rows, indirect=["backend"])


def pytest_itemcollected(item):
    """Mark what asks for the kernels."""
    if "kernels" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.fast)


@pytest.fixture
def reference():
    """The reference's operations alone."""
    return REFERENCE


@pytest.fixture
def kernels():
    """The Triton operations alone."""
    pytest.importorskip("triton", reason="triton comes for Linux only")
    return TRITON
