"""What only a GPU can show of the Triton operations: offsets past 2**31, races, and the shape they are made for.

The reference in float64, on the same GPU, takes the oracle's place: the oracle's loops would take hours here, and on
small shapes the two agree.
"""

import gc
from types import SimpleNamespace

import oracle
import pytest
import torch
from strategies import DEVICE, NAN
from tolerances import assert_same_bits, assert_three_way, assert_within, eps, lse_floor, plain_attention

from resa import reference
from resa.reference.config import ReSAConfig

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(
        DEVICE != "cuda", reason="compiled kernels only: set RESA_TEST_DEVICE=cuda where there is a GPU"
    ),
]

INF = float("inf")
# Nine sequences of 2**28 numbers: the last begins at 2**31, so that an offset of 32 bits would wrap around.
HUGE_BATCH, HUGE_LENGTH, HUGE_HEADS, HUGE_DIM, HUGE_BLOCK = 9, 262_144, 8, 128, 16
HUGE_MEMORY = 32 * 2**30  # bytes: keys and values take 10 GB, the largest bounds 5, the reference in float64 the rest
# The target: 28 query heads over 4 KV heads of 128 channels, blocks of 16, 16K tokens.
HEADS, KV_HEADS, HEAD_DIM, BLOCK, LENGTH = 28, 4, 128, 16, 16_384


@pytest.fixture(scope="module")
def ops():
    """The Triton operations, for tensors that lie on the GPU already."""
    from resa.fast import attention, blocks, cache

    return SimpleNamespace(
        block_bounds=blocks.block_bounds,
        score_blocks=blocks.score_blocks,
        select_blocks=blocks.select_blocks,
        sparse_attention=attention.sparse_attention,
        dense_attention=attention.dense_attention,
        write_window=cache.write_window,
    )


def normal(*shape, seed, dtype, device):
    """Standard normal numbers, drawn on the CPU so that they are the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def logit_size(query, keys):
    """L of tolerances.py, at most: scale · Σ_d |q_d| · max_j |k_jd|; query [B, Hq, Q, D] -> [B, Hq, Q]."""
    largest = keys.double().abs().amax(dim=2).repeat_interleave(query.shape[1] // keys.shape[1], dim=1)  # [B, Hq, D]
    return (query.double().abs() * largest[:, :, None]).sum(dim=-1) * query.shape[-1] ** -0.5


def judge(found, query, keys, values, visible, attend, what):
    """The three-way criterion for finite keys and values and queries [B, Hq, Q, D]; `attend` is the reference's."""
    (out, lse), dtype = found, query.dtype
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    query64, keys64, values64 = (tensor.double() for tensor in (query, keys, values))
    exact, exact_lse = attend(query64, keys64, values64)
    unit, _ = attend(query64, keys64, values64.abs())
    plain = plain_attention(query, keys, values, visible)
    floor = 2 * eps(dtype) * unit.cpu().numpy()
    assert_three_way(out.cpu(), exact.cpu().numpy(), plain.cpu(), floor, f"{what}: out")
    L, exact_lse = logit_size(query, keys).cpu().numpy(), exact_lse.cpu().numpy()
    # Σ_d |q_d k_jd| ≤ L for every j, so that L · (D + 4) roundings are more than allowed for; √D is what they come to.
    allowed = lse_floor(dtype, L, query.shape[-1] ** 0.5, keys.shape[2] ** 0.5, exact_lse, base=2)
    assert_within(lse.cpu(), exact_lse, allowed, f"{what}: lse")


def check_sparse(ops, query, keys, values, indices, lengths, block_size, what, rows=slice(None)):
    """Sparse attention over all sequences; `rows` names those that are looked at."""
    found = ops.sparse_attention(query, keys, values, indices, lengths, block_size, return_lse=True)
    found = [each[rows][:, :, None] for each in found]
    query, keys, values, indices, lengths = (each[rows] for each in (query, keys, values, indices, lengths))
    position = torch.arange(keys.shape[2], device=keys.device)
    chosen = torch.zeros(*indices.shape[:2], -(-keys.shape[2] // block_size) + 1, dtype=torch.bool, device=keys.device)
    chosen.scatter_(2, indices.long() + 1, True)  # block -1 in front
    visible = chosen[..., 1:].repeat_interleave(block_size, dim=2)[..., : keys.shape[2]]
    visible = (visible & (position < lengths[:, None, None])).repeat_interleave(query.shape[1] // keys.shape[1], dim=1)

    def attend(query, keys, values):
        result = reference.sparse_attention(query[:, :, 0], keys, values, indices, lengths, block_size, return_lse=True)
        return [each[:, :, None] for each in result]

    judge(found, query[:, :, None], keys, values, visible[:, :, None], attend, what)


def check_dense(ops, query, keys, values, lengths, query_lengths, what, rows=slice(None)):
    found = ops.dense_attention(query, keys, values, lengths, query_lengths=query_lengths, return_lse=True)
    found = [each[rows] for each in found]
    query, keys, values, lengths, used = (each[rows] for each in (query, keys, values, lengths, query_lengths))
    row, position = (torch.arange(each.shape[2], device=keys.device) for each in (query, keys))
    visible = (position <= (lengths - used).view(-1, 1, 1, 1) + row[:, None]) & (row[:, None] < used.view(-1, 1, 1, 1))

    def attend(query, keys, values):
        return reference.dense_attention(query, keys, values, lengths, query_lengths=used, return_lse=True)

    judge(found, query, keys, values, visible, attend, what)


# --------------------------------------------------------------------------------------------------------------
# Offsets of 64 bits
# --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def huge(device):
    """Keys and values of more than 2**31 numbers each; all NaN but for the last sequence."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < HUGE_MEMORY:
            pytest.skip(f"needs {HUGE_MEMORY / 1e9:.0f} GB of GPU memory, {free / 1e9:.0f} are free")
    shape = (HUGE_BATCH, HUGE_HEADS, HUGE_LENGTH, HUGE_DIM)
    stored = [torch.full(shape, NAN, dtype=torch.float16, device=device) for _ in range(2)]
    for seed, tensor in enumerate(stored):
        tensor[-1] = normal(*shape[1:], seed=seed, dtype=torch.float16, device=device)
    yield SimpleNamespace(keys=stored[0], values=stored[1])
    stored.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def only_last(value, other=0):
    """`value` for the last sequence, `other` for those before it."""
    return int32(*[other] * (HUGE_BATCH - 1), value)


LAST = slice(HUGE_BATCH - 1, HUGE_BATCH)


def test_bounds_of_the_last_sequence_of_a_huge_cache(ops, huge):
    length = HUGE_LENGTH - 3
    bounds = ops.block_bounds(huge.keys, only_last(length), HUGE_BLOCK)
    expected = reference.block_bounds(huge.keys[LAST], int32(length), HUGE_BLOCK)
    assert_same_bits(bounds[LAST] + 0.0, expected + 0.0, "bounds")
    assert (bounds[:-1, :, 0] == INF).all()
    assert (bounds[:-1, :, 1] == -INF).all()


def test_scores_of_the_last_sequence_of_huge_bounds(ops, huge, device):
    """Of four million tokens, so that the bounds, too, are more than 2**31 numbers."""
    n_blocks = HUGE_LENGTH // 2
    bounds = torch.full((HUGE_BATCH, HUGE_HEADS, 2, HUGE_DIM, n_blocks), NAN, dtype=torch.float16, device=device)
    middle, half = (
        normal(HUGE_HEADS, HUGE_DIM, n_blocks, seed=seed, dtype=torch.float16, device=device) for seed in (2, 3)
    )
    bounds[-1, :, 0], bounds[-1, :, 1] = middle - half.abs(), middle + half.abs()
    query = normal(HUGE_BATCH, 3 * HUGE_HEADS, HUGE_DIM, seed=4, dtype=torch.float16, device=device)
    lengths = only_last(8 * n_blocks - 5)
    scores = ops.score_blocks(query, bounds, lengths, 8)
    exact = reference.score_blocks(query[LAST].double(), bounds[LAST].double(), lengths[LAST], 8)
    terms = query[LAST].double().abs().unflatten(1, (HUGE_HEADS, 3)).mean(dim=2)[..., None]  # [1, Hkv, D, 1]
    largest = bounds[LAST].double().abs().amax(dim=2)  # [1, Hkv, D, M]
    allowed = eps(torch.float32) * (3 + HUGE_DIM + 2) * (terms * largest).sum(dim=2)
    assert_within(scores[LAST].cpu(), exact.cpu().numpy(), allowed.cpu().numpy(), "scores")
    assert (scores[:-1] == -INF).all()


def test_sparse_attention_of_the_last_sequence_of_a_huge_cache(ops, huge, device):
    length, n_blocks = HUGE_LENGTH - 3, HUGE_LENGTH // HUGE_BLOCK
    order = torch.rand(HUGE_HEADS, n_blocks, generator=torch.Generator().manual_seed(5)).argsort(dim=-1)
    chosen = torch.cat([order[:, : n_blocks // 10], torch.full((HUGE_HEADS, 1), n_blocks - 1)], dim=1)
    chosen[:, :-1].masked_fill_(chosen[:, :-1] == n_blocks - 1, -1)  # the last block once
    indices = torch.zeros(HUGE_BATCH, *chosen.shape, dtype=torch.int32, device=device)
    indices[-1] = chosen
    query = normal(HUGE_BATCH, 3 * HUGE_HEADS, HUGE_DIM, seed=6, dtype=torch.float16, device=device)
    check_sparse(ops, query, huge.keys, huge.values, indices, only_last(length), HUGE_BLOCK, "huge", LAST)


def test_dense_attention_of_the_last_sequence_of_a_huge_cache(ops, huge, device):
    query = normal(HUGE_BATCH, 3 * HUGE_HEADS, 5, HUGE_DIM, seed=7, dtype=torch.float16, device=device)
    lengths, used = only_last(HUGE_LENGTH - 3), only_last(4, other=5)
    check_dense(ops, query, huge.keys, huge.values, lengths, used, "huge", LAST)


def test_a_window_into_the_last_sequence_of_a_huge_cache(ops, huge, device):
    width, start = 21, HUGE_LENGTH - 24
    new = [
        normal(HUGE_BATCH, HUGE_HEADS, width, HUGE_DIM, seed=seed, dtype=torch.float16, device=device)
        for seed in (8, 9)
    ]
    expected = [stored[LAST].clone() for stored in (huge.keys, huge.values)]
    for tensor, fresh in zip(expected, new, strict=True):
        tensor[:, :, start : start + width] = fresh[LAST]
    n_blocks = HUGE_LENGTH // HUGE_BLOCK
    shape = (HUGE_BATCH, HUGE_HEADS, 2, HUGE_DIM, n_blocks)
    bounds = torch.full(shape, 77.0, dtype=torch.float16, device=device)
    ends = only_last(start + width, other=3)
    ops.write_window(huge.keys, huge.values, bounds, *new, only_last(start, other=3), ends, HUGE_BLOCK)
    assert_same_bits(huge.keys[LAST], expected[0], "keys")
    assert_same_bits(huge.values[LAST], expected[1], "values")
    touched = start // HUGE_BLOCK
    rebuilt = reference.block_bounds(huge.keys[LAST], ends[LAST], HUGE_BLOCK)
    assert_same_bits(bounds[LAST, ..., touched:] + 0.0, rebuilt[..., touched:] + 0.0, "bounds")
    assert (bounds[LAST, ..., :touched] == 77.0).all()
    assert (bounds[:-1] == 77.0).all()
    for stored in (huge.keys, huge.values):
        assert all(sequence.isnan().all() for sequence in stored[:-1])


# --------------------------------------------------------------------------------------------------------------
# The target shape
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_target_shape_agrees_three_ways(ops, device, dtype, scale):
    """Logits of one unit, where all tokens matter, and of sixteen, where few do."""
    batch, n_queries, lengths = 2, 32, int32(LENGTH, LENGTH - 1000 - 5)
    keys, values = (normal(batch, KV_HEADS, LENGTH, HEAD_DIM, seed=s, dtype=dtype, device=device) for s in (10, 11))
    window = normal(batch, HEADS, n_queries, HEAD_DIM, seed=12, dtype=dtype, device=device)
    keys, window = scale * keys, scale * window
    query = window[:, :, -1]
    bounds = ops.block_bounds(keys, lengths, BLOCK)
    assert_same_bits(bounds + 0.0, reference.block_bounds(keys, lengths, BLOCK) + 0.0, "bounds")
    scores = ops.score_blocks(query, bounds, lengths, BLOCK)
    finite = bounds.double().nan_to_num(posinf=0.0, neginf=0.0)
    exact = reference.score_blocks(query.double(), bounds.double(), lengths, BLOCK)
    terms = query.double().abs().unflatten(1, (KV_HEADS, -1)).mean(dim=2)[..., None]
    unit = eps(torch.float32) * (HEADS // KV_HEADS + HEAD_DIM + 2)
    allowed = unit * (terms * finite.abs().amax(dim=2)).sum(dim=2)
    assert_within(scores.cpu(), exact.cpu().numpy(), allowed.cpu().numpy(), "scores")
    config = {"block_size": BLOCK, "active_ratio": 0.1, "min_blocks": 16, "local_blocks": 1}
    indices = ops.select_blocks(scores, lengths, ReSAConfig(**config))
    expected = torch.from_numpy(oracle.select_blocks(scores.tolist(), lengths.tolist(), config))
    assert torch.equal(indices.cpu()[..., : expected.shape[2]], expected)
    assert (indices[..., expected.shape[2] :] == -1).all()
    check_sparse(ops, query, keys, values, indices, lengths, BLOCK, "selected")
    every_block = torch.arange(LENGTH // BLOCK, dtype=torch.int32, device=device).expand(batch, KV_HEADS, -1)
    check_sparse(ops, query, keys, values, every_block, lengths, BLOCK, "all blocks")
    for used in ((n_queries, n_queries), (1, 17)):
        check_dense(ops, window, keys, values, lengths, int32(*used), f"window of {used}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_runs_repeat_bit_for_bit(ops, device, dtype):
    """Splits that arrive in any order are merged in one: 100 runs, of lengths that give each sequence its own share."""
    lengths, used = int32(LENGTH, 1, LENGTH // 3, 0), int32(3, 1, 2, 3)
    keys, values = (normal(4, KV_HEADS, LENGTH, HEAD_DIM, seed=s, dtype=dtype, device=device) for s in (13, 14))
    window = normal(4, HEADS, 3, HEAD_DIM, seed=15, dtype=dtype, device=device)
    config = ReSAConfig(block_size=BLOCK, active_ratio=0.3)

    def run():
        bounds = ops.block_bounds(keys, lengths, BLOCK)
        scores = ops.score_blocks(window[:, :, 0], bounds, lengths, BLOCK)
        indices = ops.select_blocks(scores, lengths, config)
        sparse = ops.sparse_attention(window[:, :, 0], keys, values, indices, lengths, BLOCK, return_lse=True)
        dense = ops.dense_attention(window, keys, values, lengths, query_lengths=used, return_lse=True)
        return bounds, scores, indices, *sparse, *dense

    first = run()
    for _ in range(100):
        for found, expected in zip(run(), first, strict=True):
            assert_same_bits(found, expected, "rerun")


def test_one_set_of_arrival_counters_serves_every_launch(ops, device):
    """As in the decode loop: sparse and dense kernels in turn, captured once, replayed into spoilt memory."""
    from resa.fast.attention import count_dense_units, enqueue_dense, enqueue_sparse
    from resa.fast.graphs import capture

    lengths, used = int32(LENGTH, 1, LENGTH // 3, 0), int32(32, 1, 20, 0)
    keys, values = (normal(4, KV_HEADS, LENGTH, HEAD_DIM, seed=s, dtype=torch.float16, device=device) for s in (16, 17))
    window = normal(4, HEADS, 32, HEAD_DIM, seed=18, dtype=torch.float16, device=device)
    query, n_blocks = window[:, :, 0].contiguous(), LENGTH // BLOCK
    indices = torch.arange(n_blocks, dtype=torch.int32, device=device).repeat(4, KV_HEADS, 1)
    counts = int32(n_blocks, 1, n_blocks // 3 + 1, 0)
    expected = [
        *ops.sparse_attention(query, keys, values, indices, lengths, BLOCK, return_lse=True),
        *ops.dense_attention(window, keys, values, lengths, query_lengths=used, return_lse=True),
    ]
    units = max(4 * KV_HEADS, count_dense_units(keys, HEADS // KV_HEADS, 32))
    arrivals = torch.zeros(units, dtype=torch.int32, device=device)

    found = []

    def run():
        sparse = enqueue_sparse(query, keys, values, indices, counts, lengths, BLOCK, arrivals)
        found[:] = [*sparse, *enqueue_dense(window, keys, values, lengths, used, arrivals)]

    run()
    graph = capture(run)
    for _ in range(100):
        for tensor in found:
            tensor.fill_(NAN)
        graph.replay()
        assert not arrivals.any()
        # A sequence's list is shared among the splits by its count, and the sum rounds by what falls to each.
        for tensor, other in zip(found[2:], expected[2:], strict=True):
            assert_same_bits(tensor, other, "dense")
        for tensor, other in zip(found[:2], expected[:2], strict=True):
            assert torch.allclose(tensor.float(), other.float(), rtol=0, atol=4 * eps(torch.float16), equal_nan=False)


@pytest.mark.parametrize("batch", [1, 3, 48])
def test_from_one_program_to_many_waves(ops, device, batch):
    """One sequence is shared by every multiprocessor; 48 times 4 KV heads are more than there are."""
    length = 4096 + 7
    lengths = int32(*(1 + (length - 1) * (s + 1) // batch for s in range(batch)))
    keys, values = (
        normal(batch, KV_HEADS, length, HEAD_DIM, seed=s, dtype=torch.float16, device=device) for s in (1, 2)
    )
    window = normal(batch, HEADS, 8, HEAD_DIM, seed=3, dtype=torch.float16, device=device)
    check_dense(ops, window, keys, values, lengths, torch.full_like(lengths, 8), f"batch {batch}")
    n_blocks = -(-length // BLOCK)
    indices = torch.arange(n_blocks, dtype=torch.int32, device=device).expand(batch, KV_HEADS, -1)
    check_sparse(ops, window[:, :, 0], keys, values, indices, lengths, BLOCK, f"batch {batch}")


def test_garbage_that_holds_a_graph_does_not_break_a_capture():
    """As an error leaves behind: a traceback's frames hold a decode loop and its graphs, in a cycle."""
    from resa.fast.graphs import capture

    x = torch.zeros(1, device="cuda")
    x.add_(1)  # loads its kernel

    def work():
        kept = [[] for _ in range(10_000)]  # the collector wakes up after so many objects
        x.add_(len(kept))

    gc.collect()
    garbage = [capture(lambda: x.add_(1))]
    garbage.append(garbage)
    del garbage
    graph = capture(work)
    x.zero_()
    graph.replay()
    assert x.item() == 10_000
    assert gc.isenabled()


def test_causal_attention_in_float32_keeps_no_scores():
    """Of 16,384 tokens the scores of one head alone are a GiB; asked for groups in float32, torch keeps all of them."""
    from resa.reference.model import causal_attention

    query, key = (torch.randn(1, heads, 16_384, 64, device="cuda") for heads in (4, 2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = causal_attention(0, query, key, key)
    assert torch.cuda.max_memory_allocated() - before < 2**27
    at = 300
    visible = torch.ones(1, 1, 1, at + 1, dtype=torch.bool, device="cuda")
    expected = plain_attention(query[:, :, at : at + 1], key[:, :, : at + 1], key[:, :, : at + 1], visible)
    assert (out[:, :, at : at + 1] - expected).abs().max() < 1e-5
