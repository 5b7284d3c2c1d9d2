"""The specification's laws 1, 3, 4, 5 and 10, and what else must hold when inputs are rearranged.

All in float64. A law holds in exact arithmetic; each tolerance says which rounding it allows for. Kinds of keys whose
logits are -2**119 are left out where a law computes with the log-sum-exp: it has no digits left for ln 2 there.
"""

import math
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from strategies import NAN, ORDINARY_KEYS, Case, build_scores, cases, decoding
from tolerances import assert_same_bits, assert_within, eps

from resa.reference.config import ReSAConfig

INF = math.inf
EPS = eps(torch.float64)
TOLERANCE = 1e-9  # section 4
GARBAGE = {"zero": 0.0, "NaN": NAN, "inf": INF, "-inf": -INF, "huge": 1e308, "lowest": -1e308}


def sparse(ops, x, indices):
    return ops.sparse_attention(*x.attention, indices, x.lengths, x.block_size, return_lse=True)


def dense(ops, x):
    """One query at the newest position of each sequence: [B, Hq, D], [B, Hq]."""
    query, keys, values = x.attention
    out, lse = ops.dense_attention(query[:, :, None], keys, values, x.lengths, return_lse=True)
    return out[:, :, 0], lse[:, :, 0]


def scale_of(x, indices):
    """Σ p |v|, the size that errors of an output are measured in; [B, Hq, D]."""
    query, keys, values = (tensor.double().numpy() for tensor in x.attention)
    return oracle.sparse_attention(query, keys, np.abs(values), indices.numpy(), x.lengths.tolist(), x.block_size)


def assert_same_attention(found, expected, scale, what):
    """Outputs within 1e-9 · Σ p |v|, log-sum-exps within 1e-9 · max(1, |lse|)."""
    (out, lse), (expected_out, expected_lse) = found, expected
    assert_within(out, expected_out, TOLERANCE * scale, f"{what}: out")
    size = expected_lse.abs().clamp(min=1.0).nan_to_num(posinf=1.0)
    assert_within(lse, expected_lse, TOLERANCE * size.numpy(), f"{what}: lse")


def per_query_head(tensor, case):
    """[B, Hkv, ...] -> [B, Hq, ...]: what each query head sees of its KV head, head h of KV head h // G."""
    return tensor.repeat_interleave(case.group, dim=1)


# --------------------------------------------------------------------------------------------------------------
# Law 1, bound: score[i] ≥ q̄ k for every valid key of block i
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(case=cases())
def test_score_is_an_upper_bound_of_the_pooled_logit(ops, dtype, case):
    x = case.build(dtype)
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    scores = ops.score_blocks(x.query, bounds, x.lengths, x.block_size).double().numpy()
    unit = EPS if dtype == torch.float64 else eps(torch.float32)
    query, keys = x.query.double().numpy(), x.keys.double().numpy()
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


@given(case=cases(keys=("grid",), queries=("grid",), sizes=("plain",), groups=(2, 4, 8, 1)))
def test_score_of_whole_numbers_needs_no_slack_and_is_reached_by_a_corner(ops, case):
    """Exact arithmetic: never below any key's logit, and equal to the best corner's of the block's bounding box."""
    x = case.build()
    scores = ops.score_blocks(x.query, ops.block_bounds(x.keys, x.lengths, case.block_size), x.lengths, case.block_size)
    pooled = x.query.unflatten(1, (case.kv_heads, case.group)).mean(dim=2)  # [B, Hkv, D]
    for s, length in enumerate(case.lengths):
        for i in range(-(-length // case.block_size)):
            block = x.keys[s, :, i * case.block_size : min((i + 1) * case.block_size, length)]  # [Hkv, n, D]
            logits = (block * pooled[s, :, None]).sum(dim=-1)
            assert (scores[s, :, i] >= logits.amax(dim=-1)).all()
            assert torch.equal(scores[s, :, i], (block * pooled[s, :, None]).amax(dim=1).sum(dim=-1))


# --------------------------------------------------------------------------------------------------------------
# Law 3, all blocks = dense
# --------------------------------------------------------------------------------------------------------------


@given(case=cases(), width=st.integers(0, 4))
def test_all_blocks_give_dense_attention(ops, case, width):
    x, indices = case.build(), case.indices(share=1.0, width=-(-case.capacity // case.block_size) + width)
    assert_same_attention(sparse(ops, x, indices), dense(ops, x), scale_of(x, indices), "all blocks")


@given(case=cases(), data=st.data())
def test_active_ratio_one_selects_all_blocks_and_gives_dense_attention(ops, case, data):
    x, config = case.build(), ReSAConfig(**data.draw(decoding(case.block_size)) | {"active_ratio": 1.0})
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    scores = ops.score_blocks(x.query, bounds, x.lengths, x.block_size)
    indices = ops.select_blocks(scores, x.lengths, config)
    assert ((indices >= 0).sum(dim=-1) == torch.tensor(x.n_blocks)[:, None]).all()
    assert_same_attention(sparse(ops, x, indices), dense(ops, x), scale_of(x, indices), "ratio 1")


# --------------------------------------------------------------------------------------------------------------
# Law 4, partition: parts merged by log-sum-exp equal the whole
# --------------------------------------------------------------------------------------------------------------


def merge(parts):
    """Combine [(out [B, Hq, D], lse [B, Hq]), ...]; lse = -inf weighs nothing; if all are, (0, -inf)."""
    outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(dim=0)
    weights = (lses - torch.where(lse == -INF, 0.0, lse)).exp()[..., None]
    return (weights * outs).sum(dim=0), lse


def split_rows(indices, n_parts, seed):
    """Deal every index of [B, Hkv, N] to one of the parts at random; the others hold -1 in its place."""
    owner = torch.randint(0, n_parts, indices.shape, generator=torch.Generator().manual_seed(seed))
    return [torch.where(owner == part, indices, -1) for part in range(n_parts)]


@given(
    case=cases(keys=ORDINARY_KEYS),
    n_parts=st.integers(1, 6),
    n_empty=st.integers(0, 2),
    share=st.sampled_from([0.6, 1.0, 0.0]),
)
def test_splits_of_the_blocks_merge_to_the_whole(ops, case, n_parts, n_empty, share):
    x, whole = case.build(), case.indices(share)
    parts = split_rows(whole, n_parts, case.seed) + [torch.full_like(whole, -1)] * n_empty
    event(f"an empty part: {any((part < 0).all(dim=-1).any() for part in parts)}")
    merged = merge([sparse(ops, x, part) for part in parts])
    assert_same_attention(merged, sparse(ops, x, whole), scale_of(x, whole), f"{len(parts)} parts")


@given(case=cases(keys=ORDINARY_KEYS), cuts=st.lists(st.floats(0, 1), max_size=4))
def test_dense_attention_over_stretches_of_the_cache_merges_to_the_whole(ops, case, cuts):
    """Cut anywhere, also within a block; a stretch that begins past a sequence's length is empty."""
    x = case.build()
    edges = sorted({0, case.capacity, *(int(cut * case.capacity) for cut in cuts)})
    edges.insert(len(edges) // 2, edges[len(edges) // 2])  # an empty stretch
    parts = []
    for start, end in pairwise(edges):
        inside = (x.lengths - start).clamp(0, end - start)
        stretch = x.but(keys=x.keys[:, :, start:end], values=x.values[:, :, start:end], lengths=inside)
        parts.append(dense(ops, stretch))
    assert_same_attention(merge(parts), dense(ops, x), scale_of(x, case.indices(1.0)), f"cut at {edges}")


@given(case=cases(keys=ORDINARY_KEYS, max_blocks=5))
def test_selected_and_unselected_blocks_merge_to_dense(ops, case):
    x, everything, selected = case.build(), case.indices(1.0), case.indices(0.5)
    chosen = (everything[..., None] == selected[:, :, None]).any(dim=-1)
    rest = torch.where(chosen, -1, everything)
    merged = merge([sparse(ops, x, selected), sparse(ops, x, rest)])
    assert_same_attention(merged, dense(ops, x), scale_of(x, everything), "selected and rest")


# --------------------------------------------------------------------------------------------------------------
# Law 5, inertness: what should not be read changes no bit
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", GARBAGE)
@given(case=cases())
def test_garbage_past_the_length_changes_no_bit(ops, garbage, case):
    clean, dirty = case.build(slack=0.5), case.build(slack=GARBAGE[garbage])
    indices = case.indices(1.0)
    for found, expected in zip(sparse(ops, dirty, indices), sparse(ops, clean, indices), strict=True):
        assert_same_bits(found, expected, "sparse attention")
    for found, expected in zip(dense(ops, dirty), dense(ops, clean), strict=True):
        assert_same_bits(found, expected, "dense attention")
    bounds = [ops.block_bounds(x.keys, x.lengths, case.block_size) for x in (dirty, clean)]
    assert_same_bits(*bounds, "bounds")


@pytest.mark.parametrize("garbage", GARBAGE)
@given(case=cases(), share=st.sampled_from([0.5, 0.0]))
def test_garbage_in_unselected_blocks_changes_no_bit(ops, garbage, case, share):
    """Every block that no index names, the first and the last among them: where a -1 read as an index points."""
    clean, indices = case.build(slack=0.5), case.indices(share)
    block = torch.arange(case.capacity) // case.block_size
    unselected = ~(indices[..., None] == block).any(dim=2)[..., None]  # [B, Hkv, T_max, 1]
    dirty = clean.but(
        keys=clean.keys.masked_fill(unselected, GARBAGE[garbage]),
        values=clean.values.masked_fill(unselected, GARBAGE[garbage]),
    )
    for found, expected in zip(sparse(ops, dirty, indices), sparse(ops, clean, indices), strict=True):
        assert_same_bits(found, expected, "sparse attention")


@pytest.mark.parametrize("garbage", GARBAGE)
@given(case=cases(max_blocks=4), n_queries=st.integers(1, 4), data=st.data())
def test_garbage_in_queries_that_are_not_there_changes_no_bit(ops, garbage, case, n_queries, data):
    """Rows at or past query_lengths, and rows before position 0."""
    size = {"min_size": len(case.lengths), "max_size": len(case.lengths)}
    used = torch.tensor(data.draw(st.lists(st.integers(0, n_queries), **size)), dtype=torch.int32)
    x = case.build(n_queries=n_queries)
    row = torch.arange(n_queries)
    absent = (row >= used[:, None]) | (x.lengths[:, None] - used[:, None] + row < 0)  # [B, Q]
    absent = absent[:, None, :, None].expand_as(x.query)
    dirty = x.query.masked_fill(absent, GARBAGE[garbage])
    clean, found = (
        ops.dense_attention(query, x.keys, x.values, x.lengths, query_lengths=used, return_lse=True)
        for query in (x.query, dirty)
    )
    for left, right in zip(found, clean, strict=True):
        assert_same_bits(left, right, "dense attention")
    assert (found[0][absent] == 0).all()
    assert (found[1][absent[..., 0]] == -INF).all()


@given(case=cases(), garbage=st.sampled_from(sorted(GARBAGE)), data=st.data())
def test_garbage_past_the_end_changes_neither_scores_nor_selection(ops, case, garbage, data):
    x, config = case.build(), ReSAConfig(**data.draw(decoding(case.block_size)))
    bounds = ops.block_bounds(x.keys, x.lengths, x.block_size)
    past = torch.arange(bounds.shape[-1]) >= torch.tensor(x.n_blocks)[:, None]  # [B, M]
    dirty = bounds.masked_fill(past[:, None, None, None], GARBAGE[garbage])
    scores = ops.score_blocks(x.query, bounds, x.lengths, x.block_size)
    assert_same_bits(ops.score_blocks(x.query, dirty, x.lengths, x.block_size), scores, "scores")
    dirty = scores.masked_fill(past[:, None], GARBAGE[garbage])
    selected = [ops.select_blocks(each, x.lengths, config) for each in (scores, dirty)]
    assert torch.equal(*selected)


@given(case=cases(min_length=2, max_blocks=4), n_queries=st.integers(2, 5))
def test_a_query_does_not_see_later_tokens(ops, case, n_queries):
    """Another newest key and value change no bit of the rows before the last."""
    x = case.build(n_queries=n_queries)
    newest = torch.arange(case.capacity) == x.lengths[:, None] - 1  # [B, T_max]
    newest = newest[:, None, :, None]
    other = x.but(keys=torch.where(newest, x.keys + 1.0, x.keys), values=torch.where(newest, 1e6, x.values))
    first, second = (
        ops.dense_attention(each.query, each.keys, each.values, each.lengths, return_lse=True) for each in (x, other)
    )
    for left, right in zip(first, second, strict=True):
        assert_same_bits(left[:, :, :-1], right[:, :, :-1], "earlier rows")


# --------------------------------------------------------------------------------------------------------------
# Law 10, certified step error
# --------------------------------------------------------------------------------------------------------------


def certificate(ops, case, x, indices):
    """(log ε, log-sum-exp of the selected part) [B, Hq]: the mass left out is at most ε = R / (Z_S + R).

    u[i] is the score of each head's own query: the operation itself, told that every query head has a KV head of its
    own. In log space, because R overflows.
    """
    bounds = per_query_head(ops.block_bounds(x.keys, x.lengths, case.block_size), case)
    u = ops.score_blocks(x.query, bounds, x.lengths, case.block_size) * case.head_dim**-0.5  # [B, Hq, M]
    block = torch.arange(u.shape[-1])
    tokens = (x.lengths[:, None] - block * case.block_size).clamp(0, case.block_size)[:, None]  # [B, 1, M]
    selected = per_query_head((indices[..., None] == block).any(dim=2), case)  # [B, Hq, M]
    log_r = (tokens.double().log() + u).masked_fill(selected, -INF).logsumexp(dim=-1)
    _, lse = sparse(ops, x, indices)
    return log_r - torch.logaddexp(lse, log_r), lse


def check_certificate(ops, case, x, indices):
    """Check both promises of the law for every row that selects something; -> ε of those rows."""
    log_epsilon, lse = certificate(ops, case, x, indices)
    (whole, whole_lse), (part, _) = dense(ops, x), sparse(ops, x, indices)
    scale = scale_of(x, case.indices(1.0))
    epsilons = []
    for s, h in (lse > -INF).nonzero().tolist():
        epsilon = log_epsilon[s, h].exp().item()
        left_out = -math.expm1(min(0.0, (lse - whole_lse)[s, h].item()))
        assert left_out <= epsilon + TOLERANCE
        values = x.values[s, h // case.group, : case.lengths[s]]
        for norm in (1, 2, INF):
            spread = torch.cdist(values, values, p=norm).max().item()
            error = torch.linalg.vector_norm(part[s, h] - whole[s, h], ord=norm).item()
            rounding = TOLERANCE * scale[s, h].sum()
            assert error <= epsilon * spread + rounding
            largest = torch.linalg.vector_norm(values, ord=norm, dim=-1).max().item()
            assert error <= 2 * epsilon * largest + rounding
        epsilons.append(epsilon)
    return epsilons


@given(case=cases(keys=ORDINARY_KEYS, min_length=1), share=st.sampled_from([0.5, 0.2, 0.8]))
def test_left_out_mass_and_output_error_are_certified(ops, case, share):
    check_certificate(ops, case, case.build(), case.indices(share))


@given(case=cases(keys=("clusters", "spike"), queries=("normal",), sizes=("plain",), min_length=1), data=st.data())
def test_certificate_holds_for_what_selection_chooses(ops, case, data):
    x, config = case.build(), ReSAConfig(**data.draw(decoding(case.block_size)))
    bounds = ops.block_bounds(x.keys, x.lengths, case.block_size)
    scores = ops.score_blocks(x.query, bounds, x.lengths, case.block_size)
    check_certificate(ops, case, x, ops.select_blocks(scores, x.lengths, config))


def test_certificate_says_something_on_clustered_keys(ops):
    """A bound that is always near 1 would hold too: on clusters it must come near the mass that is really left out."""
    epsilons, missing = [], []
    for seed in range(20):
        case = Case(seed, 2, 1, 16, 8, lengths=(96, 61), capacity=97, key_kind="clusters")
        x = case.build()
        bounds = ops.block_bounds(x.keys, x.lengths, 8)
        scores = ops.score_blocks(x.query, bounds, x.lengths, 8)
        config = ReSAConfig(block_size=8, active_ratio=0.3, min_blocks=3)
        indices = ops.select_blocks(scores, x.lengths, config)
        epsilons += check_certificate(ops, case, x, indices)
        missing += (1 - (sparse(ops, x, indices)[1] - dense(ops, x)[1]).exp()).flatten().tolist()
    assert np.median(epsilons) < 0.1
    # Keys of a block spread by 0.05, so eight of them by less than four times that; u exceeds a logit by at most
    # Σ|q_d| · 0.2 · D**-0.5, which is 16 · 0.8 · 0.2 / 4 = 0.64 for a normal query.
    assert max(np.array(epsilons) / missing) < math.exp(0.64)
    assert max(missing) > 1e-3


def test_pooled_score_certifies_no_single_head(ops):
    """Heads q and -q pool to zero, so every block scores 0, whatever the heads attend to."""
    case = Case(3, 1, 2, 8, 4, lengths=(24,), capacity=24, key_kind="clusters", query_kind="opposed")
    x = case.build()
    bounds = ops.block_bounds(x.keys, x.lengths, 4)
    assert (ops.score_blocks(x.query, bounds, x.lengths, 4) == 0).all()
    own = ops.score_blocks(x.query, per_query_head(bounds, case), x.lengths, 4)
    assert own.max() > 10
    check_certificate(ops, case, x, torch.tensor([[[0, 5]]], dtype=torch.int32))


# --------------------------------------------------------------------------------------------------------------
# Rearranged inputs
# --------------------------------------------------------------------------------------------------------------


def shuffled(indices, seed):
    """Every row of [B, Hkv, N] in another order, so that -1 stands anywhere."""
    order = torch.rand(indices.shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)
    return indices.gather(2, order)


@given(case=cases(), extra=st.integers(0, 5))
def test_order_of_indices_and_minus_one_do_not_matter(ops, case, extra):
    x, indices = case.build(), case.indices()
    padding = torch.full((*indices.shape[:2], extra), -1, dtype=torch.int32)
    found = sparse(ops, x, shuffled(torch.cat([indices, padding], dim=-1), case.seed))
    assert_same_attention(found, sparse(ops, x, indices), scale_of(x, indices), "another order")


@given(case=cases(), extra=st.integers(1, 4))
def test_an_index_past_the_end_contributes_nothing(ops, case, extra):
    """Past the sequence's last block, within the capacity and beyond it."""
    x, indices = case.build(), case.indices()
    past = (torch.tensor(x.n_blocks)[:, None, None] + torch.arange(extra)).expand(-1, case.kv_heads, -1)
    found = sparse(ops, x, shuffled(torch.cat([indices, past.to(torch.int32)], dim=-1), case.seed))
    assert_same_attention(found, sparse(ops, x, indices), scale_of(x, indices), "indices past the end")
    out, lse = sparse(ops, x, past.to(torch.int32))
    assert (out == 0).all()
    assert (lse == -INF).all()


def test_an_index_far_past_the_end_contributes_nothing(ops):
    x = Case(0, 2, 3, 4, 16, lengths=(7,), capacity=9).build()
    # Times 16, in 32 bits, these would be -16 and 0: block 0 once more.
    far = torch.tensor([[[0, 2**31 - 1], [0, 2**28]]], dtype=torch.int32)
    near = torch.tensor([[[0, -1], [0, -1]]], dtype=torch.int32)
    for found, expected in zip(sparse(ops, x, far), sparse(ops, x, near), strict=True):
        assert_same_bits(found, expected, "far index")


@given(case=cases(keys=ORDINARY_KEYS))
def test_every_token_twice_adds_ln_2_and_nothing_else(ops, case):
    x, indices = case.build(), case.indices()
    twice = x.but(
        keys=x.keys.repeat_interleave(2, dim=2),
        values=x.values.repeat_interleave(2, dim=2),
        lengths=2 * x.lengths,
        block_size=2 * x.block_size,
    )
    for once, doubled, blocks in (
        (sparse(ops, x, indices), sparse(ops, twice, indices), indices),
        (dense(ops, x), dense(ops, twice), case.indices(1.0)),
    ):
        assert_same_attention(doubled, (once[0], once[1] + math.log(2)), scale_of(x, blocks), "twice")


# Sums with a key of 1e30 lose everything that is added to it.
@given(case=cases(keys=("normal", "few", "equal", "grid", "clusters"), sizes=("plain",)), seed=st.integers(0, 99))
def test_one_vector_added_to_all_keys_moves_the_log_sum_exp_only(ops, case, seed):
    x, indices = case.build(), case.indices()
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(case.lengths), case.kv_heads, 1, case.head_dim, generator=generator, dtype=torch.float64)
    moved = x.but(keys=x.keys + vector)
    shift = (x.query * per_query_head(vector[:, :, 0], case)).sum(dim=-1) * case.head_dim**-0.5
    for before, after, blocks in (
        (sparse(ops, x, indices), sparse(ops, moved, indices), indices),
        (dense(ops, x), dense(ops, moved), case.indices(1.0)),
    ):
        assert_same_attention(after, (before[0], before[1] + shift), scale_of(x, blocks), "shifted keys")


@given(case=cases(), seed=st.integers(0, 99))
def test_one_vector_added_to_all_values_moves_the_output_by_it(ops, case, seed):
    x, indices = case.build(), case.indices()
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(case.lengths), case.kv_heads, 1, case.head_dim, generator=generator, dtype=torch.float64)
    moved, shift = x.but(values=x.values + vector), per_query_head(vector[:, :, 0], case)
    for before, after, blocks in (
        (sparse(ops, x, indices), sparse(ops, moved, indices), indices),
        (dense(ops, x), dense(ops, moved), case.indices(1.0)),
    ):
        expected = before[0] + torch.where(before[1] > -INF, 1.0, 0.0)[..., None] * shift
        scale = scale_of(x, blocks) + shift.abs().numpy()
        assert_same_attention(after, (expected, before[1]), scale, "shifted values")


@given(case=cases(), seed=st.integers(0, 99))
def test_permuted_batch_and_kv_heads_permute_every_result(ops, case, seed):
    x, indices = case.build(), case.indices()
    generator = torch.Generator().manual_seed(seed)
    rows, kv = (
        torch.randperm(len(case.lengths), generator=generator),
        torch.randperm(case.kv_heads, generator=generator),
    )
    heads = (kv[:, None] * case.group + torch.arange(case.group)).flatten()  # whole groups move
    moved = x.but(
        query=x.query[rows][:, heads], keys=x.keys[rows][:, kv], values=x.values[rows][:, kv], lengths=x.lengths[rows]
    )
    everything, chosen = case.indices(1.0), indices[rows][:, kv]
    for before, after, blocks in (
        (sparse(ops, x, indices), sparse(ops, moved, chosen), chosen),
        (dense(ops, x), dense(ops, moved), everything[rows][:, kv]),
    ):
        expected = [tensor[rows][:, heads] for tensor in before]
        assert_same_attention(after, expected, scale_of(moved, blocks), "permuted")
    bounds = ops.block_bounds(x.keys, x.lengths, case.block_size)
    moved_bounds = ops.block_bounds(moved.keys, moved.lengths, case.block_size)
    assert_same_bits(moved_bounds, bounds[rows][:, kv], "bounds")


@given(case=cases(), seed=st.integers(0, 99))
def test_heads_of_a_group_are_interchangeable(ops, case, seed):
    """Within a group their order moves their own outputs only, and the group's scores not at all, to rounding."""
    x, indices = case.build(), case.indices()
    within = torch.randperm(case.group, generator=torch.Generator().manual_seed(seed))
    heads = (torch.arange(case.kv_heads)[:, None] * case.group + within).flatten()
    moved = x.but(query=x.query[:, heads])
    expected = [tensor[:, heads] for tensor in sparse(ops, x, indices)]
    assert_same_attention(sparse(ops, moved, indices), expected, scale_of(moved, indices), "within groups")
    bounds = ops.block_bounds(x.keys, x.lengths, case.block_size)
    before, after = (ops.score_blocks(each.query, bounds, x.lengths, case.block_size) for each in (x, moved))
    sizes = per_query_head(bounds.nan_to_num(posinf=0.0, neginf=0.0).abs().amax(dim=2), case)  # [B, Hq, D, M]
    terms = (x.query.abs()[..., None] * sizes).sum(dim=2).unflatten(1, (case.kv_heads, case.group)).mean(dim=2)
    assert_within(after, before, TOLERANCE * terms.numpy(), "scores")


@given(case=cases(min_length=1))
def test_bounds_and_scores_ignore_the_order_of_tokens_in_a_block(ops, case):
    x = case.build()
    order = torch.arange(case.capacity)
    generator = torch.Generator().manual_seed(case.seed)
    shortest = min(case.lengths)
    for start in range(0, shortest, case.block_size):
        end = min(start + case.block_size, shortest)
        order[start:end] = start + torch.randperm(end - start, generator=generator)
    moved = x.but(keys=x.keys[:, :, order])
    bounds = [ops.block_bounds(each.keys, x.lengths, case.block_size) for each in (x, moved)]
    assert_same_bits(bounds[0] + 0.0, bounds[1] + 0.0, "bounds")  # + 0: which of -0 and +0 is smaller is left open


@given(
    config=decoding(),
    seed=st.integers(0, 2**32 - 1),
    n_blocks=st.integers(1, 40),
    kind=st.sampled_from(["normal", "ties", "specials"]),
)
def test_selection_depends_on_the_order_of_scores_only(ops, config, seed, n_blocks, kind):
    """A strictly increasing change of the scores (here: doubling, exact) selects the same blocks; so does more room."""
    scores = build_scores(kind, seed, (1, 2, n_blocks))
    lengths = torch.tensor([n_blocks * config["block_size"]], dtype=torch.int32)
    config = ReSAConfig(**config)
    selected = ops.select_blocks(scores, lengths, config)
    assert torch.equal(ops.select_blocks(2 * scores, lengths, config), selected)
    room = torch.cat([scores, torch.full((1, 2, 3), INF, dtype=torch.float64)], dim=-1)
    assert torch.equal(ops.select_blocks(room, lengths, config), selected)


@given(case=cases(max_blocks=4), n_queries=st.integers(1, 4))
def test_a_window_is_its_queries_one_by_one(ops, case, n_queries):
    """Row i of a window equals a single query over a cache that ends at its position."""
    x = case.build(n_queries=n_queries)
    out, lse = ops.dense_attention(x.query, x.keys, x.values, x.lengths, return_lse=True)
    for i in range(n_queries):
        lengths = (x.lengths - n_queries + i + 1).clamp(min=0)
        row = x.but(query=x.query[:, :, i], lengths=lengths)
        blocks = torch.arange(-(-case.capacity // case.block_size), dtype=torch.int32)
        scale = scale_of(row, blocks.expand(len(case.lengths), case.kv_heads, -1))
        assert_same_attention((out[:, :, i], lse[:, :, i]), dense(ops, row), scale, f"row {i}")
