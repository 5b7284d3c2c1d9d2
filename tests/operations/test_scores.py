"""Block scores (eq. 4)."""

import torch
from hypothesis import target

import oracle
from backends import a_case, drawn
from judging import arrays, check_scores, full, int32
from strategies import INF, NAN, Case
from tolerances import eps


def test_scores_by_hand(backend):
    query, bounds = full(1, 2, 16), full(1, 1, 2, 16, 3)
    query[0, :, :2] = torch.tensor([[2.0, 0.0], [0.0, -4.0]])  # one group of two heads, pooled to [1, -2]
    bounds[0, 0, 0, :2] = torch.tensor([[1.0, -1.0, INF], [-2.0, 5.0, INF]])
    bounds[0, 0, 1, :2] = torch.tensor([[3.0, -1.0, -INF], [0.0, 5.0, -INF]])
    for score_blocks in (backend.score_blocks, oracle.score_blocks):
        scores = score_blocks(query, bounds, int32(9), 8)
        assert scores.tolist() == [[[1 * 3 + -2 * -2, 1 * -1 + -2 * 5, -INF]]]


@drawn(
    10,
    {"case": Case(0, 2, 3, 16, 8, lengths=(0, 1, 33), capacity=49)},
    {"case": Case(0, 3, 16, 32, 8, lengths=(17, 8), capacity=17, query_kind="sparse")},
    case=a_case(),
)
def test_scores_are_the_oracles(backend, dtype, case):
    target(check_scores(backend, case.build(dtype)))


def test_heads_are_pooled_and_summed_in_float32(backend):
    """In float16 the four queries add up to infinity, and so do the products."""
    query, bounds = full(1, 4, 16, value=2.0**15, dtype=torch.float16), full(1, 1, 2, 16, 1, dtype=torch.float16)
    bounds[0, 0, 1], bounds[0, 0, 0] = 2.0**10, -(2.0**10)
    assert backend.score_blocks(query, bounds, int32(8), 8).tolist() == [[[2.0**29]]]
    query[0, :, 1] = 1 + eps(torch.float16)  # no number of 11 bits holds 16 · 2**25 and 1 + 2**-10 together
    bounds[0, 0, :, 0] = 0.0
    bounds[0, 0, :, 2:] = 0.0
    bounds[0, 0, :, 1] = 1 + eps(torch.float16)
    assert backend.score_blocks(query, bounds, int32(8), 8).item() == (1 + eps(torch.float16)) ** 2


def test_zero_query_times_infinite_bound_is_zero(backend, dtype):
    """One pooled channel is 0, made of 0 and -0 or of 3 and -3; the other bounds are 5 · 2 and 1 · -2."""
    bounds = full(1, 1, 2, 16, 2, dtype=dtype)
    bounds[0, 0, 0, 0], bounds[0, 0, 1, 0] = -INF, INF
    bounds[0, 0, 0, 1], bounds[0, 0, 1, 1] = torch.tensor([[1.0, -4.0], [5.0, -1.0]], dtype=dtype)
    for first, second in ((0.0, -0.0), (-0.0, -0.0), (3.0, -3.0)):
        query = full(1, 2, 16, dtype=dtype)
        query[0, :, 0] = torch.tensor([first, second])
        query[0, :, 1] = torch.tensor([3.0, 1.0])
        assert backend.score_blocks(query, bounds, int32(16), 8).tolist() == [[[10.0, -2.0]]]
        for sign in (1.0, -1.0):
            query[0, :, 0] = sign
            assert backend.score_blocks(query, bounds, int32(16), 8).tolist() == [[[INF, INF]]]


def test_one_infinite_bound_is_read_only_where_it_is_the_larger_product(backend, dtype):
    """Bounds of 8 bits may be so: lo = -inf beside a finite hi, and the other way round."""
    bounds = full(1, 1, 2, 16, 1, dtype=dtype)
    bounds[0, 0, :, 0, 0] = torch.tensor([-INF, 2.0])
    bounds[0, 0, :, 1, 0] = torch.tensor([3.0, INF])
    query = full(1, 1, 16, dtype=dtype)
    for first, second, expected in ((1.0, 0.0, 2.0), (-1.0, 0.0, INF), (0.0, 1.0, INF), (0.0, -1.0, -3.0)):
        query[0, 0, 0], query[0, 0, 1] = first, second
        assert backend.score_blocks(query, bounds, int32(8), 8).item() == expected
        assert oracle.score_blocks(*arrays(query, bounds), [8], 8).item() == expected


def test_nan_in_a_block_makes_its_score_nan(backend, dtype):
    """A zero query does not hide it: only 0 * inf is 0."""
    bounds = full(1, 1, 2, 16, 3, value=1.0, dtype=dtype)
    bounds[0, 0, :, 1, 1] = NAN
    for sign in (1.0, -1.0, 0.0, -0.0):
        query = torch.ones(1, 1, 16, dtype=dtype)
        query[0, 0, 1] = sign
        scores = backend.score_blocks(query, bounds, int32(20), 8)
        assert scores.isnan().tolist() == [[[False, True, False]]]
