"""Block bounds (eq. 3): exact, so they are compared without a tolerance."""

import numpy as np
import torch
from hypothesis import strategies as st

import oracle
from backends import a_case, drawn
from judging import check_bounds, exact_bounds, full, int32
from strategies import INF, NAN, Case


def test_bounds_by_hand(backend):
    """Twenty slots make three blocks of eight: a whole one, one with two tokens, and one without any."""
    keys = full(1, 1, 20, 16)
    keys[0, 0, :10, 0] = torch.tensor([5.0, 1.0, -3.0, 2.0, 2.0, 2.0, 2.0, 4.0, 7.0, 6.0])
    keys[0, 0, :, 1] = -keys[0, 0, :, 0] - 10
    keys[0, 0, 10:] = NAN
    for block_bounds in (backend.block_bounds, oracle.block_bounds):
        bounds = block_bounds(keys, int32(10), 8)
        assert bounds[0, 0, :, 0].tolist() == [[-3.0, 6.0, INF], [5.0, 7.0, -INF]]
        assert bounds[0, 0, :, 1].tolist() == [[-15.0, -17.0, INF], [-7.0, -16.0, -INF]]


@drawn(8, {"case": Case(0, 2, 1, 16, 8, lengths=(0, 1, 7, 8, 9, 33), capacity=35)}, case=a_case())
def test_bounds_are_the_oracles_exactly(backend, dtype, case):
    check_bounds(backend, case.build(dtype))


@drawn(4, case=a_case(min_length=1), seed=st.integers(0, 2**32 - 1))
def test_nan_in_a_valid_key_spreads_to_its_channel_and_block_only(backend, dtype, case, seed):
    x = case.build(dtype)
    expected = exact_bounds(x)
    s, h, d = seed % len(case.lengths), seed % case.kv_heads, seed % case.head_dim
    t = seed % case.lengths[s]
    x.keys[s, h, t, d] = NAN
    expected[s, h, :, d, t // x.block_size] = NAN
    found = backend.block_bounds(x.keys, x.lengths, x.block_size)
    np.testing.assert_array_equal(found.double(), expected.double())


def test_infinite_keys_are_kept_as_bounds(backend, dtype):
    keys = full(1, 1, 9, 16, dtype=dtype)
    keys[0, 0, 2, 3], keys[0, 0, 7, 4], keys[0, 0, 8, 5] = INF, -INF, INF
    bounds = backend.block_bounds(keys, int32(9), 8)
    expected = full(2, 16, 2, dtype=dtype)
    expected[1, 3, 0], expected[0, 4, 0], expected[:, 5, 1] = INF, -INF, INF
    assert torch.equal(bounds[0, 0], expected)
