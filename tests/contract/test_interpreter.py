"""Triton's interpreter, made quicker for the tests, computes what it computes by itself."""

import subprocess
import sys

import pytest

import interpreter

pytestmark = pytest.mark.fast


def test_it_gives_the_same_bits():
    if not interpreter.IS_QUICK:
        pytest.skip("kernels are compiled, or the interpreter is as it was")
    done = subprocess.run([sys.executable, interpreter.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert interpreter.digest() == done.stdout.strip()
