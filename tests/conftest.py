"""Profiles of the property tests, one thread for tiny tensors, and the implementations the operations are tested for.

RESA_TEST_PROFILE picks a profile: `dev` (default), `ci` (default where the variable CI is set: the same examples on
every run) or `nightly` (fresh randomness, many more examples, failures kept in .hypothesis/ for the next run).

RESA_TEST_DEVICE says where the Triton kernels run: `cpu` (default), in Triton's interpreter, or `cuda`, compiled.
`pytest -m fast` runs just the tests of the kernels.
"""

import os
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from strategies import DEVICE

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


def harden_interpreter():
    """Make the interpreter forgive as little as a GPU.

    It would give zeros for masked loads without `other`; here they give garbage. And its `minimum` and `maximum` would
    propagate NaN unasked, where a GPU's drop it.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    plain = InterpreterBuilder.create_masked_load

    def create_masked_load(self, pointers, mask, other, *rest, **options):
        if other is None:
            dtype = pointers.get_element_ty()
            kind = _get_np_dtype(dtype)
            garbage = np.full_like(pointers.data, np.nan if kind.kind == "f" else True, dtype=kind)
            if kind.kind in "iu":  # now a number that no index is, now one that any could be
                garbage.flat[::2] = np.iinfo(kind).max // 3
                garbage.flat[1::2] = 0
            other = TensorHandle(garbage, dtype)
        return plain(self, pointers, mask, other, *rest, **options)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)


if DEVICE == "cpu" and find_spec("triton"):
    harden_interpreter()

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


@pytest.fixture(scope="session")
def device():
    """Where the Triton operations are tested."""
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def fast(device):
    """The Triton operations, for tensors built on the CPU and results looked at there.

    `write_window` works in place; here it returns what became of copies of keys, values and bounds.
    """
    if not find_spec("triton"):
        pytest.skip("triton is not installed: it comes for Linux only")

    def here(tensor):
        assert tensor.device.type == device.type
        return tensor.cpu()

    def there(argument):
        return argument.to(device) if isinstance(argument, torch.Tensor) else argument

    def moved(operation):
        def call(*arguments, **options):
            options = {name: there(option) for name, option in options.items()}
            result = operation(*map(there, arguments), **options)
            return tuple(map(here, result)) if isinstance(result, tuple) else here(result)

        return call

    def write_window(keys, values, bounds, *rest):
        stored = [tensor.to(device, copy=True) for tensor in (keys, values, bounds)]
        cache.write_window(*stored, *map(there, rest))
        return tuple(map(here, stored))

    blocks, attention, cache = (import_module(f"resa.fast.{name}") for name in ("blocks", "attention", "cache"))
    return SimpleNamespace(
        block_bounds=moved(blocks.block_bounds),
        score_blocks=moved(blocks.score_blocks),
        select_blocks=moved(blocks.select_blocks),
        sparse_attention=moved(attention.sparse_attention),
        dense_attention=moved(attention.dense_attention),
        write_window=write_window,
    )


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window; where there is none, a visible skip, and in continuous integration a failure."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None or find_spec("playwright") is None:
        message = f"{'playwright' if path else 'Chromium'} is missing (docs/contributing.md): no page was looked at"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=[*quiet, "--disable-sync"])
        yield chromium
        chromium.close()
