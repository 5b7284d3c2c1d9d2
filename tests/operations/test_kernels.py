"""Only Triton: tiles and splits of the kernels, windows written into the cache, and memory as a kernel meets it."""

import math
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import oracle
from backends import TRITON, a_case, drawn, poisoned_memory
from judging import (
    arrays,
    assert_all_same_bits,
    check_bounds,
    check_dense,
    check_scores,
    check_sparse,
    exact_bounds,
    full,
    int32,
    sparse,
)
from strategies import BLOCK_SIZES, DEVICE, GARBAGE, HEAD_DIMS, INF, NAN, Case, garbage, shuffled
from tolerances import assert_same_bits, assert_within, eps

each_dtype = pytest.mark.parametrize("dtype", TRITON.dtypes, ids=str)

# --- Tiles and splits ---


@pytest.mark.parametrize("n_blocks", [1103, 1104])  # the second a multiple of 16
def test_bounds_and_scores_of_long_rows(kernels, monkeypatch, n_blocks):
    """More blocks than one tile holds, and sequences that end in the first tile, in the second, and in the last."""
    case = Case(1, 1, 2, 16, 8, lengths=(8 * n_blocks - 3, 17, 8 * 150), capacity=8 * n_blocks)
    x = case.build(torch.float16)
    check_bounds(kernels, x)
    bounds = exact_bounds(x)
    dirty = bounds.masked_fill(torch.isinf(bounds), NAN)  # past the end
    for many in (10**9, 1):  # scores from which on tiles are larger
        monkeypatch.setattr("resa.fast.blocks.MANY_SCORES", many)
        check_scores(kernels, x, bounds)
        scores = [kernels.score_blocks(x.query, each, x.lengths, 8) for each in (bounds, dirty)]
        assert_same_bits(*scores, "scores")


@pytest.mark.parametrize("width", [1, 2, 5, 16, 17, 33, 64, 65, 129])
def test_every_width_of_the_selection(kernels, width):
    """However the blocks are dealt to splits, none is dropped: the last of the list holds all the weight."""
    length = 8 * width
    case = Case(width, 2, 2, 16, 8, lengths=(length, length - 7), capacity=length)
    x = case.build(torch.float32)
    x.keys[:, :, length - 8 : length - 7] = 2 * x.query[:, ::2, None]  # the first token of the last block
    check_sparse(kernels, case, x, case.indices(1.0))
    check_sparse(kernels, case, x, case.indices(1.0).flip(2))  # and the first of the list


@pytest.mark.parametrize("length", [16, 17, 63, 64, 65, 128, 129, 257, 400])
@each_dtype
def test_every_length_of_the_cache(kernels, dtype, length):
    """However the keys are dealt to tiles and splits, the newest, which holds all the weight, is seen, and no other."""
    case = Case(length, 2, 2, 16, 8, lengths=(length, length - 1), capacity=length)
    x = case.build(dtype, n_queries=2)
    for s, tokens in enumerate(case.lengths):
        x.keys[s, :, tokens - 1] = 3 * x.query[s, ::2, 1]
    check_dense(kernels, case, x)
    check_dense(kernels, case, x, (1, 2))


@pytest.mark.parametrize(
    ("group", "n_queries", "query_lengths"), [(16, 20, (20, 7)), (7, 43, None), (1, 300, (300, 129)), (3, 100, (1, 99))]
)
@each_dtype
def test_windows_wider_than_a_tile(kernels, dtype, group, n_queries, query_lengths):
    """300 rows and more per KV head: several tiles of rows, which see different numbers of keys."""
    case = Case(group, 2, group, 16, 8, lengths=(70, 130), capacity=131)
    check_dense(kernels, case, case.build(dtype, n_queries=n_queries), query_lengths)


@pytest.mark.parametrize("splits", [1, 2, 3, 16, 33])  # up to 16 are merged at once
@each_dtype
def test_any_number_of_splits(kernels, monkeypatch, dtype, splits):
    """A kernel decides by the GPU; every number must do. Some splits are empty: there are more than there is work."""
    monkeypatch.setattr("resa.fast.attention.count_splits", lambda *_: splits)
    for kind in ("normal", "abyss"):  # the second: equal logits so large that their log-sum-exp counts no tokens
        case = Case(splits, 1, 3, 16, 8, lengths=(1100, 3, 0), capacity=1101, key_kind=kind)
        x = case.build(dtype)
        check_sparse(kernels, case, x, case.indices(0.9))
        check_sparse(kernels, case, x, shuffled(case.indices(0.2, width=141), 0))
        check_dense(kernels, case, case.build(dtype, n_queries=2), (2, 1, 1))


@each_dtype
def test_split_counters_are_the_callers_and_come_back_as_zeros(kernels, dtype):
    """The decode loop passes its own, and the counts of a sequence's list; too few counters are refused."""
    attention = import_module("resa.fast.attention")
    case = Case(4, 2, 3, 16, 8, lengths=(300, 9), capacity=300)
    x, indices = case.build(dtype, n_queries=20), case.indices(1.0)
    query, keys, values, lengths, blocks = (each.to(DEVICE) for each in (*x.attention, x.lengths, indices))
    needed = attention.count_split_counters(keys, 3, 20)
    counters = torch.zeros(max(needed, 4), dtype=torch.int32, device=DEVICE)
    counts = (indices >= 0).sum(dim=2)[:, 0].int().to(DEVICE)
    with poisoned_memory():
        owned = attention.dense_attention(query, keys, values, lengths, split_counters=counters)
        step = attention.sparse_attention(
            query[:, :, 0], keys, values, blocks, lengths, 8, counts=counts, split_counters=counters
        )
    assert not counters.any()
    assert_same_bits(owned.cpu(), kernels.dense_attention(*x.attention, x.lengths), "dense")
    plain = sparse(kernels, x.but(query=x.query[:, :, 0]), indices)[0]
    assert_within(step.cpu(), plain.double(), 4 * eps(dtype) * x.values[:, :, :9].abs().max().item() + 4e-6, "sparse")
    with pytest.raises(ValueError, match=f"^split_counters: got {needed - 1} counters; allowed: at least {needed}"):
        attention.dense_attention(query, keys, values, lengths, split_counters=counters[: needed - 1])


# --- Writing a window into the cache ---

UNTOUCHED = 77.0  # bounds of blocks that no window touches hold it, to show that they are left alone


def check_window(kernels, case, starts, ends, dtype, slack=NAN, wide=torch.int32):
    """Write random tokens at starts … ends - 1 over a cache full of others, and compare every element of it."""
    width = max(1, *(end - start for start, end in zip(starts, ends, strict=True))) + case.seed % 2
    generator, rows = torch.Generator().manual_seed(case.seed), (len(starts), case.kv_heads)
    cache, new = (
        [torch.randn(*rows, size, case.head_dim, generator=generator).to(dtype) for _ in range(2)]
        for size in (case.capacity, width)
    )
    bounds = full(*rows, 2, case.head_dim, -(-case.capacity // case.block_size), value=UNTOUCHED, dtype=dtype)
    for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for tensor in cache:
            tensor[s, :, end:] = slack
        for tensor in new:
            tensor[s, :, end - start :] = slack  # rows of the window that this sequence does not use
    expected, expected_bounds = [tensor.clone() for tensor in cache], bounds.clone()
    for s, (start, end) in enumerate(zip(starts, ends, strict=True)):
        for tensor, fresh in zip(expected, new, strict=True):
            tensor[s, :, start:end] = fresh[s, :, : end - start]
        if end > start:
            touched = slice(start // case.block_size, -(-end // case.block_size))
            rebuilt = oracle.block_bounds(*arrays(expected[0][s : s + 1]), [end], case.block_size)
            expected_bounds[s, ..., touched] = torch.from_numpy(rebuilt)[0, ..., touched].to(dtype)
    lengths = (torch.tensor(each, dtype=wide) for each in (starts, ends))
    keys, values, found = kernels.write_window(*cache, bounds, *new, *lengths, case.block_size)
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


@each_dtype
@pytest.mark.parametrize("kind", GARBAGE)
@drawn(2, case=a_case(max_blocks=4), data=st.data(), wide=st.sampled_from([torch.int32, torch.int64]))
def test_windows_are_stored_and_their_bounds_rebuilt(kernels, dtype, kind, case, data, wide):
    """Law 2 for any one window, so for each of a sequence; garbage behind it does not reach its bounds."""
    check_window(kernels, case, *data.draw(stretches(case)), dtype, garbage(kind, dtype), wide)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_windows_of_every_shape(kernels, head_dim, block_size):
    """Across the edges of blocks, one whole block, up to the capacity, and nothing at its end."""
    b, capacity = block_size, 3 * block_size + 1
    case = Case(4, 2, 1, head_dim, b, lengths=(0,) * 4, capacity=capacity)
    starts, ends = (b - 1, 0, 2 * b, capacity), (2 * b + 1, b, capacity, capacity)
    check_window(kernels, case, starts, ends, torch.float16)


def test_an_extreme_that_is_overwritten_leaves_the_bounds(kernels):
    """A running minimum could not forget it; NaN and infinity that are new arrive, in their own channels only."""
    keys, new = full(1, 1, 9, 16, value=1.0), full(1, 1, 3, 16, value=2.0)
    keys[0, 0, 2], keys[0, 0, 3], keys[0, 0, 0, 7] = -100.0, NAN, 5.0
    new[0, 0, 1, 3], new[0, 0, 2, 4] = NAN, -INF
    bounds = full(1, 1, 2, 16, 2, value=1.0)
    _, _, bounds = kernels.write_window(keys, keys.clone(), bounds, new, new, int32(2), int32(5), 8)
    lo, hi = full(16, value=1.0), full(16, value=2.0)
    lo[3], lo[4], hi[3], hi[7] = NAN, -INF, NAN, 5.0
    np.testing.assert_array_equal(bounds[0, 0, :, :, 0], torch.stack([lo, hi]))
    np.testing.assert_array_equal(bounds[0, 0, :, :, 1], full(2, 16, value=1.0))


def test_new_tokens_may_be_strided(kernels):
    """Projections leave tokens before heads; and starts and ends may be columns of one tensor."""
    x = Case(6, 3, 1, 16, 8, lengths=(0, 0), capacity=20).build(torch.float32, slack=1.0)
    new = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE).transpose(1, 2)
    edges = torch.tensor([[3, 6], [8, 13]], dtype=torch.int32, device=DEVICE)
    stored = x.keys, x.values, exact_bounds(x)
    found = kernels.write_window(*stored, new, 2 * new, edges[:, 0], edges[:, 1], 8)
    rest = (new.contiguous(), 2 * new.contiguous(), edges[:, 0].clone(), edges[:, 1].clone(), 8)
    assert_all_same_bits(found, kernels.write_window(*stored, *rest), "strided")


@each_dtype
@pytest.mark.parametrize("is_compressed", [False, True], ids=["exact", "8-bit"])
@drawn(4, case=a_case(block_sizes=(8, 16), head_dims=(16, 32), sizes=("plain",)), steps=st.integers(0, 1))
def test_an_append_and_scores_in_one_kernel_are_those_of_two(kernels, dtype, is_compressed, case, steps):
    """Bit for bit, for sequences that take the step and others; the scores are of the blocks before the newest."""
    blocks, fast = import_module("resa.fast.blocks"), import_module("resa.fast")
    write_window = import_module("resa.fast.cache").write_window
    case = replace(case, capacity=case.capacity + 1)
    x = case.build(dtype, slack=1.0)
    query, keys, values, start = (tensor.to(DEVICE) for tensor in (*x.attention, x.lengths))
    generator, new_shape = torch.Generator().manual_seed(case.seed), (len(start), case.kv_heads, 1, case.head_dim)
    key, value = (torch.randn(new_shape, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    takes = (torch.arange(len(start), device=DEVICE) % 2 == steps).to(torch.int32)
    end, completed = start + takes, start // case.block_size * case.block_size * takes
    results = []
    for is_one in (True, False):
        bounds = exact_bounds(x).to(DEVICE)
        bounds = fast.compress_bounds(bounds) if is_compressed else bounds
        held = keys.clone(), values.clone(), bounds
        with poisoned_memory():
            if is_one:
                scores = blocks.append_and_score(query, key, value, *held, start, end, completed, case.block_size)
            else:
                write_window(*held, key, value, start, end, case.block_size)
                scores = fast.score_blocks(query, bounds, completed, case.block_size)
        results.append([*held[:2], bounds.codes if is_compressed else bounds, scores])
    assert_all_same_bits(*([tensor.cpu() for tensor in each] for each in results), "keys, values, bounds or scores")
    moved = (results[0][0] != keys).flatten(1).any(dim=1)
    assert moved.tolist() == (takes > 0).tolist()


@pytest.mark.parametrize(
    ("group", "head_dim", "bits", "dtype"), [(10, 64, 2, torch.float16), (3, 16, 1, torch.float32)], ids=str
)
def test_queries_rotated_beside_an_append_are_those_of_two_kernels(kernels, group, head_dim, bits, dtype):
    """Bit for bit, cache and scores, for sequences that take the step and one that does not."""
    sketch, estimate, cache = (import_module(f"resa.fast.{name}") for name in ("sketch", "estimate", "cache"))
    case = Case(2, 2, group, head_dim, 8, lengths=(140, 7, 30), capacity=150)
    x, generator = case.build(dtype, slack=1.0), torch.Generator().manual_seed(2)
    key, value = (torch.randn(3, 2, 1, head_dim, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    query, keys, values, start = (tensor.to(DEVICE) for tensor in (*x.attention, x.lengths))
    codes, scales = sketch.sketch_keys(keys, bits)
    end = start + int32(1, 1, 0).to(DEVICE)
    results = []
    for is_one in (True, False):
        held = keys.clone(), values.clone(), sketch.Sketches(codes.clone(), scales.clone(), bits)
        with poisoned_memory():
            if is_one:
                factors = sketch.write_sketched(*held, key, value, start, end, query)
            else:
                cache.write_window(*held, key, value, start, end, 8)
                factors = sketch.rotate_queries(query, 2, bits)
            scores = estimate.score_rotated(factors, held[2].codes, held[2].scales, end, 8)
        results.append([*held[:2], held[2].codes, held[2].scales, scores])
    assert_all_same_bits(*([tensor.cpu() for tensor in each] for each in results), "cache or scores")
    moved = (results[0][0] != keys).flatten(1).any(dim=1)
    assert moved.tolist() == [True, True, False]
    assert (results[0][2] != codes).any()


# --- All operations ---


@pytest.mark.skipif(DEVICE != "cpu", reason="test_gpu.py does this, and more of it, in the GPU's memory")
def test_offsets_beyond_two_to_the_31(kernels, tmp_path):
    """2.4e9 numbers in a sparse file, all zeros but for 40 tokens of the last sequence.

    In 32 bits offsets wrap around to the 2**31 zeros in front, where nothing is to be read or written.
    """
    shape, n_tokens, last, front = (9, 8, 262_144, 128), 40, slice(8, 9), 2**31
    file, size = tmp_path / "cache", front + math.prod(shape)
    with file.open("wb") as sparse_file:
        sparse_file.truncate(2 * size)
    keys = torch.from_file(str(file), shared=True, size=size, dtype=torch.float16)[front:].view(shape)
    file.unlink()
    x = Case(3, 8, 2, 128, 16, lengths=(n_tokens,), capacity=n_tokens).build(torch.float16)
    keys[last, :, :n_tokens] = x.keys
    huge = x.but(query=x.query.expand(9, -1, -1), keys=keys, values=keys, lengths=int32(*[0] * 8, n_tokens))
    indices = int32(2, 0).expand(9, 8, 2)
    found, expected = sparse(kernels, huge, indices), sparse(kernels, x.but(values=x.keys), indices[last])
    assert_all_same_bits([each[last] for each in found], expected, "the last sequence")

    bounds = full(9, 8, 2, 128, 2048, value=UNTOUCHED, dtype=torch.float16)
    new = torch.randn(9, 8, 2, 128, generator=torch.Generator().manual_seed(0)).half()
    edges = int32(*[5] * 8, 39), int32(*[5] * 8, 41)
    import_module("resa.fast.cache").write_window(keys, keys, bounds, new, new, *edges, 128)
    assert_same_bits(keys[last, :, :41], torch.cat((x.keys[:, :, :39], new[last]), dim=2), "the last sequence")
    rebuilt = oracle.block_bounds(*arrays(keys[last, :, :41]), [41], 128)
    np.testing.assert_array_equal(bounds[last, ..., :1].double(), rebuilt)
    assert (bounds[:8] == UNTOUCHED).all()
