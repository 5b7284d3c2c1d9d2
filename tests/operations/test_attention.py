"""Sparse attention (eq. 2) and dense attention of a window."""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis import target

import oracle
from backends import a_case, drawn
from judging import (
    all_results,
    arrays,
    assert_all_same_bits,
    check_bounds,
    check_dense,
    check_scores,
    check_sparse,
    dense,
    exact_bounds,
    full,
    int32,
    sparse,
    widened,
)
from resa.reference import ReSAConfig
from strategies import BLOCK_SIZES, HEAD_DIMS, INF, NAN, Case, decoding, shuffled, windows
from tolerances import assert_same_bits, assert_within, eps


@pytest.mark.parametrize(
    ("blocks", "expected", "lse"),
    [
        ([0, 1], [8.0, 4.0], math.log(12)),
        ([1, 0], [8.0, 4.0], math.log(12)),
        ([0, -1], [12.0, 0.0], math.log(8)),
        ([-1, 1], [0.0, 12.0], math.log(4)),
        ([-1, -1], [0.0, 0.0], -INF),
        ([], [0.0, 0.0], -INF),
    ],
)
def test_sparse_attention_by_hand(backend, dtype, blocks, expected, lse):
    """Eight tokens of logit 0 in the first block, one of logit ln 4 in the second: weights 8 and 4."""
    query, keys, values = full(1, 1, 16, dtype=dtype), full(1, 1, 12, 16, dtype=dtype), full(1, 1, 12, 16, dtype=dtype)
    query[..., 0], keys[0, 0, 8, 0] = 4.0, math.log(4)  # times the scale 16**-0.5
    values[0, 0, :8, 0], values[0, 0, 8, 1] = 12.0, 12.0
    keys[0, 0, 9:], values[0, 0, 9:] = NAN, NAN
    indices = torch.tensor(blocks, dtype=torch.int32)[None, None]
    for attend, attended in ((backend.sparse_attention, (query, keys, values)),
                             (oracle.sparse_attention, arrays(query, keys, values))):  # fmt: skip
        out, found = attend(*attended, indices, int32(9), 8, return_lse=True)
        assert out[0, 0, :2].tolist() == pytest.approx(expected, rel=8 * eps(dtype))
        assert not out[0, 0, 2:].any()
        assert found[0, 0].item() == pytest.approx(lse, rel=8 * eps(dtype))


def test_dense_attention_by_hand(backend, dtype):
    """Logits ln 1, ln 3, ln 2: the weights are 1, 3, 2 over their sum."""
    query, keys, values = full(1, 1, 3, 16, dtype=dtype), full(1, 1, 4, 16, dtype=dtype), full(1, 1, 4, 16, dtype=dtype)
    query[..., 0] = 4.0
    keys[0, 0, :3, 0] = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64).log()
    values[0, 0, :3] = 6 * torch.eye(16)[:3]
    keys[0, 0, 3:], values[0, 0, 3:] = NAN, NAN
    rows = [([6.0, 0.0, 0.0], 0.0), ([1.5, 4.5, 0.0], math.log(4)), ([1.0, 3.0, 2.0], math.log(6))]
    nothing = ([0.0] * 3, -INF)
    for lengths, used, expected in (
        (int32(3), None, rows),
        (int32(3), int32(2), [*rows[1:], nothing]),  # queries at positions 1 and 2; the third row is not a query
        (int32(2), None, [nothing, *rows[:2]]),  # the first sits at position -1
    ):
        for attend, attended in ((backend.dense_attention, (query, keys, values)),
                                 (oracle.dense_attention, arrays(query, keys, values))):  # fmt: skip
            out, lse = attend(*attended, lengths, query_lengths=used, return_lse=True)
            found = torch.as_tensor(out)[0, 0].double()
            np.testing.assert_allclose(found[:, :3], [row for row, _ in expected], rtol=8 * eps(dtype))
            assert not found[:, 3:].any()
            allowed = {"rtol": 8 * eps(dtype), "atol": 8 * eps(widened(dtype))}
            np.testing.assert_allclose(lse[0, 0], [each for _, each in expected], **allowed)


@drawn(
    10,
    {"case": Case(0, 2, 3, 16, 8, lengths=(0, 1, 41), capacity=49), "share": 1.0, "extra": 0},
    {"case": Case(0, 3, 16, 32, 16, lengths=(65, 8), capacity=67, key_kind="spike"), "share": 0.6, "extra": 2},
    {"case": Case(0, 2, 5, 32, 8, lengths=(24, 31), capacity=31, key_kind="abyss"), "share": 1.0, "extra": 1},
    {"case": Case(2, 2, 7, 16, 8, lengths=(24, 31), capacity=31, size="huge"), "share": 1.0, "extra": 1},
    case=a_case(),
    share=st.sampled_from([0.6, 1.0, 0.15]),
    extra=st.integers(0, 5),
)
def test_sparse_attention_is_the_oracles(backend, dtype, case, share, extra):
    """With -1 anywhere in the list."""
    n_blocks = -(-case.capacity // case.block_size)
    indices = shuffled(case.indices(share, width=n_blocks + extra), case.seed)
    target(check_sparse(backend, case, case.build(dtype), indices))


NEGATIVE = {"case": Case(4, 2, 3, 32, 8, lengths=(2, 40, 0), capacity=41), "window": (4, None)}
UNUSED = {"case": Case(5, 2, 3, 32, 8, lengths=(3, 40, 9), capacity=41), "window": (5, (5, 0, 4))}


@drawn(10, NEGATIVE, UNUSED, case=a_case(max_blocks=4, max_batch=2), window=st.data())
def test_dense_attention_is_the_oracles(backend, dtype, case, window):
    """Rows at negative positions, no tokens at all, and rows that are unused among them."""
    n_queries, query_lengths = window if isinstance(window, tuple) else window.draw(windows(case))
    target(check_dense(backend, case, case.build(dtype, n_queries=n_queries), query_lengths))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_shape(backend, head_dim, block_size):
    """Whole blocks, a last block of one token, and one that lacks some."""
    lengths = (3 * block_size, 2 * block_size + 1, 7 * block_size - 3)
    case = Case(head_dim, 2, 7, head_dim, block_size, lengths, capacity=7 * block_size)
    x = case.build(torch.float16)
    check_bounds(backend, x)
    check_scores(backend, x)
    check_sparse(backend, case, x, case.indices(0.7))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dense_attention_of_every_head_dim(backend, dtype, head_dim):
    case = Case(head_dim, 2, 3, head_dim, 8, lengths=(150, 65), capacity=150)
    check_dense(backend, case, case.build(dtype, n_queries=6), (6, 3))


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(backend, group):
    """Each number of query heads for three KV heads, in both attentions and in the scores."""
    case = Case(group, 3, group, 16, 8, lengths=(21, 8), capacity=24)
    x = case.build(torch.float32)
    check_sparse(backend, case, x, case.indices(0.7))
    check_scores(backend, x)
    check_dense(backend, case, case.build(torch.float32, n_queries=2), (2, 1))


# --- Precision ---


def test_float32_is_computed_in_float32(backend):
    """Keys that agree in their first twelve bits: TF32, which keeps eleven, would give both half the weight."""
    keys, values = full(1, 1, 2, 16), full(1, 1, 2, 16)
    keys[0, 0, 0] = 1.0
    keys[0, 0, 1] = 1.0 + 2.0**-14
    values[0, 0, 1] = 1.0 + 2.0**-14
    query = full(1, 1, 16, value=2.0**12)
    exact = 1 / (1 + math.exp(-(2.0**12) * 16 * 2.0**-14 / 4)) * (1.0 + 2.0**-14)
    out = backend.sparse_attention(query, keys, values, int32(0)[None, None], int32(2), 8)
    assert out[0, 0].tolist() == pytest.approx([exact] * 16, rel=2**-11 * 2.0**-6)
    out = backend.dense_attention(query[:, :, None], keys, values, int32(2))
    assert out[0, 0, 0].tolist() == pytest.approx([exact] * 16, rel=2**-11 * 2.0**-6)


def test_sums_are_taken_in_float32(backend, dtype):
    """Over equal weights, which no dtype rounds, all that is lost is half a unit of the output."""
    case = Case(9, 2, 3, 256, 8, lengths=(601, 333), capacity=601, key_kind="equal")
    x = case.build(dtype)
    x = x.but(values=(x.values.abs() + 0.5).to(dtype))  # of one sign, so that the sums grow
    indices = case.indices(1.0)
    exact = oracle.sparse_attention(*arrays(*x.attention), indices.numpy(), case.lengths, 8)
    allowed = (eps(dtype) / 2 + 1000 * eps(widened(dtype))) * exact
    for out in (sparse(backend, x, indices)[0], dense(backend, x)[0]):
        assert_within(out, exact, allowed, "sums")


# --- Nothing to read ---


@pytest.mark.parametrize("capacity", [20, 8, 1, 0])
def test_no_tokens_at_all(backend, dtype, capacity):
    x = Case(1, 2, 3, 16, 8, lengths=(0, 0), capacity=capacity).build(dtype)
    indices = int32(0, 1, -1).expand(2, 2, 3)
    for index in (indices, indices[..., :0], -torch.ones_like(indices)):
        out, lse = sparse(backend, x, index)
        assert torch.equal(out, full(2, 6, 16, dtype=dtype))
        assert torch.equal(lse, full(2, 6, value=-INF, dtype=widened(dtype)))
    window = x.query[:, :, None].expand(-1, -1, 2, -1)
    for used in (None, int32(2, 0)):
        out, lse = backend.dense_attention(window, x.keys, x.values, x.lengths, query_lengths=used, return_lse=True)
        assert torch.equal(out, full(2, 6, 2, 16, dtype=dtype))
        assert torch.equal(lse, full(2, 6, 2, value=-INF, dtype=widened(dtype)))
    bounds, n_blocks = backend.block_bounds(x.keys, x.lengths, 8), -(-capacity // 8)
    assert torch.equal(bounds, torch.tensor([INF, -INF], dtype=dtype)[:, None, None].expand(2, 2, 2, 16, n_blocks))
    scores = backend.score_blocks(x.query, bounds, x.lengths, 8)
    assert torch.equal(scores, full(2, 2, n_blocks, value=-INF, dtype=widened(dtype)))
    selected = backend.select_blocks(scores, x.lengths, ReSAConfig(block_size=8))
    assert selected.shape[:2] == (2, 2)
    assert (selected == -1).all()


def test_no_sequences_and_no_queries(backend):
    """An empty batch, and a window without a row, give empty results of the right shape."""
    keys, none = full(0, 2, 20, 16), torch.zeros(0, dtype=torch.int32)
    assert backend.block_bounds(keys, none, 8).shape == (0, 2, 2, 16, 3)
    assert backend.score_blocks(full(0, 6, 16), full(0, 2, 2, 16, 3), none, 8).shape == (0, 2, 3)
    assert backend.select_blocks(full(0, 2, 3), none, ReSAConfig(block_size=8)).shape[:2] == (0, 2)
    indices = torch.zeros(0, 2, 1, dtype=torch.int32)
    out, lse = backend.sparse_attention(full(0, 6, 16), keys, keys, indices, none, 8, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 6, 16), (0, 6))
    for batch, n_queries in ((0, 3), (2, 0)):
        keys, lengths = full(batch, 2, 20, 16), torch.ones(batch, dtype=torch.int32)
        window, used = full(batch, 6, n_queries, 16), 0 * lengths
        out, lse = backend.dense_attention(window, keys, keys, lengths, query_lengths=used, return_lse=True)
        assert (out.shape, lse.shape) == ((batch, 6, n_queries, 16), (batch, 6, n_queries))


# --- All five operations ---


@drawn(3, case=a_case(max_blocks=3), data=st.data())
def test_inputs_stay_as_they_were(backend, case, data):
    x, config = case.build(torch.float32), ReSAConfig(**data.draw(decoding(case.block_size)))
    inputs = [tensor.to(backend.device) for tensor in (*x.attention, x.lengths, torch.full_like(x.lengths, 1))]
    before = [tensor.cpu().clone() for tensor in inputs]
    query, keys, values, lengths, used = inputs
    all_results(backend, x.but(query=query, keys=keys, values=values, lengths=lengths), config, used)
    assert_all_same_bits([tensor.cpu() for tensor in inputs], before, "input")


def strided(tensor, device):
    """Equal numbers as every other element of the last dimension of a buffer of garbage."""
    garbage = NAN if tensor.is_floating_point() else 1234567
    buffer = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), garbage, dtype=tensor.dtype, device=device)
    return buffer[..., ::2].copy_(tensor)


def test_strides_do_not_matter(backend):
    """Kernels take no strides of the cache, of bounds and of scores; those of the reference's may be anything."""
    case = Case(7, 2, 3, 16, 8, lengths=(40, 3, 29), capacity=41)
    x, indices, config = case.build(torch.float32, n_queries=3), case.indices(), ReSAConfig(block_size=8, min_blocks=2)
    spread = {name: strided(getattr(x, name), backend.device) for name in ("query", "keys", "values", "lengths")}
    moved = x.but(**(spread if backend.is_reference else {name: spread[name] for name in ("query", "lengths")}))
    plain = backend.dense_attention(*x.attention, x.lengths, query_lengths=int32(3, 2, 1), return_lse=True)
    for used in (int32(3, 2, 1), strided(int32(3, 2, 1), backend.device)):
        found = backend.dense_attention(*moved.attention, moved.lengths, query_lengths=used, return_lse=True)
        assert_all_same_bits(found, plain, "dense")
    step = x.but(query=x.query[:, :, 1].contiguous())
    plain = sparse(backend, step, indices)
    # Projections leave queries with tokens before heads.
    for query in (strided(step.query, backend.device), x.query.to(backend.device)[:, :, 1]):
        assert_all_same_bits(sparse(backend, moved.but(query=query), strided(indices, backend.device)), plain, "sparse")
    wide = step.but(lengths=x.lengths.long())
    assert_all_same_bits(sparse(backend, wide, indices.long()), plain, "64 bits")
    bounds = exact_bounds(x)
    scores = backend.score_blocks(step.query, bounds, x.lengths, 8)
    for lengths in (moved.lengths, x.lengths.long()):
        assert_same_bits(backend.block_bounds(moved.keys, lengths, 8) + 0.0, bounds + 0.0, "bounds")
        table = strided(bounds, backend.device) if backend.is_reference else bounds
        found = backend.score_blocks(strided(step.query, backend.device), table, lengths, 8)
        assert_same_bits(found, scores, "scores")
        table = strided(scores, backend.device) if backend.is_reference else scores
        selected = backend.select_blocks(table, lengths, config)
        assert torch.equal(selected, backend.select_blocks(scores, x.lengths, config))
