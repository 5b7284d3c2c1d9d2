"""The decoder that a test of `decoding/` runs on: the reference, and the Triton path, interpreted or compiled."""

import pytest

from decoders import REFERENCE, TRITON


@pytest.fixture(
    params=[pytest.param(REFERENCE, id="reference"), pytest.param(TRITON, id="triton", marks=pytest.mark.fast)]
)
def decoder(request):
    if request.param is TRITON:
        pytest.importorskip("triton", reason="triton comes for Linux only")
    return request.param
