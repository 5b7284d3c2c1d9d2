"""The specification's laws 1, 3, 4, 5 and 10, and indices that point past the end.

A law holds in exact arithmetic, and each tolerance says which rounding it allows for: the reference is tested in
float64 to 1e-9, the kernels in float32 to the floors of both sides.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import oracle
from backends import a_law_case, drawn
from judging import arrays, assert_all_same_bits, dense, exact_bounds, sparse
from resa.reference import ReSAConfig
from strategies import GARBAGE, INF, ORDINARY_KEYS, Case, garbage, shuffled
from tolerances import assert_same_bits, assert_within, eps, logit_size, lse_floor, output_floor, score_floor


def allowance(x, indices):
    """Limits for the distance of two correct results of one query over `indices`: arrays (out [B, Hq, D], lse [B, Hq]).

    They are the specification's 1e-9 in float64 and both sides' floors below it.
    """
    query, keys, values = arrays(*x.attention)
    rest = (indices.numpy(), x.lengths.tolist(), x.block_size)
    _, exact_lse = oracle.sparse_attention(query, keys, values, *rest, return_lse=True)
    unit = oracle.sparse_attention(query, keys, np.abs(values), *rest)  # Σ p |v|
    shape = (logit_size(query, keys, x.lengths.tolist()), query.shape[-1], max(x.lengths.tolist()))
    sides = 1 if x.query.dtype == torch.float64 else 2
    lse = lse_floor(x.query.dtype, *shape, exact_lse, base=2)
    return sides * output_floor(x.query.dtype, *shape)[..., None] * unit, sides * lse


def assert_same_attention(found, expected, allowed, what):
    for left, right, limit, name in zip(found, expected, allowed, ("out", "lse"), strict=True):
        assert_within(left, right.double(), limit, f"{what}: {name}")


def per_query_head(tensor, case):
    """[B, Hkv, ...] -> [B, Hq, ...]: for each query head h that of its KV head h // G."""
    return tensor.repeat_interleave(case.group, dim=1)


# --- Law 1, bound: score[i] ≥ q̄ k for every valid key of block i ---


@drawn(6, case=a_law_case())
def test_score_is_an_upper_bound_of_the_pooled_logit(backend, dtype, case):
    x = case.build(dtype)
    bounds = backend.block_bounds(x.keys, x.lengths, x.block_size)
    scores = backend.score_blocks(x.query, bounds, x.lengths, x.block_size).double().numpy()
    unit = eps(torch.float64 if dtype == torch.float64 else torch.float32)
    query, keys = arrays(x.query, x.keys)
    for s, length in enumerate(case.lengths):
        for h, pooled in enumerate(oracle.pool(query[s], case.kv_heads)):
            heads = query[s, h * case.group : (h + 1) * case.group]
            for t in range(length):
                # The law's slack is for the two sums over channels. The mean of G > 1 heads rounds relative to the
                # heads, not to the mean: heads that nearly cancel leave the rounding of large numbers.
                slack = 2 * case.head_dim * unit * np.sum(np.abs(pooled * keys[s, h, t]))
                if case.group > 1:
                    slack += case.group * unit * np.sum(np.abs(heads).mean(axis=0) * np.abs(keys[s, h, t]))
                assert scores[s, h, t // case.block_size] >= pooled @ keys[s, h, t] - slack


# --- Law 3, all blocks = dense ---


@drawn(5, case=a_law_case(), width=st.integers(0, 4))
def test_all_blocks_give_dense_attention(backend, case, width):
    x = case.build(backend.law_dtype)
    indices = case.indices(share=1.0, width=-(-case.capacity // case.block_size) + width)
    assert_same_attention(sparse(backend, x, indices), dense(backend, x), allowance(x, indices), "all blocks")


# --- Law 4, partition: parts merged by log-sum-exp equal the whole ---


def merge(parts):
    """Combine [(out [B, Hq, D], lse [B, Hq]), ...]; lse = -inf weighs nothing; if all are, (0, -inf)."""
    outs, lses = (torch.stack(each).double() for each in zip(*parts, strict=True))
    lse = lses.logsumexp(dim=0)
    weights = (lses - torch.where(lse == -INF, 0.0, lse)).exp()[..., None]
    return (weights * outs).sum(dim=0), lse


def merged_allowance(x, whole, lse_errors):
    """A part's weight exp(lse_part - lse) is off by both log-sum-exps' errors; 1e-9 covers that in float64."""
    out, lse = allowance(x, whole)
    if x.query.dtype == torch.float64:
        return out, lse
    largest = max(np.nanmax(errors, initial=0.0) for errors in lse_errors)
    rest = (whole.numpy(), x.lengths.tolist(), x.block_size)
    unit = oracle.sparse_attention(*arrays(x.query, x.keys, x.values.abs()), *rest)
    return out + 2 * largest * unit, lse + largest


@drawn(
    6,
    case=a_law_case(keys=ORDINARY_KEYS),
    n_parts=st.integers(1, 4),
    n_empty=st.integers(0, 2),
    share=st.sampled_from([0.6, 1.0, 0.0]),
)
def test_splits_of_the_blocks_merge_to_the_whole(backend, case, n_parts, n_empty, share):
    """Each index goes to one of the parts at random; the others hold -1 in its place. Parts may be empty."""
    x, whole = case.build(backend.law_dtype), case.indices(share)
    owner = torch.randint(0, n_parts, whole.shape, generator=torch.Generator().manual_seed(case.seed))
    parts = [torch.where(owner == part, whole, -1) for part in range(n_parts)] + [torch.full_like(whole, -1)] * n_empty
    merged = merge([sparse(backend, x, part) for part in parts])
    allowed = merged_allowance(x, whole, [allowance(x, part)[1] for part in parts])
    assert_same_attention(merged, sparse(backend, x, whole), allowed, f"{len(parts)} parts")


# --- Law 5, inertness: what should not be read changes no bit ---

RAGGED = {"case": Case(0, 2, 3, 16, 8, lengths=(40, 0, 1, 17), capacity=43)}


@pytest.mark.parametrize("kind", GARBAGE)
@drawn(1, RAGGED, case=a_law_case())
def test_garbage_past_the_length_changes_no_bit(backend, dtype, kind, case):
    clean, dirty = (case.build(dtype, slack=slack) for slack in (0.5, garbage(kind, dtype)))
    indices = case.indices(1.0)
    assert_all_same_bits(sparse(backend, dirty, indices), sparse(backend, clean, indices), "sparse attention")
    assert_all_same_bits(dense(backend, dirty), dense(backend, clean), "dense attention")
    bounds = [backend.block_bounds(x.keys, x.lengths, case.block_size) for x in (dirty, clean)]
    assert_same_bits(*bounds, "bounds")


@pytest.mark.parametrize("kind", GARBAGE)
@drawn(1, RAGGED | {"share": 0.3}, case=a_law_case(), share=st.sampled_from([0.5, 0.0]))
def test_garbage_in_unselected_blocks_changes_no_bit(backend, dtype, kind, case, share):
    """Every block that no index names, the first and the last among them: where a -1 read as an index points."""
    clean, indices = case.build(dtype, slack=0.5), shuffled(case.indices(share), case.seed)
    block = torch.arange(case.capacity) // case.block_size
    unselected = ~(indices[..., None] == block).any(dim=2)[..., None]  # [B, Hkv, T_max, 1]
    keys, values = (each.masked_fill(unselected, garbage(kind, dtype)) for each in (clean.keys, clean.values))
    dirty = clean.but(keys=keys, values=values)
    assert_all_same_bits(sparse(backend, dirty, indices), sparse(backend, clean, indices), "sparse attention")


@pytest.mark.parametrize("kind", GARBAGE)
@drawn(2, case=a_law_case(max_blocks=3), n_queries=st.integers(1, 4), data=st.data())
def test_garbage_in_queries_that_are_not_there_changes_no_bit(backend, kind, case, n_queries, data):
    """Rows at or past query_lengths, and rows before position 0."""
    size = {"min_size": len(case.lengths), "max_size": len(case.lengths)}
    used = torch.tensor(data.draw(st.lists(st.integers(0, n_queries), **size)), dtype=torch.int32)
    x, row = case.build(backend.law_dtype, n_queries=n_queries), torch.arange(n_queries)
    absent = (row >= used[:, None]) | (x.lengths[:, None] - used[:, None] + row < 0)  # [B, Q]
    absent = absent[:, None, :, None].expand_as(x.query)
    dirty = x.query.masked_fill(absent, garbage(kind, backend.law_dtype))
    clean, found = (
        backend.dense_attention(query, x.keys, x.values, x.lengths, query_lengths=used, return_lse=True)
        for query in (x.query, dirty)
    )
    assert_all_same_bits(found, clean, "dense attention")
    assert (found[0][absent] == 0).all()
    assert (found[1][absent[..., 0]] == -INF).all()


@pytest.mark.parametrize("kind", GARBAGE)
@drawn(1, RAGGED, case=a_law_case())
def test_garbage_past_the_end_changes_neither_scores_nor_selection(backend, kind, case):
    x = case.build(backend.law_dtype)
    config, bounds = ReSAConfig(block_size=case.block_size, active_ratio=0.5, min_blocks=2), exact_bounds(x)
    past = torch.arange(bounds.shape[-1]) >= torch.tensor(x.n_blocks)[:, None]  # [B, M]
    dirty = bounds.masked_fill(past[:, None, None, None], garbage(kind, backend.law_dtype))
    scores = backend.score_blocks(x.query, bounds, x.lengths, x.block_size)
    assert_same_bits(backend.score_blocks(x.query, dirty, x.lengths, x.block_size), scores, "scores")
    dirty = scores.masked_fill(past[:, None], garbage(kind, backend.law_dtype))
    selected = [backend.select_blocks(each, x.lengths, config) for each in (scores, dirty)]
    assert torch.equal(*selected)


# --- Law 10, certified step error ---


def check_certificate(backend, case, x, indices):
    """Both promises of the law, for every row that selects something; returns ε = R / (Z_S + R) of those rows.

    u[i] is the score of each head's own query: the operation itself, over as many KV heads as query heads. In log
    space, because R overflows.
    """
    bounds = per_query_head(exact_bounds(x), case)
    u = backend.score_blocks(x.query, bounds, x.lengths, case.block_size).double() * case.head_dim**-0.5  # [B, Hq, M]
    block = torch.arange(u.shape[-1])
    tokens = (x.lengths[:, None] - block * case.block_size).clamp(0, case.block_size)[:, None]  # [B, 1, M]
    selected = per_query_head((indices[..., None] == block).any(dim=2), case)  # [B, Hq, M]
    log_r = (tokens.double().log() + u).masked_fill(selected, -INF).logsumexp(dim=-1)
    (whole, whole_lse), (part, lse) = dense(backend, x), sparse(backend, x, indices)
    log_epsilon = log_r - torch.logaddexp(lse.double(), log_r)

    # Rounding of log-sum-exps and scores moves ε and the mass by about as much.
    everything = case.indices(1.0)
    (unit, lse_error), limit = allowance(x, everything), score_floor(x.query.dtype, *arrays(x.query, bounds))
    rounding = np.expm1(2 * lse_error + limit.max(axis=-1, initial=0.0) * case.head_dim**-0.5)
    if x.query.dtype == torch.float64:
        rounding = np.zeros(lse.shape)
    epsilons = []
    for s, h in (lse > -INF).nonzero().tolist():
        epsilon = log_epsilon[s, h].exp().item() + rounding[s, h]
        assert -math.expm1(min(0.0, (lse - whole_lse)[s, h].item())) <= epsilon + 1e-9
        values = x.values[s, h // case.group, : case.lengths[s]].double()
        error = part[s, h].double() - whole[s, h].double()
        for norm in (1, 2, INF):
            size = torch.linalg.vector_norm(error, ord=norm).item() - unit[s, h].sum()
            assert size <= epsilon * torch.cdist(values, values, p=norm).max().item()
            assert size <= 2 * epsilon * torch.linalg.vector_norm(values, ord=norm, dim=-1).max().item()
        epsilons.append(log_epsilon[s, h].exp().item())
    return epsilons


@drawn(4, case=a_law_case(keys=ORDINARY_KEYS, min_length=1), share=st.sampled_from([0.5, 0.2, 0.8]))
def test_left_out_mass_and_output_error_are_certified(backend, case, share):
    check_certificate(backend, case, case.build(backend.law_dtype), case.indices(share))


def test_certificate_says_something_on_clustered_keys(backend):
    """A bound that is always near 1 would hold too: on clusters it must come near the mass that is really left out."""
    epsilons, missing, config = [], [], ReSAConfig(block_size=8, active_ratio=0.3, min_blocks=3)
    for seed in range(20 if backend.is_reference else 4):
        case = Case(seed, 2, 1, 16, 8, lengths=(96, 61), capacity=97, key_kind="clusters")
        x = case.build(backend.law_dtype)
        scores = backend.score_blocks(x.query, exact_bounds(x), x.lengths, 8)
        indices = backend.select_blocks(scores, x.lengths, config)
        epsilons += check_certificate(backend, case, x, indices)
        kept, whole = sparse(backend, x, indices)[1].double(), dense(backend, x)[1].double()
        missing += (1 - (kept - whole).exp()).flatten().tolist()
    assert np.median(epsilons) < 0.1
    # Keys of a block spread by 0.05, so eight of them by less than four times that; u exceeds a logit by at most
    # Σ|q_d| · 0.2 · D**-0.5, which is 16 · 0.8 · 0.2 / 4 = 0.64 for a normal query.
    visible = np.array(missing) > (0 if backend.is_reference else 1e-4)
    assert max(np.array(epsilons)[visible] / np.array(missing)[visible]) < math.exp(0.64)
    assert max(missing) > 1e-3


# --- Indices past the end ---


@drawn(5, case=a_law_case(), extra=st.integers(1, 4))
def test_an_index_past_the_end_contributes_nothing(backend, case, extra):
    """Past the sequence's last block, within the capacity and beyond it."""
    x, indices = case.build(backend.law_dtype), case.indices()
    past = (torch.tensor(x.n_blocks)[:, None, None] + torch.arange(extra)).expand(-1, case.kv_heads, -1).int()
    found = sparse(backend, x, shuffled(torch.cat([indices, past], dim=-1), case.seed))
    assert_same_attention(found, sparse(backend, x, indices), allowance(x, indices), "indices past the end")
    out, lse = sparse(backend, x, past)
    assert (out == 0).all()
    assert (lse == -INF).all()


def test_an_index_far_past_the_end_contributes_nothing(backend):
    """Times 16, in 32 bits, these would be -16 and 0: block 0 once more. Cut to 32 bits, the last two would be 0."""
    x = Case(0, 2, 3, 16, 16, lengths=(7,), capacity=9).build(backend.law_dtype)
    near = sparse(backend, x, torch.tensor([[[0, -1], [0, -1]]], dtype=torch.int32))
    for one, other, dtype in ((2**31 - 1, 2**28, torch.int32), (2**32, -(2**32), torch.int64)):
        far = torch.tensor([[[0, one], [0, other]]], dtype=dtype)
        assert_all_same_bits(sparse(backend, x, far), near, f"{dtype}")
