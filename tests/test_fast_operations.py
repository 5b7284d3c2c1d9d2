"""The Triton operations: against the oracle, against the reference, and against the laws.

`RESA_TEST_DEVICE=cuda` runs all of it compiled; otherwise Triton's interpreter does, on shapes at the small end of
what the kernels accept. The strategies and the oracle are those of the reference's tests. Tensors are built on the CPU
from seeds and moved, so that both runs see the same numbers.
"""

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import event, example, given, target
from hypothesis import strategies as st
from strategies import (
    BLOCK_SIZES,
    DEVICE,
    FAST_BLOCK_SIZES,
    FAST_DTYPES,
    HEAD_DIMS,
    NAN,
    ORDINARY_KEYS,
    SCORE_KINDS,
    Case,
    build_scores,
    decoding,
    examples,
    fast_cases,
)
from tolerances import (
    assert_same_bits,
    assert_three_way,
    assert_within,
    eps,
    logit_size,
    lse_floor,
    plain_attention,
    score_floor,
    three_way_floor,
)

from resa import reference
from resa.reference.blocks import select_blocks
from resa.reference.config import GPTConfig, ReSAConfig

pytestmark = pytest.mark.fast

INF = math.inf
DTYPES = st.sampled_from(FAST_DTYPES)
TENSORS = ("empty", "empty_like", "empty_strided")
METHODS = ("new_empty", "new_empty_strided")
GARBAGE = {"zero": 0.0, "NaN": NAN, "inf": INF, "-inf": -INF, "huge": 6e4, "lowest": -6e4}
# A law is about the mathematics: few shapes will do, and compiling each takes a second.
law_cases = {"head_dims": (16,), "block_sizes": (8, 16), "groups": (3, 1, 5), "max_blocks": 5}
WHOLE = {"keys": ("grid",), "queries": ("grid",), "sizes": ("plain",), "groups": (2, 4, 8, 1, 16)}


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory():
    """Memory that a kernel is given to write to holds NaN, or a number no index is, until it is written."""

    def poisoned(allocate):
        def call(*arguments, **options):
            tensor = allocate(*arguments, **options)
            return tensor.fill_(NAN if tensor.is_floating_point() else 77 if tensor.element_size() == 1 else 0x5A5A5A5A)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((torch, TENSORS), (torch.Tensor, METHODS)):
            for name in names:
                patch.setattr(owner, name, poisoned(getattr(owner, name)))
        assert torch.empty(2).isnan().all()
        assert torch.zeros(2).new_empty(2).isnan().all()
        yield


def arrays(*tensors):
    """The same numbers in float64, for the oracle."""
    return [tensor.double().numpy() for tensor in tensors]


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def full(*shape, value=0.0, dtype=torch.float32):
    return torch.full(shape, value, dtype=dtype)


def strided(tensor):
    """The same numbers as every other element of the last dimension of a buffer of garbage, on the device tested."""
    garbage = NAN if tensor.is_floating_point() else 1234567
    buffer = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), garbage, dtype=tensor.dtype, device=DEVICE)
    return buffer[..., ::2].copy_(tensor)


def reference_bounds(x):
    """Bounds that do not depend on what is tested."""
    return reference.block_bounds(x.keys, x.lengths, x.block_size)


# --------------------------------------------------------------------------------------------------------------
# Block bounds
# --------------------------------------------------------------------------------------------------------------


def check_bounds(fast, case, x):
    bounds = fast.block_bounds(x.keys, x.lengths, x.block_size)
    assert bounds.dtype == x.keys.dtype
    np.testing.assert_array_equal(bounds.double(), oracle.block_bounds(*arrays(x.keys), case.lengths, x.block_size))
    np.testing.assert_array_equal(bounds.double(), reference_bounds(x).double())


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(8)
@given(case=fast_cases())
@example(case=Case(0, 2, 1, 16, 8, lengths=(0, 1, 7, 8, 9, 33), capacity=35))
def test_bounds_are_the_oracles_exactly(fast, dtype, case):
    check_bounds(fast, case, case.build(dtype))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_bounds_of_every_shape(fast, head_dim, block_size):
    """Whole blocks, a last block of one token, and one that lacks a token."""
    lengths = (3 * block_size, 2 * block_size + 1, 5 * block_size - 1)
    case = Case(1, 2, 1, head_dim, block_size, lengths, capacity=5 * block_size + 3)
    check_bounds(fast, case, case.build(torch.float16))


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(4)
@given(case=fast_cases(min_length=1), seed=st.integers(0, 2**32 - 1))
def test_nan_in_a_valid_key_spreads_to_its_channel_and_block_only(fast, dtype, case, seed):
    x = case.build(dtype)
    clean = reference_bounds(x)
    s, h, d = seed % len(case.lengths), seed % case.kv_heads, seed % case.head_dim
    t = seed % case.lengths[s]
    x.keys[s, h, t, d] = NAN
    clean[s, h, :, d, t // x.block_size] = NAN
    np.testing.assert_array_equal(fast.block_bounds(x.keys, x.lengths, x.block_size).double(), clean.double())


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_infinite_keys_are_kept_as_bounds(fast, dtype):
    keys = full(1, 1, 9, 16, dtype=dtype)
    keys[0, 0, 2, 3], keys[0, 0, 7, 4], keys[0, 0, 8, 5] = INF, -INF, INF
    assert_same_bits(fast.block_bounds(keys, int32(9), 8), reference.block_bounds(keys, int32(9), 8), "bounds")


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_bounds_of_keys_of_one_sign_do_not_reach_zero(fast, dtype):
    """Slots that hold no token must not count as zeros, in blocks of one token or in none."""
    for sign in (1.0, -1.0):
        keys = sign * (1 + torch.arange(2 * 16, dtype=dtype).view(1, 1, 2, 16).repeat(2, 1, 1, 1))
        bounds = fast.block_bounds(keys, int32(1, 2), 8)
        assert torch.equal(bounds[0, 0, 0, :, 0], keys[0, 0, 0])
        assert torch.equal(bounds[0, 0, 1, :, 0], keys[0, 0, 0])
        assert torch.equal(bounds[1, 0, 0, :, 0], keys[1, 0].amin(dim=0))
        assert torch.equal(bounds[1, 0, 1, :, 0], keys[1, 0].amax(dim=0))


# --------------------------------------------------------------------------------------------------------------
# Block scores
# --------------------------------------------------------------------------------------------------------------


def check_scores(fast, case, x, bounds):
    scores = fast.score_blocks(x.query, bounds, x.lengths, x.block_size)
    assert scores.dtype == torch.float32
    exact = oracle.score_blocks(*arrays(x.query, bounds), case.lengths, x.block_size)
    return assert_within(scores, exact, score_floor(x.query.dtype, *arrays(x.query, bounds)), f"scores {case}")


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(10)
@given(case=fast_cases())
@example(case=Case(0, 2, 3, 16, 8, lengths=(0, 1, 33), capacity=49))
@example(case=Case(0, 3, 16, 32, 8, lengths=(17, 8), capacity=17, query_kind="sparse"))
def test_scores_are_the_oracles(fast, dtype, case):
    x = case.build(dtype)
    target(check_scores(fast, case, x, reference_bounds(x)))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_scores_of_every_shape(fast, head_dim, block_size):
    case = Case(1, 2, 7, head_dim, block_size, lengths=(9 * block_size - 3, block_size), capacity=10 * block_size)
    x = case.build(torch.float16)
    check_scores(fast, case, x, reference_bounds(x))


@pytest.mark.parametrize("n_blocks", [1103, 1104])  # the second a multiple of 16
def test_bounds_and_scores_of_long_rows(fast, monkeypatch, n_blocks):
    """More blocks than one tile holds, and sequences that end in the first tile, in the second, and in the last."""
    lengths = (8 * n_blocks - 3, 17, 8 * 150)
    case = Case(1, 1, 2, 16, 8, lengths, capacity=8 * n_blocks)
    x = case.build(torch.float16)
    bounds = reference_bounds(x)
    np.testing.assert_array_equal(fast.block_bounds(x.keys, x.lengths, 8), bounds)
    dirty = bounds.masked_fill(torch.isinf(bounds), NAN)  # past the end
    for many in (10**9, 1):  # scores from which on tiles are larger
        monkeypatch.setattr("resa.fast.blocks.MANY_SCORES", many)
        check_scores(fast, case, x, bounds)
        scores = [fast.score_blocks(x.query, each, x.lengths, 8) for each in (bounds, dirty)]
        assert_same_bits(*scores, "scores")


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(5)
@given(case=fast_cases(**WHOLE))
def test_scores_of_whole_numbers_are_exact(fast, dtype, case):
    """A mean of 1, 2, 4, 8 or 16 small whole numbers and every sum after it are exact, in every order of summation."""
    x = case.build(dtype)
    bounds = reference_bounds(x)
    scores = fast.score_blocks(x.query, bounds, x.lengths, x.block_size)
    np.testing.assert_array_equal(scores, oracle.score_blocks(*arrays(x.query, bounds), case.lengths, x.block_size))


def test_heads_are_pooled_and_summed_in_float32(fast):
    """In float16 the four queries add up to infinity, and so do the products."""
    query, bounds = full(1, 4, 16, value=2.0**15, dtype=torch.float16), full(1, 1, 2, 16, 1, dtype=torch.float16)
    bounds[0, 0, 1], bounds[0, 0, 0] = 2.0**10, -(2.0**10)
    assert fast.score_blocks(query, bounds, int32(8), 8).tolist() == [[[2.0**29]]]
    query[0, :, 1] = 1 + eps(torch.float16)  # 16 · 2**25 and 1 + 2**-10 go together into no number of 11 bits
    bounds[0, 0, :, 0] = 0.0
    bounds[0, 0, :, 2:] = 0.0
    bounds[0, 0, :, 1] = 1 + eps(torch.float16)
    assert fast.score_blocks(query, bounds, int32(8), 8).item() == (1 + eps(torch.float16)) ** 2


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_zero_query_times_infinite_bound_is_zero(fast, dtype):
    """One pooled channel is 0, made of 0 and -0 or of 3 and -3; the other bounds are 5 · 2 and 1 · -2."""
    bounds = full(1, 1, 2, 16, 2, dtype=dtype)
    bounds[0, 0, 0, 0], bounds[0, 0, 1, 0] = -INF, INF
    bounds[0, 0, 0, 1], bounds[0, 0, 1, 1] = torch.tensor([[1.0, -4.0], [5.0, -1.0]], dtype=dtype)
    for first, second in ((0.0, -0.0), (-0.0, -0.0), (3.0, -3.0)):
        query = full(1, 2, 16, dtype=dtype)
        query[0, :, 0] = torch.tensor([first, second])
        query[0, :, 1] = torch.tensor([3.0, 1.0])
        assert fast.score_blocks(query, bounds, int32(16), 8).tolist() == [[[10.0, -2.0]]]
        for sign in (1.0, -1.0):
            query[0, :, 0] = sign
            assert fast.score_blocks(query, bounds, int32(16), 8).tolist() == [[[INF, INF]]]


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_one_infinite_bound_is_read_only_where_it_is_the_larger_product(fast, dtype):
    """As 8-bit bounds may be: lo = -inf beside a finite hi, and the other way round."""
    bounds = full(1, 1, 2, 16, 1, dtype=dtype)
    bounds[0, 0, :, 0, 0] = torch.tensor([-INF, 2.0])
    bounds[0, 0, :, 1, 0] = torch.tensor([3.0, INF])
    query = full(1, 1, 16, dtype=dtype)
    for first, second, expected in ((1.0, 0.0, 2.0), (-1.0, 0.0, INF), (0.0, 1.0, INF), (0.0, -1.0, -3.0)):
        query[0, 0, 0], query[0, 0, 1] = first, second
        assert fast.score_blocks(query, bounds, int32(8), 8).item() == expected
        exact = oracle.score_blocks(*arrays(query, bounds), [8], 8)
        assert exact.item() == expected


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_nan_in_a_block_makes_its_score_nan(fast, dtype):
    """A zero query does not hide it: only 0 * inf is 0."""
    keys = torch.ones(1, 1, 20, 16, dtype=dtype)
    keys[0, 0, 9, 1] = NAN
    bounds = reference.block_bounds(keys, int32(20), 8)
    for sign in (1.0, -1.0, 0.0, -0.0):
        query = torch.ones(1, 1, 16, dtype=dtype)
        query[0, 0, 1] = sign
        scores = fast.score_blocks(query, bounds, int32(20), 8)
        assert scores.isnan().tolist() == [[[False, True, False]]]


def test_opposed_heads_pool_to_zero(fast):
    x = Case(1, 2, 2, 16, 8, lengths=(40,), capacity=40, query_kind="opposed").build(torch.float32)
    x.query[:, 0] *= 3  # of KV head 0, so that its heads do not cancel
    scores = fast.score_blocks(x.query, reference_bounds(x), x.lengths, 8)
    assert (scores == 0).tolist() == [[[False] * 5, [True] * 5]]


# --------------------------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------------------------


def select(fast, scores, lengths, **config):
    """Selected blocks of scores [B, Hkv, M] without the -1 at the end, after checking the form of the result."""
    scores, lengths = torch.as_tensor(scores, dtype=torch.float32), torch.as_tensor(lengths, dtype=torch.int32)
    indices = fast.select_blocks(scores, lengths, ReSAConfig(**config))
    assert indices.dtype == torch.int32
    assert indices.shape[:2] == scores.shape[:2]
    rows = [[row[row >= 0].tolist() for row in sequence] for sequence in indices]
    for sequence, found in zip(indices.tolist(), rows, strict=True):
        for row, blocks in zip(sequence, found, strict=True):
            assert row == sorted(set(blocks)) + [-1] * (len(row) - len(blocks)), "ascending, then -1 only"
    return rows


def expected_blocks(scores, lengths, config):
    """The oracle's selection, as `select` returns it."""
    indices = oracle.select_blocks(scores.tolist(), list(lengths), config)
    return [[row[row >= 0].tolist() for row in sequence] for sequence in indices]


def scores_of(kind, seed, shape):
    """`build_scores` in float32, and kinds that try a search for the threshold: its last bit, and its whole range."""
    if kind in SCORE_KINDS:
        return build_scores(kind, seed, shape, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-3, 4, shape, generator=generator)
    if kind == "neighbours":  # of 1 and -1
        return torch.where(steps % 2 == 0, 1.0, -1.0) * (1 + steps * eps(torch.float32))
    if kind == "smallest":  # numbers there are
        return steps * 2.0**-149
    if kind == "all sizes":  # of either sign
        exponent = torch.rand(shape, generator=generator) * 260 - 135
        return torch.where(steps % 2 == 0, 1.0, -1.0) * torch.exp2(exponent)
    assert kind == "outliers"
    normal = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.02, 3e38 * normal.sign(), 1 + 1e-3 * normal)


ALL_SCORES = (*SCORE_KINDS, "neighbours", "smallest", "all sizes", "outliers")


@pytest.mark.parametrize("kind", ALL_SCORES)
@examples(6)
@given(
    config=st.sampled_from(FAST_BLOCK_SIZES).flatmap(decoding),
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 3),
    blocks=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    spare=st.integers(0, 3),
    data=st.data(),
)
def test_selection_is_the_oracles_exactly(fast, kind, config, seed, kv_heads, blocks, spare, data):
    b = config["block_size"]
    lengths = [max(0, n * b - data.draw(st.integers(0, b - 1))) for n in blocks]
    scores = scores_of(kind, seed, (len(blocks), kv_heads, max(1, max(blocks) + spare)))
    past = torch.arange(scores.shape[2]) >= torch.tensor(blocks)[:, None, None]
    scores = scores.masked_fill(past, INF)  # where a block past the end would be taken if it could
    found = select(fast, scores, lengths, **config)
    assert found == expected_blocks(scores, lengths, config)
    by_reference = select_blocks(scores, int32(*lengths), ReSAConfig(**config))
    assert found == [[row[row >= 0].tolist() for row in sequence] for sequence in by_reference]


@pytest.mark.parametrize(
    ("kind", "lengths", "n_blocks"),
    [
        *((kind, (700 * 8, 13, 4999), 700) for kind in ALL_SCORES),
        ("normal", (5000 * 8 - 3,), 5000),
        ("ties", (5000 * 8 - 3,), 5000),
        ("equal", (4097 * 8, 4096 * 8), 4097),
        ("specials", (1025 * 8,), 1100),
    ],
)
def test_selection_from_long_rows(fast, kind, lengths, n_blocks):
    """More blocks than fit one tile, ties across tiles, and 1 to 5,000 blocks in a batch."""
    scores = scores_of(kind, n_blocks, (len(lengths), 2, n_blocks))
    for config in (
        {"block_size": 8, "active_ratio": 0.1, "min_blocks": 16, "local_blocks": 1},
        {"block_size": 8, "active_ratio": 0.85, "min_blocks": 5, "local_blocks": 3},
    ):
        assert select(fast, scores, lengths, **config) == expected_blocks(scores, lengths, config)


@pytest.mark.parametrize(
    ("n_blocks", "ratio", "min_blocks", "expected"),
    [
        (30, 0.1, 1, 3),  # in float32 0.1 is 0.100000001, which would give 4
        (31, 0.1, 1, 4),
        (29, 0.1, 1, 3),
        (3, 0.1, 1, 1),
        (25, 0.28, 1, 7),  # 0.28 * 25 is 7.000000000000001
        (100, 0.07, 1, 7),  # 7.000000000000001
        (100, 0.29, 1, 29),  # 28.999999999999996
        (100, 0.05000000002, 1, 6),  # 5.000000002 is above 5 by more than the 1e-9 that rounding is granted
        (10, 0.1, 4, 4),  # the minimum
        (3, 0.1, 4, 3),  # no more than there are
        (7, 1.0, 1, 7),
        (1, 0.01, 1, 1),
        (0, 0.5, 1, 0),
    ],
)
def test_number_of_blocks(fast, n_blocks, ratio, min_blocks, expected):
    config = {"block_size": 8, "active_ratio": ratio, "min_blocks": min_blocks, "local_blocks": 1}
    lengths = [8 * n_blocks, max(0, 8 * n_blocks - 7)]  # the last block full, and with one token
    rows = select(fast, torch.zeros(2, 1, max(1, n_blocks)), lengths, **config)
    assert [len(blocks) for [blocks] in rows] == [expected, expected]


def test_equal_scores_go_to_the_lower_index(fast):
    config = {"block_size": 8, "active_ratio": 0.1, "min_blocks": 4, "local_blocks": 1}
    rows = [[2.0] * 40, [0.0, 1.0, 1.0, 1.0, 1.0] + [0.0] * 35, [NAN] * 40, [-INF] * 40, [INF] * 40]
    assert select(fast, [rows], [320], **config) == [
        [[0, 1, 2, 39], [1, 2, 3, 39], [0, 1, 2, 39], [0, 1, 2, 39], [0, 1, 2, 39]]
    ]


def test_zeros_of_both_signs_are_equal(fast):
    config = {"block_size": 8, "active_ratio": 0.1, "min_blocks": 3, "local_blocks": 1}
    rows = [[-0.0, 0.0, -0.0, 0.0, 0.0], [0.0, -0.0, 0.0, -0.0, 0.0], [-1.0, -0.0, 2.0**-149, 0.0, 0.0]]
    assert select(fast, [rows], [40], **config) == [[[0, 1, 4], [0, 1, 4], [1, 2, 4]]]


@pytest.mark.parametrize("negative_nan", [False, True])
def test_order_is_numbers_and_infinities_then_nan(fast, negative_nan):
    """Selecting one block more at a time reads the whole order off."""
    nan = torch.tensor(NAN).neg().item() if negative_nan else NAN
    scores = [[[nan, -INF, 1e-45, INF, -3e38, nan, 7.0]]]
    order = []
    for n in range(2, 8):
        [[blocks]] = select(fast, scores, [56], block_size=8, active_ratio=0.01, min_blocks=n, local_blocks=1)
        [new] = set(blocks) - {6, *order}
        order.append(new)
    assert order == [3, 2, 4, 1, 0, 5]


def test_past_the_end_is_never_taken(fast):
    scores = full(1, 1, 8, value=INF)
    scores[0, 0, :3] = NAN
    assert select(fast, scores, [17], block_size=8, min_blocks=8, active_ratio=1.0) == [[[0, 1, 2]]]
    scores[0, 0, :3] = -INF
    assert select(fast, scores, [17], block_size=8, min_blocks=2, active_ratio=0.1) == [[[0, 2]]]


@pytest.mark.parametrize("local_blocks", [1, 2, 3])
def test_local_blocks_are_in_and_counted(fast, local_blocks):
    scores = [[[5.0, 4.0, 3.0, 2.0, 1.0, -INF, NAN, NAN]]]
    config = {"block_size": 8, "active_ratio": 0.1, "min_blocks": 3, "local_blocks": local_blocks}
    local = list(range(8 - local_blocks, 8))
    assert select(fast, scores, [60], **config) == [[[*range(3 - local_blocks), *local]]]


def test_each_sequence_and_head_selects_for_itself(fast):
    config = {"block_size": 8, "active_ratio": 0.1, "min_blocks": 2, "local_blocks": 1}
    scores = [[[1.0, 0.0, 0.0, 9.0], [0.0, 1.0, 0.0, 9.0]], [[2.0, 3.0, 9.0, 9.0], [3.0, 2.0, 9.0, 9.0]]]
    assert select(fast, scores, [32, 20], **config) == [[[0, 3], [1, 3]], [[1, 2], [0, 2]]]
    assert select(fast, scores, [0, 1], **config) == [[[], []], [[0], [0]]]
    assert select(fast, scores, [0, 0], **config) == [[[], []], [[], []]]


@examples(5)
@given(case=fast_cases(**WHOLE, max_blocks=8), data=st.data())
def test_bounds_scores_and_selection_together_are_exact_on_whole_numbers(fast, case, data):
    """No rounding, so not even a tie may fall differently from the oracle's."""
    config, x = data.draw(decoding(case.block_size)), case.build(torch.float16)
    bounds = fast.block_bounds(x.keys, x.lengths, x.block_size)
    found = select(fast, fast.score_blocks(x.query, bounds, x.lengths, x.block_size), case.lengths, **config)
    bounds = oracle.block_bounds(*arrays(x.keys), case.lengths, x.block_size)
    scores = oracle.score_blocks(*arrays(x.query), bounds, case.lengths, x.block_size)
    assert found == expected_blocks(scores, case.lengths, config)


# --------------------------------------------------------------------------------------------------------------
# Both kinds of attention: how they are judged
# --------------------------------------------------------------------------------------------------------------


def judge(case, x, found, exact, unit, visible, what):
    """Outputs by the three-way criterion, log-sum-exps by their floor; -> the larger ratio to what is allowed.

    found and exact: (out [B, Hq, Q, D], lse [B, Hq, Q]); unit: Σ p |v|, like out; visible [B, 1 or Hq, Q, T_max].
    """
    (out, lse), (exact_out, exact_lse), dtype = found, exact, x.query.dtype
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    query = x.query if x.query.ndim == 4 else x.query[:, :, None]
    L = 0.0 if case.exact_logits else logit_size(*arrays(query, x.keys), case.lengths)
    n_tokens = max(case.lengths)
    allowed = lse_floor(dtype, L, case.head_dim, n_tokens, exact_lse, base=2)
    lse_ratio = assert_within(lse, exact_lse, allowed, f"{what}: lse {case}")
    past = (torch.arange(case.capacity)[:, None] >= x.lengths[:, None, None, None]).expand_as(x.keys)
    plain = plain_attention(query, x.keys.masked_fill(past, 0), x.values.masked_fill(past, 0), visible)
    floor = three_way_floor(dtype, np.asarray(L), case.head_dim, n_tokens)[..., None] * unit
    return max(lse_ratio, assert_three_way(out, exact_out, plain, floor, f"{what}: out {case}"))


def sparse(fast, x, indices):
    return fast.sparse_attention(*x.attention, indices, x.lengths, x.block_size, return_lse=True)


def dense(fast, x):
    """One query at the newest position of each sequence: [B, Hq, D], [B, Hq]."""
    query, keys, values = x.attention
    out, lse = fast.dense_attention(query[:, :, None], keys, values, x.lengths, return_lse=True)
    return out[:, :, 0], lse[:, :, 0]


def sparse_mask(indices, x):
    """Which tokens each query head may see, spelled with comparisons: [B, Hq, 1, T_max]."""
    position = torch.arange(x.keys.shape[2])
    in_block = (indices.long()[..., None] == position // x.block_size).any(dim=2)  # [B, Hkv, T_max]
    visible = in_block & (position < x.lengths[:, None, None])
    return visible.repeat_interleave(x.query.shape[1] // x.keys.shape[1], dim=1)[:, :, None]


def check_sparse(fast, case, x, indices):
    found = sparse(fast, x, indices)
    query, keys, values = arrays(*x.attention)
    rest = (indices.cpu().numpy(), case.lengths, x.block_size)
    exact = oracle.sparse_attention(query, keys, values, *rest, return_lse=True)
    unit = oracle.sparse_attention(query, keys, np.abs(values), *rest)
    one_row = [[each[:, :, None] for each in pair] for pair in (found, exact)]
    return judge(case, x, *one_row, unit[:, :, None], sparse_mask(indices.cpu(), x), "sparse")


def check_dense(fast, case, x, query_lengths=None):
    given_lengths = None if query_lengths is None else int32(*query_lengths)
    found = fast.dense_attention(*x.attention, x.lengths, query_lengths=given_lengths, return_lse=True)
    query, keys, values = arrays(*x.attention)
    exact = oracle.dense_attention(query, keys, values, case.lengths, query_lengths, return_lse=True)
    unit = oracle.dense_attention(query, keys, np.abs(values), case.lengths, query_lengths)
    n_queries = x.query.shape[2]
    used = torch.tensor([n_queries] * len(case.lengths) if query_lengths is None else query_lengths).view(-1, 1, 1, 1)
    row, position = torch.arange(n_queries)[:, None], torch.arange(case.capacity)
    visible = (position <= x.lengths.view(-1, 1, 1, 1) - used + row) & (row < used)  # [B, 1, Q, T_max]
    return judge(case, x, found, exact, unit, visible, "dense")


def shuffled(indices, seed):
    """Every row of [B, Hkv, N] in another order, so that -1 stands anywhere."""
    order = torch.rand(indices.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)
    return indices.gather(2, order)


# --------------------------------------------------------------------------------------------------------------
# Sparse attention
# --------------------------------------------------------------------------------------------------------------


def three_tokens(dtype):
    """Logits ln 1, ln 3, ln 2 with the scale 1/4 of sixteen channels; so the weights are 1, 3, 2 over their sum."""
    query, keys, values = full(1, 1, 16, dtype=dtype), full(1, 1, 4, 16, dtype=dtype), full(1, 1, 4, 16, dtype=dtype)
    query[..., 0] = 4.0
    keys[0, 0, :3, 0] = torch.tensor([1.0, 3.0, 2.0]).log()
    values[0, 0, :3] = 6 * torch.eye(16)[:3]
    keys[0, 0, 3:], values[0, 0, 3:] = NAN, NAN
    return query, keys, values


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_attention_by_hand(fast, dtype):
    query, keys, values = three_tokens(dtype)
    indices = int32(-1, 0, -1)[None, None]
    out, lse = fast.sparse_attention(query, keys, values, indices, int32(3), 8, return_lse=True)
    assert out[0, 0, :4].tolist() == pytest.approx([1.0, 3.0, 2.0, 0.0], rel=8 * eps(dtype))
    assert lse.item() == pytest.approx(math.log(6), rel=8 * eps(dtype))
    window = query[:, :, None].expand(-1, -1, 3, -1)
    out, lse = fast.dense_attention(window, keys, values, int32(3), return_lse=True)
    rows = [[6.0, 0.0, 0.0, 0.0], [1.5, 4.5, 0.0, 0.0], [1.0, 3.0, 2.0, 0.0]]
    np.testing.assert_allclose(out[0, 0, :, :4].float(), rows, rtol=8 * eps(dtype))
    np.testing.assert_allclose(lse[0, 0], np.log([1, 4, 6]), rtol=8 * eps(dtype), atol=8 * eps(torch.float32))


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(10)
@given(case=fast_cases(), share=st.sampled_from([0.6, 1.0, 0.15]), extra=st.integers(0, 5))
@example(case=Case(0, 2, 3, 16, 8, lengths=(0, 1, 41), capacity=49), share=1.0, extra=0)
@example(case=Case(0, 3, 16, 32, 16, lengths=(65, 8), capacity=67, key_kind="spike"), share=0.6, extra=2)
@example(case=Case(0, 2, 5, 32, 8, lengths=(24, 31), capacity=31, key_kind="abyss"), share=1.0, extra=1)
@example(case=Case(2, 2, 7, 16, 8, lengths=(24, 31), capacity=31, size="huge"), share=1.0, extra=1)
def test_sparse_attention_is_the_oracles(fast, dtype, case, share, extra):
    """With -1 anywhere in the list."""
    n_blocks = -(-case.capacity // case.block_size)
    indices = shuffled(case.indices(share, width=n_blocks + extra), case.seed)
    target(check_sparse(fast, case, case.build(dtype), indices))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_sparse_attention_of_every_shape(fast, head_dim, block_size):
    case = Case(head_dim, 2, 7, head_dim, block_size, (3 * block_size, 7 * block_size - 3), capacity=7 * block_size)
    check_sparse(fast, case, case.build(torch.float16), case.indices(0.7))


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(fast, group):
    """Whatever a group is padded to, for three KV heads, in both attentions and in the scores."""
    case = Case(group, 3, group, 16, 8, lengths=(21, 8), capacity=24)
    x = case.build(torch.float32)
    check_sparse(fast, case, x, case.indices(0.7))
    check_scores(fast, case, x, reference_bounds(x))
    check_dense(fast, case, case.build(torch.float32, n_queries=2), (2, 1))


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_lengths_that_differ_a_thousandfold(fast, dtype, share):
    """One token beside 1,500: the selection is as wide as the longest sequence's, and split for it."""
    case = Case(8, 2, 3, 16, 8, lengths=(1, 1500, 0, 750), capacity=1501)
    check_sparse(fast, case, case.build(dtype), case.indices(share))
    query_lengths = (1, 2, 2, 0)
    check_dense(fast, case, case.build(dtype, n_queries=2), query_lengths)


@pytest.mark.parametrize("width", [1, 2, 5, 16, 17, 33, 64, 65, 129])
def test_every_width_of_the_selection(fast, width):
    """However the blocks are dealt to splits, none is dropped: the last of the list holds all the weight."""
    length = 8 * width
    case = Case(width, 2, 2, 16, 8, lengths=(length, length - 7), capacity=length)
    x = case.build(torch.float32)
    x.keys[:, :, length - 8 : length - 7] = 2 * x.query[:, ::2, None]  # the first token of the last block
    check_sparse(fast, case, x, case.indices(1.0))
    check_sparse(fast, case, x, case.indices(1.0).flip(2))  # and the first of the list


def test_float32_is_computed_in_float32(fast):
    """Keys that agree in their first twelve bits: TF32, which keeps eleven, would give both half the weight."""
    keys, values = full(1, 1, 2, 16), full(1, 1, 2, 16)
    keys[0, 0, 0] = 1.0
    keys[0, 0, 1] = 1.0 + 2.0**-14
    values[0, 0, 1] = 1.0 + 2.0**-14
    query = full(1, 1, 16, value=2.0**12)
    exact = 1 / (1 + math.exp(-(2.0**12) * 16 * 2.0**-14 / 4)) * (1.0 + 2.0**-14)
    out = fast.sparse_attention(query, keys, values, int32(0)[None, None], int32(2), 8)
    assert out[0, 0].tolist() == pytest.approx([exact] * 16, rel=2**-11 * 2.0**-6)
    out = fast.dense_attention(query[:, :, None], keys, values, int32(2))
    assert out[0, 0, 0].tolist() == pytest.approx([exact] * 16, rel=2**-11 * 2.0**-6)


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_sums_are_taken_in_float32(fast, dtype):
    """Over equal weights, which no dtype rounds, all that is lost is half a unit of the output."""
    case = Case(9, 2, 3, 256, 8, lengths=(601, 333), capacity=601, key_kind="equal")
    x = case.build(dtype)
    x = x.but(values=(x.values.abs() + 0.5).to(dtype))  # of one sign, so that the sums grow
    query, keys, values = arrays(*x.attention)
    indices = case.indices(1.0)
    exact = oracle.sparse_attention(query, keys, values, indices.numpy(), case.lengths, 8)
    allowed = (eps(dtype) / 2 + 1000 * eps(torch.float32)) * exact
    for out in (sparse(fast, x, indices)[0], dense(fast, x)[0]):
        assert_within(out, exact, allowed, "sums")


def test_query_heads_of_a_group_share_a_kv_head(fast):
    """Head h reads KV head h // G; six heads over two KV heads tell that from h % Hkv."""
    values = torch.stack([full(12, 16, value=1.0), full(12, 16, value=2.0)])[None]  # KV head 0: 1, 1: 2
    query, keys = torch.ones(1, 6, 16), torch.zeros_like(values)
    indices = torch.tensor([[[0, -1], [0, 1]]], dtype=torch.int32)
    out, lse = fast.sparse_attention(query, keys, values, indices, int32(12), 8, return_lse=True)
    assert out[0, :, 0].tolist() == pytest.approx([1, 1, 1, 2, 2, 2])
    assert lse[0].exp().tolist() == pytest.approx([8, 8, 8, 12, 12, 12])  # tokens seen: one block, or all
    out, lse = fast.dense_attention(query[:, :, None], keys, values, int32(12), return_lse=True)
    assert out[0, :, 0, 0].tolist() == pytest.approx([1, 1, 1, 2, 2, 2])
    scores = fast.score_blocks(query * torch.arange(6)[:, None], reference.block_bounds(values, int32(12), 8),
                               int32(12), 8)  # fmt: skip
    assert scores[0, :, 0].tolist() == [16.0, 128.0]


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_equal_logits_below_any_sentinel_give_the_mean(fast, dtype):
    """-2**120 / 4 (-2**30 / 4 in float16) is less than what masks are often filled with; the masked token is not it."""
    case = Case(0, 2, 3, 16, 8, lengths=(21,), capacity=23, key_kind="abyss")
    x = case.build(dtype)
    mean = x.values[:, :, :21].double().mean(dim=2).repeat_interleave(3, dim=1)
    for out, lse in (sparse(fast, x, case.indices(1.0)), dense(fast, x)):
        # Σ p |v| is at most 4 here; each of 21 weights of 1/21 and their sum carry a few roundings.
        assert_within(out, mean, 4 * 16 * eps(dtype), "mean")
        logit = x.keys[0, 0, 0, 0].item() ** 2 / -4
        assert_within(lse, torch.full_like(lse, logit), 4 * eps(torch.float32) * -logit, "lse")


# --------------------------------------------------------------------------------------------------------------
# Dense attention
# --------------------------------------------------------------------------------------------------------------


@st.composite
def windows(draw, case):
    """(Q, query_lengths or None): Q queries per sequence, of which each sequence uses some, 0 and all included."""
    n_queries = min(draw(st.sampled_from([3, 1, 2, 5, case.capacity + 1])), 20)
    if draw(st.booleans()):
        return n_queries, None
    return n_queries, draw(st.lists(st.integers(0, n_queries), min_size=len(case.lengths), max_size=len(case.lengths)))


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(10)
@given(case=fast_cases(max_blocks=4, max_batch=2), data=st.data())
def test_dense_attention_is_the_oracles(fast, dtype, case, data):
    n_queries, query_lengths = data.draw(windows(case))
    event(f"ragged window: {query_lengths is not None}")
    target(check_dense(fast, case, case.build(dtype, n_queries=n_queries), query_lengths))


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "n_queries", "lengths", "query_lengths"),
    [
        (3, 4, (2, 40, 0), None),  # rows at negative positions, and no tokens at all
        (3, 5, (3, 40, 9), (5, 0, 4)),  # some rows unused
        (5, 1, (33, 1), None),
        (1, 3, (31, 2), (1, 3)),
    ],
)
def test_windows_of_every_kind(fast, dtype, group, n_queries, lengths, query_lengths):
    case = Case(n_queries, 2, group, 32, 8, lengths, capacity=max(lengths) + 1)
    check_dense(fast, case, case.build(dtype, n_queries=n_queries), query_lengths)


@pytest.mark.parametrize(
    ("group", "n_queries", "query_lengths"), [(16, 20, (20, 7)), (7, 43, None), (1, 300, (300, 129)), (3, 100, (1, 99))]
)
@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_windows_wider_than_a_tile(fast, dtype, group, n_queries, query_lengths):
    """300 rows and more per KV head: several tiles of rows, which see different numbers of keys."""
    case = Case(group, 2, group, 16, 8, lengths=(70, 130), capacity=131)
    check_dense(fast, case, case.build(dtype, n_queries=n_queries), query_lengths)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_dense_attention_of_every_head_dim(fast, dtype, head_dim):
    case = Case(head_dim, 2, 3, head_dim, 8, lengths=(150, 65), capacity=150)
    check_dense(fast, case, case.build(dtype, n_queries=6), (6, 3))


@pytest.mark.parametrize("length", [16, 17, 63, 64, 65, 128, 129, 257, 400])
@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_every_length_of_the_cache(fast, dtype, length):
    """However the keys are dealt to tiles and splits, the newest, which holds all the weight, is seen, and no other."""
    case = Case(length, 2, 2, 16, 8, lengths=(length, length - 1), capacity=length)
    x = case.build(dtype, n_queries=2)
    for s, tokens in enumerate(case.lengths):
        x.keys[s, :, tokens - 1] = 3 * x.query[s, ::2, 1]
    check_dense(fast, case, x)
    check_dense(fast, case, x, (1, 2))


# --------------------------------------------------------------------------------------------------------------
# However many programs share a sequence
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_any_number_of_splits(fast, monkeypatch, dtype, splits):
    """A kernel decides by the GPU; all its numbers must do, more than there is work among them: those are empty."""
    monkeypatch.setattr("resa.fast.attention.count_splits", lambda *_: splits)
    for kind in ("normal", "abyss"):  # the second: equal logits so large that their log-sum-exp counts no tokens
        case = Case(splits, 1, 3, 16, 8, lengths=(1100, 3, 0), capacity=1101, key_kind=kind)
        x = case.build(dtype)
        check_sparse(fast, case, x, case.indices(0.9))
        check_sparse(fast, case, x, shuffled(case.indices(0.2, width=141), 0))
        check_dense(fast, case, case.build(dtype, n_queries=2), (2, 1, 1))


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("key_kind", ["normal", "abyss"])
@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_one_long_sequence(fast, dtype, key_kind, kv_heads):
    """Few heads and many tokens, where splits are most."""
    case = Case(kv_heads, kv_heads, 2, 32, 16, lengths=(2049,), capacity=2060, key_kind=key_kind)
    x = case.build(dtype)
    check_sparse(fast, case, x, case.indices(1.0))
    check_sparse(fast, case, x, shuffled(case.indices(0.5), 1))
    check_dense(fast, case, case.build(dtype, n_queries=3))


# --------------------------------------------------------------------------------------------------------------
# What is empty
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [20, 1, 0])
def test_no_tokens_at_all(fast, dtype, capacity):
    x = Case(1, 2, 3, 16, 8, lengths=(0, 0), capacity=capacity).build(dtype)
    indices = int32(0, 1, -1).expand(2, 2, 3)
    for index in (indices, indices[..., :0], -torch.ones_like(indices)):
        out, lse = sparse(fast, x, index)
        assert torch.equal(out, torch.zeros(2, 6, 16, dtype=dtype))
        assert torch.equal(lse, full(2, 6, value=-INF))
    window = x.query[:, :, None].expand(-1, -1, 2, -1)
    for used in (None, int32(2, 0)):
        out, lse = fast.dense_attention(window, x.keys, x.values, x.lengths, query_lengths=used, return_lse=True)
        assert torch.equal(out, torch.zeros(2, 6, 2, 16, dtype=dtype))
        assert torch.equal(lse, full(2, 6, 2, value=-INF))
    bounds, n_blocks = fast.block_bounds(x.keys, x.lengths, 8), -(-capacity // 8)
    assert torch.equal(bounds, torch.tensor([INF, -INF], dtype=dtype)[:, None, None].expand(2, 2, 2, 16, n_blocks))
    scores = fast.score_blocks(x.query, bounds, x.lengths, 8)
    assert torch.equal(scores, full(2, 2, n_blocks, value=-INF))
    selected = fast.select_blocks(scores, x.lengths, ReSAConfig(block_size=8))
    assert selected.shape[:2] == (2, 2)
    assert (selected == -1).all()


def test_nothing_is_selected_where_there_are_tokens(fast):
    case = Case(1, 2, 3, 16, 8, lengths=(20, 1), capacity=20)
    x = case.build(torch.float32)
    for indices in (full(2, 2, 0, dtype=torch.int32), full(2, 2, 5, value=-1, dtype=torch.int32)):
        out, lse = sparse(fast, x, indices)
        assert torch.equal(out, torch.zeros(2, 6, 16))
        assert torch.equal(lse, full(2, 6, value=-INF))
    indices[1, 0, 3] = 0  # one head of one sequence
    out, lse = sparse(fast, x, indices)
    assert (lse > -INF).tolist() == [[False] * 6, [True] * 3 + [False] * 3]
    assert torch.equal(out[1, :3], x.values[1, 0, :1].expand(3, -1))


def test_no_sequences_and_no_queries(fast):
    """An empty batch, and a window without a row, give empty results of the right shape."""
    keys, none = full(0, 2, 20, 16), torch.zeros(0, dtype=torch.int32)
    assert fast.block_bounds(keys, none, 8).shape == (0, 2, 2, 16, 3)
    assert fast.score_blocks(full(0, 6, 16), full(0, 2, 2, 16, 3), none, 8).shape == (0, 2, 3)
    assert fast.select_blocks(full(0, 2, 3), none, ReSAConfig(block_size=8)).shape[:2] == (0, 2)
    out, lse = fast.sparse_attention(
        full(0, 6, 16), keys, keys, torch.zeros(0, 2, 1, dtype=torch.int32), none, 8, return_lse=True
    )
    assert (out.shape, lse.shape) == ((0, 6, 16), (0, 6))
    for batch, n_queries in ((0, 3), (2, 0)):
        keys, lengths = full(batch, 2, 20, 16), torch.ones(batch, dtype=torch.int32)
        out, lse = fast.dense_attention(full(batch, 6, n_queries, 16), keys, keys, lengths,
                                        query_lengths=0 * lengths, return_lse=True)  # fmt: skip
        assert (out.shape, lse.shape) == ((batch, 6, n_queries, 16), (batch, 6, n_queries))


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_one_token_returns_its_value(fast, dtype):
    x = Case(3, 2, 5, 16, 8, lengths=(1, 1), capacity=3).build(dtype)
    for out, lse in (sparse(fast, x, full(2, 2, 1, dtype=torch.int32)), dense(fast, x)):
        assert torch.equal(out, x.values[:, :, 0].repeat_interleave(5, dim=1))
        logits = (x.query.double() * x.keys[:, :, 0].repeat_interleave(5, dim=1).double()).sum(dim=-1) / 4
        assert_within(lse, logits, 64 * eps(torch.float32) * logits.abs().clamp(min=1).numpy(), "lse")


# --------------------------------------------------------------------------------------------------------------
# Law 4, partition, and other laws; the allowance is both sides' floor
# --------------------------------------------------------------------------------------------------------------


def allowance(case, x, indices):
    """How far each may lie from the truth, as arrays: (out [B, Hq, D], lse [B, Hq]) of one query over `indices`."""
    query, keys, values = arrays(*x.attention)
    rest = (indices.numpy(), x.lengths.tolist(), x.block_size)
    _, exact_lse = oracle.sparse_attention(query, keys, values, *rest, return_lse=True)
    unit = oracle.sparse_attention(query, keys, np.abs(values), *rest)
    L, n_tokens = logit_size(query, keys, x.lengths.tolist()), max(x.lengths.tolist())
    lse = lse_floor(x.query.dtype, L, case.head_dim, n_tokens, exact_lse, base=2)
    return three_way_floor(x.query.dtype, L, case.head_dim, n_tokens)[..., None] * unit, lse


def assert_same_attention(found, expected, allowed, what):
    for left, right, limit, name in zip(found, expected, allowed, ("out", "lse"), strict=True):
        assert_within(left, right.double(), 2 * limit, f"{what}: {name}")


def merge(parts):
    """Combine [(out [B, Hq, D], lse [B, Hq]), ...]; lse = -inf weighs nothing; if all are, (0, -inf)."""
    outs, lses = (torch.stack(each).double() for each in zip(*parts, strict=True))
    lse = lses.logsumexp(dim=0)
    weights = (lses - torch.where(lse == -INF, 0.0, lse)).exp()[..., None]
    return (weights * outs).sum(dim=0), lse


@examples(6)
@given(
    case=fast_cases(keys=ORDINARY_KEYS, **law_cases),
    n_parts=st.integers(1, 4),
    n_empty=st.integers(0, 1),
    share=st.sampled_from([0.6, 1.0, 0.0]),
)
def test_splits_of_the_blocks_merge_to_the_whole(fast, case, n_parts, n_empty, share):
    x, whole = case.build(torch.float32), case.indices(share)
    owner = torch.randint(0, n_parts, whole.shape, generator=torch.Generator().manual_seed(case.seed))
    parts = [torch.where(owner == part, whole, -1) for part in range(n_parts)] + [torch.full_like(whole, -1)] * n_empty
    event(f"an empty part: {any((part < 0).all(dim=-1).any() for part in parts)}")
    merged = merge([sparse(fast, x, part) for part in parts])
    out, lse = allowance(case, x, whole)
    # A part's weight exp(lse_part - lse) is off by both errors.
    unit = oracle.sparse_attention(*arrays(x.query, x.keys, x.values.abs()), whole.numpy(), case.lengths, x.block_size)
    largest = max((np.nanmax(allowance(case, x, part)[1], initial=0.0) for part in parts), default=0.0)
    assert_same_attention(merged, sparse(fast, x, whole), (out + 2 * largest * unit, lse + largest), "merged")


@examples(5)
@given(case=fast_cases(keys=ORDINARY_KEYS, **law_cases))
def test_all_blocks_give_dense_attention(fast, case):
    x, indices = case.build(torch.float32), case.indices(share=1.0)
    allowed = allowance(case, x, indices)
    assert_same_attention(sparse(fast, x, indices), dense(fast, x), allowed, "all blocks")


@examples(5)
@given(case=fast_cases(keys=ORDINARY_KEYS, **law_cases))
def test_every_token_twice_adds_ln_2_and_nothing_else(fast, case):
    x, indices = case.build(torch.float32), case.indices()
    twice = x.but(
        keys=x.keys.repeat_interleave(2, dim=2),
        values=x.values.repeat_interleave(2, dim=2),
        lengths=2 * x.lengths,
        block_size=2 * x.block_size,
    )
    for once, doubled, blocks in (
        (sparse(fast, x, indices), sparse(fast, twice, indices), indices),
        (dense(fast, x), dense(fast, twice), case.indices(1.0)),
    ):
        allowed = allowance(case, twice, blocks)
        assert_same_attention(doubled, (once[0], once[1].double() + math.log(2)), allowed, "twice")


@examples(5)
@given(case=fast_cases(keys=("grid",), sizes=("plain",), **law_cases), seed=st.integers(0, 99))
def test_one_vector_added_to_all_keys_moves_the_log_sum_exp_only(fast, case, seed):
    """Of whole numbers, so that the sum of key and vector is exact."""
    x, indices = case.build(torch.float32), case.indices()
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randint(-2, 3, (len(case.lengths), case.kv_heads, 1, case.head_dim), generator=generator)
    moved = x.but(keys=x.keys + vector)
    per_head = vector[:, :, 0].repeat_interleave(case.group, dim=1).double()
    shift = (x.query * per_head).sum(dim=-1) * case.head_dim**-0.5
    for before, after, blocks in (
        (sparse(fast, x, indices), sparse(fast, moved, indices), indices),
        (dense(fast, x), dense(fast, moved), case.indices(1.0)),
    ):
        allowed = [a + b for a, b in zip(allowance(case, x, blocks), allowance(case, moved, blocks), strict=True)]
        assert_same_attention(after, (before[0], before[1].double() + shift), allowed, "shifted keys")


@examples(4)
@given(case=fast_cases(keys=ORDINARY_KEYS, **law_cases), seed=st.integers(0, 99))
def test_one_vector_added_to_all_values_moves_the_output_by_it(fast, case, seed):
    x, indices = case.build(torch.float32), case.indices()
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(case.lengths), case.kv_heads, 1, case.head_dim, generator=generator)
    moved, shift = x.but(values=x.values + vector), vector[:, :, 0].repeat_interleave(case.group, dim=1)
    for before, after, blocks in (
        (sparse(fast, x, indices), sparse(fast, moved, indices), indices),
        (dense(fast, x), dense(fast, moved), case.indices(1.0)),
    ):
        expected = before[0].double() + torch.where(before[1] > -INF, 1.0, 0.0)[..., None] * shift
        pair = zip(allowance(case, x, blocks), allowance(case, moved, blocks), strict=True)
        out, lse = (a + b for a, b in pair)
        rounding = eps(torch.float32) * shift.abs().numpy()  # of the sum of value and vector, on top of `out`
        assert_same_attention(after, (expected, before[1]), (out + rounding, lse), "shifted values")


@examples(5)
@given(case=fast_cases(keys=ORDINARY_KEYS, **law_cases), extra=st.integers(0, 5))
def test_order_of_indices_and_minus_one_do_not_matter(fast, case, extra):
    x, indices = case.build(torch.float32), case.indices()
    padding = torch.full((*indices.shape[:2], extra), -1, dtype=torch.int32)
    found = sparse(fast, x, shuffled(torch.cat([indices, padding], dim=-1), case.seed))
    assert_same_attention(found, sparse(fast, x, indices), allowance(case, x, indices), "another order")


@examples(5)
@given(case=fast_cases(keys=ORDINARY_KEYS, **law_cases), extra=st.integers(1, 4))
def test_an_index_past_the_end_contributes_nothing(fast, case, extra):
    """Past the sequence's last block, within the capacity and beyond it."""
    x, indices = case.build(torch.float32), case.indices()
    past = (torch.tensor(x.n_blocks)[:, None, None] + torch.arange(extra)).expand(-1, case.kv_heads, -1).int()
    found = sparse(fast, x, shuffled(torch.cat([indices, past], dim=-1), case.seed))
    assert_same_attention(found, sparse(fast, x, indices), allowance(case, x, indices), "indices past the end")
    out, lse = sparse(fast, x, past)
    assert (out == 0).all()
    assert (lse == -INF).all()


def test_an_index_far_past_the_end_contributes_nothing(fast):
    x = Case(0, 2, 3, 16, 16, lengths=(7,), capacity=9).build(torch.float32)
    # Times 16, in 32 bits, these would be -16 and 0: block 0 once more.
    far = torch.tensor([[[0, 2**31 - 1], [0, 2**28]]], dtype=torch.int32)
    near = torch.tensor([[[0, -1], [0, -1]]], dtype=torch.int32)
    for found, expected in zip(sparse(fast, x, far), sparse(fast, x, near), strict=True):
        assert_same_bits(found, expected, "far index")
    far = torch.tensor([[[0, 2**32], [0, -(2**32)]]])  # as 32 bits, 0
    for found, expected in zip(sparse(fast, x, far), sparse(fast, x, near), strict=True):
        assert_same_bits(found, expected, "far index of 64 bits")


@examples(5)
@given(case=fast_cases(keys=ORDINARY_KEYS, **law_cases), seed=st.integers(0, 99))
def test_permuted_batch_and_kv_heads_permute_every_result(fast, case, seed):
    x, indices = case.build(torch.float32), case.indices()
    generator = torch.Generator().manual_seed(seed)
    rows, kv = (torch.randperm(n, generator=generator) for n in (len(case.lengths), case.kv_heads))
    heads = (kv[:, None] * case.group + torch.arange(case.group)).flatten()  # whole groups move
    moved = x.but(
        query=x.query[rows][:, heads], keys=x.keys[rows][:, kv], values=x.values[rows][:, kv], lengths=x.lengths[rows]
    )
    everything, chosen = case.indices(1.0), indices[rows][:, kv]
    for before, after, blocks in (
        (sparse(fast, x, indices), sparse(fast, moved, chosen), chosen),
        (dense(fast, x), dense(fast, moved), everything[rows][:, kv]),
    ):
        expected = [tensor[rows][:, heads] for tensor in before]
        assert_same_attention(after, expected, allowance(case, moved, blocks), "permuted")
    bounds = [fast.block_bounds(each.keys, each.lengths, case.block_size) for each in (x, moved)]
    assert_same_bits(bounds[1], bounds[0][rows][:, kv], "bounds")


@examples(4)
@given(case=fast_cases(keys=ORDINARY_KEYS, **law_cases), seed=st.integers(0, 99))
def test_heads_of_a_group_are_interchangeable(fast, case, seed):
    """Within a group their order moves their own outputs only."""
    x, indices = case.build(torch.float32), case.indices()
    within = torch.randperm(case.group, generator=torch.Generator().manual_seed(seed))
    heads = (torch.arange(case.kv_heads)[:, None] * case.group + within).flatten()
    moved = x.but(query=x.query[:, heads])
    expected = [tensor[:, heads] for tensor in sparse(fast, x, indices)]
    assert_same_attention(sparse(fast, moved, indices), expected, allowance(case, moved, indices), "within groups")


@examples(4)
@given(case=fast_cases(keys=ORDINARY_KEYS, **(law_cases | {"max_blocks": 3})), n_queries=st.integers(2, 4))
def test_a_window_is_its_queries_one_by_one(fast, case, n_queries):
    """Row i of a window equals a single query over a cache that ends at its position."""
    x = case.build(torch.float32, n_queries=n_queries)
    out, lse = fast.dense_attention(x.query, x.keys, x.values, x.lengths, return_lse=True)
    for i in range(n_queries):
        row = x.but(query=x.query[:, :, i].contiguous(), lengths=(x.lengths - n_queries + i + 1).clamp(min=0))
        blocks = torch.arange(-(-case.capacity // case.block_size), dtype=torch.int32)
        allowed = allowance(case, row, blocks.expand(len(case.lengths), case.kv_heads, -1))
        assert_same_attention((out[:, :, i], lse[:, :, i]), dense(fast, row), allowed, f"row {i}")


# --------------------------------------------------------------------------------------------------------------
# Law 5, inertness: what should not be read changes no bit
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@pytest.mark.parametrize("garbage", GARBAGE)
@examples(1)
@given(case=fast_cases(**law_cases))
@example(case=Case(0, 2, 3, 16, 8, lengths=(0, 1, 17, 40), capacity=43))
def test_garbage_past_the_length_changes_no_bit(fast, garbage, dtype, case):
    clean, dirty = case.build(dtype, slack=0.5), case.build(dtype, slack=GARBAGE[garbage])
    indices = case.indices(1.0)
    for found, expected in zip(sparse(fast, dirty, indices), sparse(fast, clean, indices), strict=True):
        assert_same_bits(found, expected, "sparse attention")
    for found, expected in zip(dense(fast, dirty), dense(fast, clean), strict=True):
        assert_same_bits(found, expected, "dense attention")
    bounds = [fast.block_bounds(x.keys, x.lengths, case.block_size) for x in (dirty, clean)]
    assert_same_bits(*bounds, "bounds")


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@pytest.mark.parametrize("garbage", GARBAGE)
@examples(1)
@given(case=fast_cases(**law_cases), share=st.sampled_from([0.5, 0.0]))
@example(case=Case(0, 2, 3, 16, 8, lengths=(40, 1, 17, 40), capacity=43), share=0.3)
def test_garbage_in_unselected_blocks_changes_no_bit(fast, garbage, dtype, case, share):
    """Every block that no index names, the first and the last among them: where a -1 read as an index points."""
    clean, indices = case.build(dtype, slack=0.5), shuffled(case.indices(share), case.seed)
    block = torch.arange(case.capacity) // case.block_size
    unselected = ~(indices[..., None] == block).any(dim=2)[..., None]  # [B, Hkv, T_max, 1]
    dirty = clean.but(
        keys=clean.keys.masked_fill(unselected, GARBAGE[garbage]),
        values=clean.values.masked_fill(unselected, GARBAGE[garbage]),
    )
    for found, expected in zip(sparse(fast, dirty, indices), sparse(fast, clean, indices), strict=True):
        assert_same_bits(found, expected, "sparse attention")


@pytest.mark.parametrize("garbage", GARBAGE)
@examples(2)
@given(case=fast_cases(**(law_cases | {"max_blocks": 3})), n_queries=st.integers(1, 4), data=st.data())
def test_garbage_in_queries_that_are_not_there_changes_no_bit(fast, garbage, case, n_queries, data):
    """Rows at or past query_lengths, and rows before position 0."""
    size = {"min_size": len(case.lengths), "max_size": len(case.lengths)}
    used = torch.tensor(data.draw(st.lists(st.integers(0, n_queries), **size)), dtype=torch.int32)
    x = case.build(torch.float32, n_queries=n_queries)
    row = torch.arange(n_queries)
    absent = (row >= used[:, None]) | (x.lengths[:, None] - used[:, None] + row < 0)  # [B, Q]
    absent = absent[:, None, :, None].expand_as(x.query)
    dirty = x.query.masked_fill(absent, GARBAGE[garbage])
    clean, found = (
        fast.dense_attention(query, x.keys, x.values, x.lengths, query_lengths=used, return_lse=True)
        for query in (x.query, dirty)
    )
    for left, right in zip(found, clean, strict=True):
        assert_same_bits(left, right, "dense attention")
    assert (found[0][absent] == 0).all()
    assert (found[1][absent[..., 0]] == -INF).all()


@pytest.mark.parametrize("garbage", GARBAGE)
@examples(1)
@given(case=fast_cases(**law_cases))
@example(case=Case(0, 2, 3, 16, 8, lengths=(0, 1, 17, 40), capacity=43))
def test_garbage_past_the_end_changes_neither_scores_nor_selection(fast, garbage, case):
    x, config = case.build(torch.float32), ReSAConfig(block_size=case.block_size, active_ratio=0.5, min_blocks=2)
    bounds = reference_bounds(x)
    past = torch.arange(bounds.shape[-1]) >= torch.tensor(x.n_blocks)[:, None]  # [B, M]
    dirty = bounds.masked_fill(past[:, None, None, None], GARBAGE[garbage])
    scores = fast.score_blocks(x.query, bounds, x.lengths, x.block_size)
    assert_same_bits(fast.score_blocks(x.query, dirty, x.lengths, x.block_size), scores, "scores")
    dirty = scores.masked_fill(past[:, None], GARBAGE[garbage])
    selected = [fast.select_blocks(each, x.lengths, config) for each in (scores, dirty)]
    assert torch.equal(*selected)


@examples(4)
@given(case=fast_cases(min_length=2, **law_cases), n_queries=st.integers(2, 5))
@example(case=Case(0, 2, 3, 16, 8, lengths=(40, 2, 130), capacity=131), n_queries=5)
def test_a_query_does_not_see_later_tokens(fast, case, n_queries):
    """Another newest key and value change no bit of the rows before the last."""
    x = case.build(torch.float32, n_queries=n_queries)
    newest = torch.arange(case.capacity) == x.lengths[:, None] - 1  # [B, T_max]
    newest = newest[:, None, :, None]
    other = x.but(keys=torch.where(newest, x.keys + 1.0, x.keys), values=torch.where(newest, 1e6, x.values))
    first, second = (
        fast.dense_attention(each.query, each.keys, each.values, each.lengths, return_lse=True) for each in (x, other)
    )
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left[:, :, :-1], right[:, :, :-1], "earlier rows")


# --------------------------------------------------------------------------------------------------------------
# Writing a window into the cache
# --------------------------------------------------------------------------------------------------------------


UNTOUCHED = 77.0  # what bounds of blocks that no window touches hold, to show that they are left alone


def check_window(fast, case, starts, ends, dtype, garbage=NAN, wide=torch.int32):
    """Write random tokens at starts … ends - 1 over a cache full of others, and compare every element of it."""
    width = max(1, *(end - start for start, end in zip(starts, ends, strict=True))) + case.seed % 2
    generator = torch.Generator().manual_seed(case.seed)
    cache = [
        torch.randn(len(starts), case.kv_heads, case.capacity, case.head_dim, generator=generator) for _ in range(2)
    ]
    new = [torch.randn(len(starts), case.kv_heads, width, case.head_dim, generator=generator) for _ in range(2)]
    cache, new = ([tensor.to(dtype) for tensor in pair] for pair in (cache, new))
    n_blocks = -(-case.capacity // case.block_size)
    bounds = full(len(starts), case.kv_heads, 2, case.head_dim, n_blocks, value=UNTOUCHED, dtype=dtype)
    for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for tensor in cache:
            tensor[s, :, end:] = garbage
        for tensor in new:
            tensor[s, :, end - start :] = garbage  # rows of the window that this sequence does not use
    expected, expected_bounds = [tensor.clone() for tensor in cache], bounds.clone()
    for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for tensor, fresh in zip(expected, new, strict=True):
            tensor[s, :, start:end] = fresh[s, :, : end - start]
        if end > start:
            touched = slice(start // case.block_size, -(-end // case.block_size))
            rebuilt = oracle.block_bounds(*arrays(expected[0][s : s + 1]), [end], case.block_size)
            expected_bounds[s, ..., touched] = torch.from_numpy(rebuilt)[0, ..., touched].to(dtype)
    lengths = (torch.tensor(each, dtype=wide) for each in (starts, ends))
    keys, values, found = fast.write_window(*cache, bounds, *new, *lengths, case.block_size)
    what = f"{case} {starts} … {ends}"
    assert_same_bits(keys, expected[0], f"keys {what}")
    assert_same_bits(values, expected[1], f"values {what}")
    np.testing.assert_array_equal(found.double(), expected_bounds.double(), f"bounds {what}")


@st.composite
def stretches(draw, case, widest=20):
    """(start, end) of one window per sequence, one in four of them empty; the case's lengths are not used."""
    pairs = []
    for _ in case.lengths:
        start = draw(st.integers(0, case.capacity))
        is_empty = draw(st.sampled_from([False, False, False, True]))
        pairs.append((start, start if is_empty else draw(st.integers(start, min(case.capacity, start + widest)))))
    return tuple(zip(*pairs, strict=True))


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(10)
@given(case=fast_cases(max_blocks=4), data=st.data())
def test_windows_are_stored_and_their_bounds_rebuilt(fast, dtype, case, data):
    check_window(fast, case, *data.draw(stretches(case)), dtype)


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        ((0, 8, 16, 7), (1, 9, 17, 8)),  # one token: the first and the last of a block
        ((0, 40, 17, 9), (0, 40, 17, 9)),  # nothing anywhere: also at 0, at the capacity and within a block
        ((0, 5, 5, 41), (43, 5, 6, 43)),  # everything; nothing; one token; up to the capacity, which ends in a block
        ((7, 8, 9, 15), (24, 25, 26, 17)),  # windows across edges of blocks, of two to four of them
    ],
)
def test_windows_at_the_edges_of_blocks(fast, dtype, starts, ends):
    case = Case(3, 2, 1, 16, 8, lengths=(0,) * 4, capacity=43)
    check_window(fast, case, starts, ends, dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_windows_of_every_shape(fast, head_dim, block_size):
    case = Case(4, 2, 1, head_dim, block_size, lengths=(0,) * 3, capacity=3 * block_size + 1)
    starts = (block_size - 1, 0, 2 * block_size)
    check_window(fast, case, starts, (2 * block_size + 1, block_size, 3 * block_size + 1), torch.float16)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_behind_a_window_does_not_reach_its_bounds(fast, garbage):
    case = Case(5, 3, 1, 16, 8, lengths=(0,) * 3, capacity=30)
    check_window(fast, case, (3, 8, 29), (5, 17, 30), torch.float32, GARBAGE[garbage], torch.int64)


def test_an_extreme_that_is_overwritten_leaves_the_bounds(fast):
    """A running minimum could not forget it; NaN and infinity that are new arrive, in their own channels only."""
    keys, new = full(1, 1, 9, 16, value=1.0), full(1, 1, 3, 16, value=2.0)
    keys[0, 0, 2], keys[0, 0, 3], keys[0, 0, 0, 7] = -100.0, NAN, 5.0
    new[0, 0, 1, 3], new[0, 0, 2, 4] = NAN, -INF
    bounds = reference.block_bounds(keys, int32(9), 8)
    _, _, bounds = fast.write_window(keys, keys.clone(), bounds, new, new, int32(2), int32(5), 8)
    lo, hi = full(16, value=1.0), full(16, value=2.0)
    lo[3], lo[4], hi[3], hi[7] = NAN, -INF, NAN, 5.0
    np.testing.assert_array_equal(bounds[0, 0, :, :, 0], torch.stack([lo, hi]))
    np.testing.assert_array_equal(bounds[0, 0, :, :, 1], full(2, 16, value=1.0))


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
def test_a_cache_written_window_by_window_is_the_references(fast, dtype):
    """Law 2: prefilled raggedly, stepped, rectified and started over, its bounds are those rebuilt from its keys."""
    config = GPTConfig(11, 1, 2, 2, 16, 8, 8)
    cache = reference.KVCache.empty(config, 3, 40, 8, reference.block_bounds, dtype=dtype)
    keys, values, bounds = (tensor[0].clone() for tensor in (cache.keys, cache.values, cache.bounds))
    generator = torch.Generator().manual_seed(0)
    passes = [
        ((0, 0, 0), (11, 3, 0)),
        ((11, 3, 0), (1, 1, 1)),
        ((12, 4, 0), (1, 0, 9)),
        ((9, 1, 9), (5, 20, 0)),
        ((0, 21, 4), (40, 19, 5)),
    ]
    for start, counts in passes:
        width = max(counts)
        shape = (2, 3, width, 16)
        new_keys, new_values = (torch.randn(shape, generator=generator).transpose(0, 1).to(dtype) for _ in range(2))
        window = cache.open_window(int32(*start), int32(*counts), width)
        cache.write(0, new_keys, new_values, window)
        cache.commit(window)
        rest = (new_keys.contiguous(), new_values.contiguous(), window.start, window.end, 8)
        keys, values, bounds = fast.write_window(keys, values, bounds, *rest)
        for found, expected in ((keys, cache.keys[0]), (values, cache.values[0]), (bounds, cache.bounds[0])):
            assert_same_bits(found, expected, f"{start} {counts}")
        np.testing.assert_array_equal(bounds.double(), reference.block_bounds(keys, cache.lengths, 8).double())


def test_new_tokens_may_be_strided(fast):
    """As projections leave them, tokens before heads; and starts and ends may be columns of one tensor."""
    case = Case(6, 3, 1, 16, 8, lengths=(0, 0), capacity=20)
    x = case.build(torch.float32, slack=1.0)
    new = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE).transpose(1, 2)
    edges = torch.tensor([[3, 6], [8, 13]], dtype=torch.int32, device=DEVICE)
    bounds = reference_bounds(x)
    found = fast.write_window(x.keys, x.values, bounds, new, 2 * new, edges[:, 0], edges[:, 1], 8)
    rest = (new.contiguous(), 2 * new.contiguous(), edges[:, 0].clone(), edges[:, 1].clone(), 8)
    expected = fast.write_window(x.keys, x.values, bounds, *rest)
    for left, right in zip(found, expected, strict=True):
        assert_same_bits(left, right, "strided")
    for s, (start, end) in enumerate(edges.tolist()):
        assert torch.equal(found[0][s, :, start:end], new.cpu()[s, :, : end - start])
        assert torch.equal(found[1][s, :, start:end], 2 * new.cpu()[s, :, : end - start])


@pytest.mark.parametrize("is_compressed", [False, True], ids=["exact", "8-bit"])
@examples(8)
@given(
    case=fast_cases(block_sizes=(8, 16), head_dims=(16, 32), sizes=("plain",)), steps=st.integers(0, 1), dtype=DTYPES
)
def test_an_append_and_scores_in_one_kernel_are_those_of_two(is_compressed, case, steps, dtype):
    """Bit for bit, for sequences that take the step and others; the scores are of the blocks before the newest."""
    from resa.fast.blocks import enqueue_append_and_scores, enqueue_scores
    from resa.fast.bounds8 import compress_bounds
    from resa.fast.cache import enqueue_write

    case = replace(case, capacity=case.capacity + 1)
    x = case.build(dtype, slack=1.0)
    query, keys, values, start = (tensor.to(DEVICE) for tensor in (x.query, x.keys, x.values, x.lengths))
    generator, new_shape = torch.Generator().manual_seed(case.seed), (len(start), case.kv_heads, 1, case.head_dim)
    key, value = (torch.randn(new_shape, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    takes = (torch.arange(len(start), device=DEVICE) % 2 == steps).to(torch.int32)
    end, completed = start + takes, start // case.block_size * case.block_size * takes
    results = []
    for is_one in (True, False):
        bounds = reference_bounds(x).to(DEVICE)
        bounds = compress_bounds(bounds) if is_compressed else bounds
        held = keys.clone(), values.clone(), bounds
        if is_one:
            scores = enqueue_append_and_scores(query, key, value, *held, start, end, completed, case.block_size)
        else:
            enqueue_write(*held, key, value, start, end, case.block_size)
            scores = enqueue_scores(query, bounds, completed, case.block_size)
        results.append((*held[:2], bounds.codes if is_compressed else bounds, scores))
    for name, ours, theirs in zip(("keys", "values", "bounds", "scores"), *results, strict=True):
        assert_same_bits(ours.cpu(), theirs.cpu(), name)
    moved = (results[0][0] != keys).flatten(1).any(dim=1)
    assert moved.tolist() == (takes > 0).tolist()


# --------------------------------------------------------------------------------------------------------------
# What all have in common
# --------------------------------------------------------------------------------------------------------------


def all_results(ops, x, config, query_lengths=None):
    """Every tensor the five operations give for one case."""
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    scores = ops.score_blocks(x.query, bounds, x.lengths, x.block_size)
    indices = ops.select_blocks(scores, x.lengths, config)
    sparse = ops.sparse_attention(*x.attention, indices, x.lengths, x.block_size, return_lse=True)
    window = torch.stack([x.query, -x.query], dim=2)
    dense = ops.dense_attention(window, x.keys, x.values, x.lengths, query_lengths=query_lengths, return_lse=True)
    return bounds, scores, indices, *sparse, *dense


@pytest.mark.parametrize("dtype", FAST_DTYPES, ids=str)
@examples(4)
@given(case=fast_cases(**WHOLE, max_blocks=4), data=st.data())
def test_the_chain_of_operations_agrees_with_the_reference(fast, dtype, case, data):
    """Whole numbers, so that both select the same blocks; shapes and dtypes are the same as well, but for spare -1."""
    x, config = case.build(dtype), ReSAConfig(**data.draw(decoding(case.block_size)))
    used = (x.lengths % 3).clamp(max=2)
    found, expected = all_results(fast, x, config, used), all_results(reference, x, config, used)
    bounds, scores, indices, *attended = zip(found, expected, strict=True)
    for each in (bounds, scores):
        assert_same_bits(each[0] + 0.0, each[1] + 0.0, "bounds and scores")
    n = indices[1].shape[2]
    assert torch.equal(indices[0][..., :n], indices[1])
    assert (indices[0][..., n:] == -1).all()
    largest = max((x.values[s, :, :length].abs().max().item() for s, length in enumerate(case.lengths) if length),
                  default=0.0)  # fmt: skip
    for (left, right), size in zip(attended, (largest, None, largest, None), strict=True):
        assert left.shape == right.shape
        assert left.dtype == right.dtype
        # Logits of whole numbers are exact but for the scale; |logit| ≤ 4 · D · D**-0.5.
        logit = 4 * case.head_dim**0.5
        unit = 2 * eps(dtype) + eps(torch.float32) * (4 * logit + 2 * case.capacity)
        assert_within(left, right.double(), unit * (size if size is not None else logit + 5), f"{case}")


@examples(3)
@given(case=fast_cases(max_blocks=3), data=st.data())
def test_inputs_stay_as_they_were(fast, case, data):
    x, config = case.build(torch.float32), ReSAConfig(**data.draw(decoding(case.block_size)))
    used = torch.full_like(x.lengths, 1)
    inputs = [tensor.to(DEVICE) for tensor in (*x.attention, x.lengths, used)]
    before = [tensor.cpu().clone() for tensor in inputs]
    query, keys, values, lengths, used = inputs
    all_results(fast, x.but(query=query, keys=keys, values=values, lengths=lengths), config, used)
    for old, new in zip(before, inputs, strict=True):
        assert_same_bits(new.cpu(), old, "input")


def test_strides_of_queries_indices_and_lengths_do_not_matter(fast):
    case = Case(7, 2, 3, 16, 8, lengths=(40, 3, 29), capacity=41)
    x, indices = case.build(torch.float32, n_queries=3), case.indices()
    window = (strided(x.query), x.keys, x.values, strided(x.lengths))
    plain = fast.dense_attention(*x.attention, x.lengths, query_lengths=int32(3, 2, 1), return_lse=True)
    for options in (int32(3, 2, 1), strided(int32(3, 2, 1))):
        found = fast.dense_attention(*window, query_lengths=options, return_lse=True)
        for left, right in zip(found, plain, strict=True):
            assert_same_bits(left, right, "dense")
    step = x.but(query=x.query[:, :, 1].contiguous())
    plain = sparse(fast, step, indices)
    # As projections leave queries, tokens before heads; and every other number of a buffer of garbage.
    for query in (strided(step.query), x.query.to(DEVICE)[:, :, 1]):
        found = sparse(fast, step.but(query=query, lengths=strided(x.lengths)), strided(indices))
        for left, right in zip(found, plain, strict=True):
            assert_same_bits(left, right, "sparse")
    wide = step.but(lengths=x.lengths.long())
    for left, right in zip(sparse(fast, wide, indices.long()), plain, strict=True):
        assert_same_bits(left, right, "64 bits")
    bounds = fast.block_bounds(x.keys, x.lengths, 8)
    for lengths in (strided(x.lengths), x.lengths.long()):
        assert_same_bits(fast.block_bounds(x.keys, lengths, 8), bounds, "bounds")
        scores = fast.score_blocks(strided(step.query), bounds, lengths, 8)
        assert_same_bits(scores, fast.score_blocks(step.query, bounds, x.lengths, 8), "scores")
        config = ReSAConfig(block_size=8, min_blocks=2)
        selected = fast.select_blocks(scores, lengths, config)
        assert torch.equal(selected, fast.select_blocks(scores, x.lengths, config))


@pytest.mark.parametrize("offset", [8, 16 * 37])
def test_tensors_may_begin_anywhere_in_their_memory(fast, offset):
    """As the layers of one cache do: at multiples of 16 bytes, with something else before and behind."""
    case = Case(7, 2, 3, 16, 8, lengths=(40, 3, 29), capacity=41)
    x, indices, config = case.build(torch.float16), case.indices(), ReSAConfig(block_size=8, min_blocks=2)

    def moved(tensor):
        buffer = torch.full((tensor.numel() + 2 * offset,), NAN, dtype=tensor.dtype, device=DEVICE)
        return buffer[offset:-offset].view(tensor.shape).copy_(tensor)

    there = x.but(query=moved(x.query), keys=moved(x.keys), values=moved(x.values))
    for left, right in zip(all_results(fast, there, config), all_results(fast, x, config), strict=True):
        assert_same_bits(left, right, "elsewhere")
    for left, right in zip(sparse(fast, there, indices), sparse(fast, x, indices), strict=True):
        assert_same_bits(left, right, "elsewhere")


def test_more_than_two_to_the_31_elements(fast, tmp_path):
    """Offsets in 32 bits would wrap around: a cache of 2.4e9 numbers, all zeros in a sparse file but for 40 tokens."""
    shape, n_tokens, lengths = (9, 8, 262_144, 128), 40, int32(*[0] * 8, 40)
    if DEVICE != "cpu":
        pytest.skip("test_fast_gpu.py does this, and more of it, in the GPU's memory")
    file, size = tmp_path / "cache", math.prod(shape)
    with file.open("wb") as sparse_file:
        sparse_file.truncate(2 * size)
    keys = torch.from_file(str(file), shared=True, size=size, dtype=torch.float16).view(shape)
    file.unlink()
    case = Case(3, 8, 2, 128, 16, lengths=(n_tokens,), capacity=n_tokens)
    x = case.build(torch.float16)
    keys[8:, :, :n_tokens] = x.keys
    query, indices = x.query.expand(9, -1, -1), int32(2, 0).expand(9, 8, 2)
    alone, last = x.but(values=x.keys), slice(8, 9)
    for found, expected in (
        (fast.sparse_attention(query, keys, keys, indices, lengths, 16, return_lse=True),
         sparse(fast, alone, indices[last])),
        ([each[:, :, 0] for each in fast.dense_attention(query[:, :, None], keys, keys, lengths, return_lse=True)],
         dense(fast, alone)),
    ):  # fmt: skip
        assert (found[0][:8] == 0).all()
        allowed = (
            4 * eps(torch.float16) * x.keys.abs().max().item(),
            64 * eps(torch.float32) * expected[1].abs().max(),
        )
        for left, right, limit in zip(found, expected, allowed, strict=True):
            assert_within(left[last], right.double(), float(limit), "the last sequence")
    from resa.fast.cache import write_window

    bounds = full(9, 8, 2, 128, 2048, value=UNTOUCHED, dtype=torch.float16)
    new = torch.randn(9, 8, 2, 128, generator=torch.Generator().manual_seed(0)).half()
    write_window(keys, keys, bounds, new, new, int32(*[5] * 8, 39), int32(*[5] * 8, 41), 128)
    assert torch.equal(keys[last, :, 39:41], new[last])
    assert torch.equal(keys[last, :, :39], x.keys[:, :, :39])
    assert not keys[0, 0, :64].any()
    rebuilt = reference.block_bounds(keys[last, :, :41], int32(41), 128)
    assert torch.equal(bounds[last, ..., :1], rebuilt)
    assert (bounds[:8, ..., 0] == UNTOUCHED).all()


def test_same_inputs_same_bits(fast):
    case, config = Case(5, 2, 3, 16, 8, lengths=(43, 0, 9), capacity=45), ReSAConfig(block_size=8, min_blocks=2)
    x = case.build(torch.float32)
    first = all_results(fast, x, config)
    for _ in range(20 if DEVICE == "cpu" else 100):
        for expected, found in zip(first, all_results(fast, x, config), strict=True):
            assert_same_bits(found, expected, "result")


@examples(3)
@given(case=fast_cases(max_blocks=3))
def test_log_sum_exp_is_only_returned_on_request(fast, case):
    x, indices = case.build(torch.float32), case.indices()
    out = fast.sparse_attention(*x.attention, indices, x.lengths, x.block_size)
    assert_same_bits(out, sparse(fast, x, indices)[0], "sparse")
    out = fast.dense_attention(x.query[:, :, None], x.keys, x.values, x.lengths)
    assert_same_bits(out[:, :, 0], dense(fast, x)[0], "dense")
