"""Remember what the exact port decodes, for all the ports that are compared with it."""

import json

import pytest

from resa.conformance import kit


@pytest.fixture(scope="module")
def remembered():
    decode, known = kit.exact.decode_trace, {}

    def decode_once(weights, *asked):
        key = json.dumps(asked), *(weights[name].tobytes() for name in sorted(weights))
        if key not in known:
            known[key] = list(decode(weights, *asked))
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit.exact, "decode_trace", decode_once)
        yield
