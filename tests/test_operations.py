"""Every operation against the oracle and against numbers worked out by hand.

float64 shows that the mathematics is right; float32, bfloat16 and float16 that sums are taken wide enough. Where the
tolerances come from stands in tolerances.py.
"""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import event, given, target
from hypothesis import strategies as st
from strategies import NAN, SCORE_KINDS, Case, build_scores, cases, decoding
from tolerances import (
    assert_same_bits,
    assert_within,
    eps,
    logit_size,
    lse_floor,
    output_floor,
    score_floor,
)

from resa.reference.config import ReSAConfig

INF = math.inf
WIDE, NARROW = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
DTYPES = WIDE + NARROW


def arrays(*tensors):
    """The same numbers in float64, for the oracle."""
    return [tensor.double().numpy() for tensor in tensors]


def tensor(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# --------------------------------------------------------------------------------------------------------------
# Block bounds
# --------------------------------------------------------------------------------------------------------------


def test_bounds_by_hand(ops):
    keys = tensor([[[1.0, -2.0], [3.0, 0.0], [-1.0, 5.0], [9.0, 9.0], [NAN, NAN]]])  # [1, 1, 5, 2]; 3 are valid
    lo, hi = [[1.0, -1.0, INF], [-2.0, 5.0, INF]], [[3.0, -1.0, -INF], [0.0, 5.0, -INF]]  # per channel, 3 blocks
    assert ops.block_bounds(keys, int32(3), 2).tolist() == [[[lo, hi]]]
    assert oracle.block_bounds(keys, [3], 2).tolist() == [[[lo, hi]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases())
def test_bounds_are_the_oracles_exactly(ops, dtype, case):
    x = case.build(dtype)
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    assert bounds.dtype == dtype
    np.testing.assert_array_equal(bounds.double(), oracle.block_bounds(*arrays(x.keys), case.lengths, x.block_size))


@given(case=cases(min_length=1), seed=st.integers(0, 2**32 - 1))
def test_nan_in_a_valid_key_spreads_to_its_channel_and_block_only(ops, case, seed):
    x = case.build()
    clean = ops.block_bounds(x.keys, x.lengths, x.block_size)
    s, h, d = seed % len(case.lengths), seed % case.kv_heads, seed % case.head_dim
    t = seed % case.lengths[s]
    x.keys[s, h, t, d] = NAN
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    assert bounds[s, h, :, d, t // x.block_size].isnan().all()
    clean[s, h, :, d, t // x.block_size] = NAN
    assert_same_bits(bounds.nan_to_num(nan=7.0), clean.nan_to_num(nan=7.0), "the other bounds")


def test_infinite_keys_are_kept_as_bounds(ops):
    keys = tensor([[[INF, 1.0], [0.0, -INF]]])
    assert ops.block_bounds(keys, int32(2), 2).tolist() == [[[[[0.0], [-INF]], [[INF], [1.0]]]]]


# --------------------------------------------------------------------------------------------------------------
# Block scores
# --------------------------------------------------------------------------------------------------------------


def test_scores_by_hand(ops):
    query = tensor([[2.0, 0.0], [0.0, -4.0]])  # one group of two heads, pooled to [1, -2]
    bounds = tensor([[[[1.0, -1.0, INF], [-2.0, 5.0, INF]], [[3.0, -1.0, -INF], [0.0, 5.0, -INF]]]])
    expected = [[[1 * 3 + -2 * -2, 1 * -1 + -2 * 5, -INF]]]  # [[[7, -11, -inf]]]
    assert ops.score_blocks(query, bounds, int32(3), 2).tolist() == expected
    assert oracle.score_blocks(query, bounds, [3], 2).tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases())
def test_scores_are_the_oracles(ops, dtype, case):
    x = case.build(dtype)
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    scores = ops.score_blocks(x.query, bounds, x.lengths, x.block_size)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = oracle.score_blocks(*arrays(x.query, bounds), case.lengths, x.block_size)
    assert_within(scores, exact, score_floor(dtype, *arrays(x.query, bounds)), "scores")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(case=cases(keys=("grid",), queries=("grid",), sizes=("plain",), groups=(2, 4, 8, 1)))
def test_scores_of_whole_numbers_are_exact(ops, dtype, case):
    """A mean of 1, 2, 4 or 8 small whole numbers and every sum after it are exact, in every order of summation."""
    x = case.build(dtype)
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    scores = ops.score_blocks(x.query, bounds, x.lengths, x.block_size)
    np.testing.assert_array_equal(scores, oracle.score_blocks(*arrays(x.query, bounds), case.lengths, x.block_size))


def test_zero_query_times_infinite_bound_is_zero(ops):
    query = tensor([[0.0, 3.0], [-0.0, 1.0]])  # pooled to [0, 2]
    bounds = tensor([[[[-INF], [1.0]], [[INF], [5.0]]]])
    assert ops.score_blocks(query, bounds, int32(2), 2).tolist() == [[[10.0]]]
    assert ops.score_blocks(query.flip(2), bounds, int32(2), 2).tolist() == [[[INF]]]
    assert ops.score_blocks(-query.flip(2), bounds, int32(2), 2).tolist() == [[[INF]]]
    assert oracle.score_blocks(query, bounds, [2], 2).tolist() == [[[10.0]]]


def test_nan_in_a_block_makes_its_score_nan(ops):
    """A zero query does not hide it: only 0 * inf is 0."""
    keys = tensor([[[1.0, 1.0], [1.0, NAN], [2.0, 2.0]]])
    bounds = ops.block_bounds(keys, int32(3), 2)
    for query in ([1.0, 1.0], [1.0, -1.0], [1.0, 0.0]):
        scores = ops.score_blocks(tensor([query]), bounds, int32(3), 2)
        assert scores.isnan().tolist() == [[[True, False]]]


def test_opposed_heads_pool_to_zero(ops):
    query = tensor([[3.0, -1.0], [-3.0, 1.0]])
    bounds = ops.block_bounds(torch.randn(1, 1, 8, 2, dtype=torch.float64), int32(8), 4)
    assert ops.score_blocks(query, bounds, int32(8), 4).tolist() == [[[0.0, 0.0]]]


# --------------------------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------------------------


def select(ops, scores, lengths, dtype=torch.float64, **config):
    """Selected blocks of [B, Hkv, M] nested lists without the -1 at the end, after checking the form of the result."""
    scores, lengths = torch.as_tensor(scores, dtype=dtype), torch.as_tensor(lengths, dtype=torch.int32)
    indices = ops.select_blocks(scores, lengths, ReSAConfig(**config))
    assert indices.dtype == torch.int32
    assert indices.shape[:2] == scores.shape[:2]
    rows = [[row[row >= 0].tolist() for row in sequence] for sequence in indices]
    for sequence, found in zip(indices.tolist(), rows, strict=True):
        for row, blocks in zip(sequence, found, strict=True):
            assert row == sorted(set(blocks)) + [-1] * (len(row) - len(blocks)), "ascending, then -1 only"
    return rows


def test_selection_by_hand(ops):
    config = {"block_size": 2, "active_ratio": 0.1, "min_blocks": 3, "local_blocks": 1}
    scores = [[[1.0, 3.0, NAN, 3.0, -INF, 99.0], [5.0, 4.0, 3.0, 2.0, 1.0, NAN]]]
    expected = [[[1, 3, 4], [0, 1, 4]]]  # nine tokens: five blocks, the fifth local; block 5 is past the end
    assert select(ops, scores, [9], **config) == expected
    assert oracle.select_blocks(scores, [9], config).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(
    config=decoding(),
    kind=st.sampled_from(SCORE_KINDS),
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 3),
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    spare=st.integers(0, 3),
    data=st.data(),
)
def test_selection_is_the_oracles_exactly(ops, dtype, config, kind, seed, kv_heads, tokens, spare, data):
    b = config["block_size"]
    lengths = [max(0, n * b - data.draw(st.integers(0, b - 1))) for n in tokens]
    scores = build_scores(kind, seed, (len(tokens), kv_heads, max(1, max(tokens) + spare)), dtype)
    expected = oracle.select_blocks(scores.tolist(), lengths, config)
    expected = [[row[row >= 0].tolist() for row in sequence] for sequence in expected]
    assert select(ops, scores, lengths, dtype, **config) == expected


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
def test_number_of_blocks(ops, n_blocks, ratio, min_blocks, expected):
    config = {"block_size": 4, "active_ratio": ratio, "min_blocks": min_blocks, "local_blocks": 1}
    for length in {4 * n_blocks, max(0, 4 * n_blocks - 3)}:  # the last block full, and with one token
        [[blocks]] = select(ops, torch.zeros(1, 1, max(1, n_blocks)), [length], **config)
        assert len(blocks) == expected
    assert oracle.count_selected(n_blocks, config) == expected


def test_equal_scores_go_to_the_lower_index(ops):
    config = {"block_size": 1, "active_ratio": 0.1, "min_blocks": 4, "local_blocks": 1}
    assert select(ops, [[[2.0] * 40]], [40], **config) == [[[0, 1, 2, 39]]]
    assert select(ops, [[[0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]], [7], **config) == [[[1, 2, 3, 6]]]
    assert select(ops, [[[NAN] * 7]], [7], **config) == [[[0, 1, 2, 6]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros_of_both_signs_are_equal(ops, dtype):
    config = {"block_size": 1, "active_ratio": 0.1, "min_blocks": 3, "local_blocks": 1}
    assert select(ops, [[[-0.0, 0.0, -0.0, 0.0, 0.0]]], [5], dtype, **config) == [[[0, 1, 4]]]
    assert select(ops, [[[0.0, -0.0, 0.0, -0.0, 0.0]]], [5], dtype, **config) == [[[0, 1, 4]]]


@pytest.mark.parametrize("negative_nan", [False, True])
def test_order_is_numbers_and_infinities_then_nan(ops, negative_nan):
    """Selecting one block more at a time reads the whole order off."""
    nan = torch.tensor(NAN).neg().item() if negative_nan else NAN
    scores = [[[nan, -INF, 1e-300, INF, -1e300, nan, 7.0]]]
    order = []
    for n in range(2, 8):
        [[blocks]] = select(ops, scores, [7], block_size=1, active_ratio=0.01, min_blocks=n, local_blocks=1)
        [new] = set(blocks) - {6, *order}
        order.append(new)
    assert order == [3, 2, 4, 1, 0, 5]


def test_past_the_end_is_never_taken(ops):
    scores = torch.full((1, 1, 8), INF, dtype=torch.float64)
    scores[0, 0, :3] = NAN
    assert select(ops, scores, [5], block_size=2, min_blocks=8, active_ratio=1.0) == [[[0, 1, 2]]]


@pytest.mark.parametrize("local_blocks", [1, 2, 3])
def test_local_blocks_are_in_and_counted(ops, local_blocks):
    scores = [[[5.0, 4.0, 3.0, 2.0, 1.0, -INF, NAN, NAN]]]
    config = {"block_size": 4, "active_ratio": 0.1, "min_blocks": 3, "local_blocks": local_blocks}
    local = list(range(8 - local_blocks, 8))
    assert select(ops, scores, [30], **config) == [[[*range(3 - local_blocks), *local]]]


def test_each_sequence_and_head_selects_for_itself(ops):
    config = {"block_size": 2, "active_ratio": 0.1, "min_blocks": 2, "local_blocks": 1}
    scores = [[[1.0, 0.0, 0.0, 9.0], [0.0, 1.0, 0.0, 9.0]], [[2.0, 3.0, 9.0, 9.0], [3.0, 2.0, 9.0, 9.0]]]
    assert select(ops, scores, [8, 5], **config) == [[[0, 3], [1, 3]], [[1, 2], [0, 2]]]
    assert select(ops, scores, [0, 1], **config) == [[[], []], [[0], [0]]]
    assert select(ops, scores, [0, 0], **config) == [[[], []], [[], []]]


@given(
    case=cases(keys=("grid",), queries=("grid",), sizes=("plain",), groups=(2, 4, 8, 1), max_blocks=8),
    data=st.data(),
)
def test_bounds_scores_and_selection_together_are_exact_on_whole_numbers(ops, case, data):
    """No rounding, so not even a tie may fall differently from the oracle's."""
    config, x = data.draw(decoding(case.block_size)), case.build(torch.float32)
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    found = select(ops, ops.score_blocks(x.query, bounds, x.lengths, x.block_size), case.lengths, **config)
    bounds = oracle.block_bounds(*arrays(x.keys), case.lengths, x.block_size)
    scores = oracle.score_blocks(*arrays(x.query), bounds, case.lengths, x.block_size)
    expected = oracle.select_blocks(scores, case.lengths, config)
    assert found == [[row[row >= 0].tolist() for row in sequence] for sequence in expected]


# --------------------------------------------------------------------------------------------------------------
# Sparse attention
# --------------------------------------------------------------------------------------------------------------


def three_tokens():
    """Logits ln 1, ln 3, ln 2 with the scale 1/2 of four channels; so the weights are 1, 3, 2 over their sum."""
    query = tensor([2.0, 0.0, 0.0, 0.0])[:, None]  # [1, 1, 4]
    keys, values = torch.full((1, 1, 4, 4), NAN, dtype=torch.float64), torch.full((1, 1, 4, 4), NAN).double()
    keys[0, 0, :3] = 0.0
    keys[0, 0, :3, 0] = tensor(1.0, 3.0, 2.0).log()
    values[0, 0, :3] = 6 * torch.eye(4, dtype=torch.float64)[:3]
    return query, keys, values


@pytest.mark.parametrize(
    ("blocks", "expected", "lse"),
    [
        ([0, 1], [1.0, 3.0, 2.0, 0.0], math.log(6)),
        ([0, -1], [1.5, 4.5, 0.0, 0.0], math.log(4)),
        ([1, -1], [0.0, 0.0, 6.0, 0.0], math.log(2)),
        ([-1, -1], [0.0, 0.0, 0.0, 0.0], -INF),
        ([], [0.0, 0.0, 0.0, 0.0], -INF),
    ],
)
def test_sparse_attention_by_hand(ops, blocks, expected, lse):
    indices = torch.tensor(blocks, dtype=torch.int32)[None, None]
    for attend in (ops.sparse_attention, oracle.sparse_attention):
        out, found = attend(*three_tokens(), indices, int32(3), 2, return_lse=True)
        assert out[0, 0].tolist() == pytest.approx(expected, abs=1e-15)
        assert found[0, 0].item() == pytest.approx(lse, abs=1e-15)


def check_sparse(ops, case, x, indices):
    """The operation within twice the error of plain PyTorch plus the floor, per row; returns the largest ratio."""
    dtype = x.query.dtype
    out, lse = ops.sparse_attention(*x.attention, indices, x.lengths, x.block_size, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    query, keys, values = arrays(*x.attention)
    rest = (indices.numpy(), case.lengths, x.block_size)
    exact, exact_lse = oracle.sparse_attention(query, keys, values, *rest, return_lse=True)
    unit = oracle.sparse_attention(query, keys, np.abs(values), *rest)  # Σ p |v|
    L = 0.0 if case.exact_logits else logit_size(query, keys, case.lengths)
    lse_ratio = assert_within(
        lse, exact_lse, lse_floor(dtype, L, case.head_dim, case.capacity, exact_lse), f"lse {case}"
    )
    visible = sparse_mask(indices, x)
    allowed = output_floor(dtype, np.asarray(L), case.head_dim, case.capacity)[..., None] * unit
    allowed = allowed + 2 * plain_error(x.query[:, :, None], x, visible[:, :, None], exact[:, :, None])[:, :, 0]
    return max(lse_ratio, assert_within(out, exact, allowed, f"out {case}"))


def sparse_mask(indices, x):
    """Which tokens each query head may see, spelled with comparisons: [B, Hq, T_max]."""
    position = torch.arange(x.keys.shape[2])
    in_block = (indices.long()[..., None] == position // x.block_size).any(dim=2)  # [B, Hkv, T_max]
    visible = in_block & (position < x.lengths[:, None, None])
    return visible.repeat_interleave(x.query.shape[1] // x.keys.shape[1], dim=1)


def plain_error(query, x, visible, exact):
    """Largest error per row of the usual PyTorch attention in the query's dtype: query [B, Hq, Q, D] -> [B, Hq, Q, 1].

    Its probabilities are rounded to that dtype before they meet the values. In float64 the floor alone judges.
    """
    if query.dtype == torch.float64:
        return np.zeros((*exact.shape[:-1], 1))
    group = query.shape[1] // x.keys.shape[1]
    past = (torch.arange(x.keys.shape[2])[:, None] >= x.lengths[:, None, None, None]).expand_as(x.keys)
    keys = x.keys.masked_fill(past, 0).repeat_interleave(group, dim=1)
    values = x.values.masked_fill(past, 0).repeat_interleave(group, dim=1)
    logits = (query.float() @ keys.float().mT * query.shape[-1] ** -0.5).masked_fill(~visible, -INF)
    weights = logits.softmax(dim=-1).nan_to_num(0.0).to(query.dtype)
    out = (weights.float() @ values.float()).to(query.dtype)
    return np.abs(out.double().numpy() - exact).max(axis=-1, keepdims=True, initial=0.0)


@pytest.mark.parametrize("share", [0.5, 0.15, 1.0])
@given(case=cases())
def test_sparse_attention_is_the_oracles(ops, share, case):
    check_sparse(ops, case, case.build(), case.indices(share))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@given(case=cases())
def test_sparse_attention_rounds_no_worse_than_plain_torch(ops, dtype, case):
    target(check_sparse(ops, case, case.build(dtype), case.indices(0.6)))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@given(case=cases(sizes=("plain",)))
def test_attention_sums_in_float32(ops, dtype, case):
    """Narrow inputs, but only the result is rounded: half a unit of the output on top of float32's own error."""
    x = case.build(dtype)
    indices = case.indices(1.0)
    out = ops.sparse_attention(*x.attention, indices, x.lengths, x.block_size)
    query, keys, values = arrays(*x.attention)
    rest = (indices.numpy(), case.lengths, x.block_size)
    exact = oracle.sparse_attention(query, keys, values, *rest)
    unit = oracle.sparse_attention(query, keys, np.abs(values), *rest)
    L = 0.0 if case.exact_logits else logit_size(query, keys, case.lengths)
    floor = output_floor(torch.float32, np.asarray(L), case.head_dim, case.capacity)[..., None] * unit
    tiny = torch.finfo(dtype).tiny * eps(dtype)  # numbers below `tiny` are this far apart
    assert_within(out, exact, eps(dtype) / 2 * (np.abs(exact) + floor) + floor + tiny / 2, f"out {case}")


def test_query_heads_of_a_group_share_a_kv_head(ops):
    """Head h reads KV head h // G; six heads over two KV heads tell that from h % Hkv."""
    values = torch.stack([torch.full((4, 2), 1.0), torch.full((4, 2), 2.0)])[None].double()  # KV head 0: 1, 1: 2
    query, keys = torch.ones(1, 6, 2).double(), torch.zeros_like(values)
    indices = torch.tensor([[[0, -1], [0, 1]]], dtype=torch.int32)
    out, lse = ops.sparse_attention(query, keys, values, indices, int32(4), 2, return_lse=True)
    assert out[0, :, 0].tolist() == pytest.approx([1, 1, 1, 2, 2, 2])
    assert lse[0].exp().tolist() == pytest.approx([2, 2, 2, 4, 4, 4])  # tokens seen: one block, or two
    out, lse = ops.dense_attention(query[:, :, None], keys, values, int32(4), return_lse=True)
    assert out[0, :, 0, 0].tolist() == pytest.approx([1, 1, 1, 2, 2, 2])
    bounds = ops.block_bounds(values, int32(4), 2)
    assert ops.score_blocks(query * torch.arange(6)[:, None], bounds, int32(4), 2)[0, :, 0].tolist() == [2.0, 16.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_below_any_sentinel_give_the_mean(ops, dtype):
    """-2**120 / 2 (-2**30 / 2 in float16) is less than what masks are often filled with; the masked token is not it."""
    case = Case(0, 2, 3, 4, 2, lengths=(5,), capacity=7, key_kind="abyss")
    x = case.build(dtype)
    mean = x.values[:, :, :5].double().mean(dim=2).repeat_interleave(3, dim=1)
    indices = case.indices(1.0)
    sparse = ops.sparse_attention(*x.attention, indices, x.lengths, 2, return_lse=True)
    dense = ops.dense_attention(x.query[:, :, None], x.keys, x.values, x.lengths, return_lse=True)
    for out, lse in (sparse, (dense[0][:, :, 0], dense[1][:, :, 0])):
        # Σ p |v| is at most 4 here; each of five weights of 1/5 and their sum carry a few roundings.
        assert_within(out, mean, 4 * 16 * eps(dtype), "mean")
        logit = x.keys[0, 0, 0, 0].item() ** 2 / -2
        assert_within(lse, torch.full_like(lse, logit), 4 * eps(torch.float32) * -logit, "lse")


# --------------------------------------------------------------------------------------------------------------
# Dense attention
# --------------------------------------------------------------------------------------------------------------


def test_dense_attention_by_hand(ops):
    query, keys, values = three_tokens()
    query = query[:, :, None].expand(-1, -1, 3, -1)
    rows = [[6.0, 0.0, 0.0, 0.0], [1.5, 4.5, 0.0, 0.0], [1.0, 3.0, 2.0, 0.0]]
    for attend in (ops.dense_attention, oracle.dense_attention):
        out, lse = attend(query, keys, values, int32(3), return_lse=True)
        np.testing.assert_allclose(out[0, 0], rows, atol=1e-15)
        np.testing.assert_allclose(lse[0, 0], np.log([1, 4, 6]), atol=1e-15)
        # Two queries at positions 1 and 2; the third row is not a query.
        out, lse = attend(query, keys, values, int32(3), query_lengths=int32(2), return_lse=True)
        np.testing.assert_allclose(out[0, 0], [*rows[1:], [0.0] * 4], atol=1e-15)
        np.testing.assert_allclose(lse[0, 0], [math.log(4), math.log(6), -INF], atol=1e-15)
        # Three queries, but two tokens: the first sits at position -1.
        out, lse = attend(query, keys, values, int32(2), return_lse=True)
        np.testing.assert_allclose(out[0, 0], [[0.0] * 4, *rows[:2]], atol=1e-15)
        np.testing.assert_allclose(lse[0, 0], [-INF, 0.0, math.log(4)], atol=1e-15)


@st.composite
def windows(draw, case):
    """(Q, query_lengths or None): Q queries per sequence, of which each sequence uses some, 0 and all included."""
    n_queries = draw(st.sampled_from([3, 1, 2, 5, case.capacity + 1]))
    if draw(st.booleans()):
        return min(n_queries, 40), None
    n_queries = min(n_queries, 40)
    return n_queries, draw(st.lists(st.integers(0, n_queries), min_size=len(case.lengths), max_size=len(case.lengths)))


def check_dense(ops, case, x, query_lengths):
    """As `check_sparse`, for a window of queries."""
    dtype = x.query.dtype
    given_lengths = None if query_lengths is None else torch.tensor(query_lengths, dtype=torch.int32)
    out, lse = ops.dense_attention(*x.attention, x.lengths, query_lengths=given_lengths, return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    query, keys, values = arrays(*x.attention)
    exact, exact_lse = oracle.dense_attention(query, keys, values, case.lengths, query_lengths, return_lse=True)
    unit = oracle.dense_attention(query, keys, np.abs(values), case.lengths, query_lengths)
    L = 0.0 if case.exact_logits else logit_size(query, keys, case.lengths)
    lse_ratio = assert_within(
        lse, exact_lse, lse_floor(dtype, L, case.head_dim, case.capacity, exact_lse), f"lse {case}"
    )
    n_queries = x.query.shape[2]
    used = torch.tensor(query_lengths or [n_queries] * len(case.lengths)).view(-1, 1, 1, 1)
    row, position = torch.arange(n_queries)[:, None], torch.arange(case.capacity)
    visible = (position <= x.lengths.view(-1, 1, 1, 1) - used + row) & (row < used)  # [B, 1, Q, T_max]
    allowed = output_floor(dtype, np.asarray(L), case.head_dim, case.capacity)[..., None] * unit
    allowed = allowed + 2 * plain_error(x.query, x, visible, exact)
    return max(lse_ratio, assert_within(out, exact, allowed, f"out {case}"))


@given(case=cases(max_blocks=4), data=st.data())
def test_dense_attention_is_the_oracles(ops, case, data):
    n_queries, query_lengths = data.draw(windows(case))
    event(f"ragged window: {query_lengths is not None}")
    check_dense(ops, case, case.build(n_queries=n_queries), query_lengths)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@given(case=cases(max_blocks=4, max_batch=2), data=st.data())
def test_dense_attention_rounds_no_worse_than_plain_torch(ops, dtype, case, data):
    n_queries, query_lengths = data.draw(windows(case))
    target(check_dense(ops, case, case.build(dtype, n_queries=n_queries), query_lengths))


# --------------------------------------------------------------------------------------------------------------
# What all five have in common
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


@given(case=cases(), data=st.data())
def test_inputs_stay_as_they_were(ops, case, data):
    x, config = case.build(), ReSAConfig(**data.draw(decoding(case.block_size)))
    used = torch.full_like(x.lengths, 1)
    before = [tensor.clone() for tensor in (*x.attention, x.lengths, used)]
    all_results(ops, x, config, used)
    for old, new in zip(before, (*x.attention, x.lengths, used), strict=True):
        assert_same_bits(new, old, "input")


def strided(tensor):
    """The same numbers as every other channel of a buffer of NaN whose first two dimensions are swapped."""
    first, second, *rest = tensor.shape
    buffer = torch.full((second, first, *rest[:-1], 2 * rest[-1]), NAN, dtype=tensor.dtype)
    view = buffer.transpose(0, 1)[..., ::2]
    return view.copy_(tensor)


@given(case=cases(max_blocks=4))
def test_any_strides_will_do(ops, case):
    x = case.build(n_queries=2)
    window = x.but(query=strided(x.query), keys=strided(x.keys), values=strided(x.values))
    check_dense(ops, case, window, None)
    step = window.but(query=strided(x.query[:, :, 1].contiguous()))
    check_sparse(ops, case, step, case.indices())
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    assert_same_bits(ops.block_bounds(window.keys, x.lengths, x.block_size), bounds, "bounds")
    scores = ops.score_blocks(step.query, strided(bounds), x.lengths, x.block_size)
    exact = oracle.score_blocks(*arrays(step.query, bounds), case.lengths, x.block_size)
    assert_within(scores, exact, score_floor(torch.float64, *arrays(step.query, bounds)), "scores")
    config = ReSAConfig(block_size=case.block_size, min_blocks=2)
    selected = [ops.select_blocks(each, x.lengths, config) for each in (scores, strided(scores))]
    assert torch.equal(*selected)


def test_same_inputs_same_bits(ops):
    case, config = Case(5, 2, 3, 16, 4, lengths=(23, 0, 9), capacity=25), ReSAConfig(block_size=4, min_blocks=2)
    x = case.build(torch.float32)
    first = all_results(ops, x, config)
    for _ in range(100):
        for expected, found in zip(first, all_results(ops, x, config), strict=True):
            assert_same_bits(found, expected, "result")


@pytest.mark.parametrize("capacity", [6, 4, 1, 0])
def test_no_tokens_at_all(ops, capacity):
    x = Case(1, 2, 3, 4, 4, lengths=(0, 0), capacity=capacity).build()
    indices = torch.tensor([0, 1, -1], dtype=torch.int32).expand(2, 2, 3)
    for index in (indices, indices[..., :0]):
        out, lse = ops.sparse_attention(*x.attention, index, x.lengths, 4, return_lse=True)
        assert torch.equal(out, torch.zeros(2, 6, 4, dtype=torch.float64))
        assert torch.equal(lse, torch.full((2, 6), -INF, dtype=torch.float64))
    window = x.query[:, :, None].expand(-1, -1, 2, -1)
    for used in (None, int32(2, 0)):
        out, lse = ops.dense_attention(window, x.keys, x.values, x.lengths, query_lengths=used, return_lse=True)
        assert torch.equal(out, torch.zeros(2, 6, 2, 4, dtype=torch.float64))
        assert torch.equal(lse, torch.full((2, 6, 2), -INF, dtype=torch.float64))
    bounds, n_blocks = ops.block_bounds(x.keys, x.lengths, 4), -(-capacity // 4)
    neutral = torch.tensor([INF, -INF], dtype=torch.float64)[:, None, None].expand(2, 2, 2, 4, n_blocks)
    assert torch.equal(bounds, neutral)
    scores = ops.score_blocks(x.query, bounds, x.lengths, 4)
    assert torch.equal(scores, torch.full((2, 2, n_blocks), -INF, dtype=torch.float64))
    selected = ops.select_blocks(scores, x.lengths, ReSAConfig(block_size=4))
    assert selected.shape[:2] == (2, 2)
    assert (selected == -1).all()


@given(case=cases())
def test_log_sum_exp_is_only_returned_on_request(ops, case):
    x, indices = case.build(), case.indices()
    out = ops.sparse_attention(*x.attention, indices, x.lengths, x.block_size)
    with_lse, _ = ops.sparse_attention(*x.attention, indices, x.lengths, x.block_size, return_lse=True)
    assert_same_bits(out, with_lse, "sparse")
    out = ops.dense_attention(x.query[:, :, None], x.keys, x.values, x.lengths)
    with_lse, _ = ops.dense_attention(x.query[:, :, None], x.keys, x.values, x.lengths, return_lse=True)
    assert_same_bits(out, with_lse, "dense")
