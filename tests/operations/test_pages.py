"""Only Triton: pages in any order, shared, with slots that nobody may read, give the bits of one long cache."""

from importlib import import_module

import pytest
import torch
from hypothesis import strategies as st

from backends import a_case, drawn
from pools import Pool, in_pages
from strategies import DEVICE, NAN, Case, windows
from tolerances import assert_same_bits


def modules():
    """The kernels' modules: attention, blocks, cache, estimate, sketch."""
    return [import_module(f"resa.fast.{name}") for name in ("attention", "blocks", "cache", "estimate", "sketch")]


@drawn(12, case=a_case(max_blocks=6), pages=st.sampled_from([1, 4, 2]), data=st.data())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_attention_is_that_of_one_cache(kernels, dtype, case, pages, data):
    attention, *_ = modules()
    case, page_size = in_pages(case, pages)
    n_queries, used = data.draw(windows(case))
    used = None if used is None else torch.tensor(used, dtype=torch.int32, device=DEVICE)
    x, window = case.build(dtype), case.build(dtype, n_queries=n_queries)
    pool = Pool(case, page_size)
    keys, values = pool.filled(x.keys, x.values)
    table, indices, lengths = (each.to(DEVICE) for each in (pool.table, case.indices(), x.lengths))
    plain = [each.to(DEVICE) for each in (x.query, x.keys, x.values)]
    wide = window.query.to(DEVICE)

    rest = indices, lengths, case.block_size
    expected = attention.sparse_attention(*plain, *rest, return_lse=True)
    found = attention.sparse_attention(plain[0], keys, values, *rest, table=table, return_lse=True)
    options = {"query_lengths": used, "return_lse": True}
    expected += attention.dense_attention(wide, *plain[1:], lengths, **options)
    found += attention.dense_attention(wide, keys, values, lengths, table=table, **options)
    for name, ours, theirs in zip(("sparse", "lse", "dense", "lse"), found, expected, strict=True):
        assert_same_bits(ours.cpu(), theirs.cpu(), f"{name} {case} {pages}")


# A tile of the widest heads fits a multiprocessor's shared memory only without a copy of its pointers.
WIDE = Case(0, kv_heads=1, group=3, head_dim=256, block_size=8, lengths=(9,), capacity=9)


@drawn(
    8, {"case": WIDE, "pages": 1, "bits": 1},
    case=a_case(max_blocks=5, sizes=("plain",)), pages=st.sampled_from([1, 4, 2]), bits=st.sampled_from([1, 2]),
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_scores_are_those_of_one_cache(kernels, dtype, case, pages, bits):
    """By sketches, whose codes lie apart or beside their keys, bit for bit; by bounds but for the order of a sum."""
    _, blocks, _, estimate, sketch = modules()
    case, page_size = in_pages(case, pages)
    x, pool, b = case.build(dtype), Pool(case, page_size), case.block_size
    query, keys, lengths, table = (each.to(DEVICE) for each in (x.query, x.keys, x.lengths, pool.table))
    codes, scales = sketch.sketch_keys(keys, bits)
    expected = estimate.score_sketch(query, codes, scales, lengths, b)
    paged = *pool.filled(codes.cpu()), *pool.filled(scales.cpu())
    found = estimate.score_sketch(query, *paged, lengths, b, table=table)
    assert_same_bits(found.cpu(), expected.cpu(), f"{case} {pages}")

    bounds = blocks.block_bounds(keys, lengths, b)  # [B, Hkv, 2, D, M]
    paged = torch.full((pool.n_pages, case.kv_heads, pages, 2, case.head_dim), NAN, dtype=dtype, device=DEVICE)
    for s, length in enumerate(case.lengths):
        for i in range(-(-length // b)):
            paged[int(pool.pages[s, i // pages]), :, i % pages] = bounds[s, ..., i]
    expected = blocks.score_blocks(query, bounds, lengths, b)
    found = blocks.score_blocks(query, paged, lengths, b, table=table)
    size = query.abs().amax().item() * x.keys.nan_to_num(0, 0, 0).abs().amax().item() * case.head_dim
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * size)


@drawn(8, case=a_case(max_blocks=5, sizes=("plain",)), pages=st.sampled_from([1, 4, 2]), data=st.data())
@pytest.mark.parametrize("kept", ["bounds", "sketches"])
def test_a_window_is_written_to_its_pages_alone(kernels, kept, case, pages, data):
    """Into one cache and into pages alike. No other slot of the pool changes a bit."""
    _, blocks, cache, _, sketch = modules()
    case, page_size = in_pages(case, pages)
    x, pool, b, d = case.build(torch.float16), Pool(case, page_size), case.block_size, case.head_dim
    starts = torch.tensor([data.draw(st.integers(0, length)) for length in case.lengths], dtype=torch.int32)
    width = max(1, int((x.lengths - starts).max()))
    new = torch.randn(2, len(case.lengths), case.kv_heads, width, d, generator=torch.Generator().manual_seed(1)).half()
    table, start, end = (each.to(DEVICE) for each in (pool.table, starts, x.lengths))
    fresh = [each.to(DEVICE) for each in new]

    plain, paged = [x.keys.to(DEVICE), x.values.to(DEVICE)], pool.filled(x.keys, x.values)
    if kept == "bounds":
        searched = blocks.block_bounds(plain[0], start, b)
        stored = torch.full((pool.n_pages, case.kv_heads, pages, 2, d), NAN, dtype=torch.float16, device=DEVICE)
    else:
        codes, scales = sketch.sketch_keys(plain[0], 2)
        searched = sketch.Sketches(codes, scales, 2)
        stored = sketch.Sketches(*pool.filled(codes.cpu()), *pool.filled(scales.cpu()), 2)
    cache.write_window(*plain, searched, *fresh, start, end, b)
    untouched = [each.clone() for each in paged]
    kept_in = [stored] if kept == "bounds" else [stored.codes, stored.scales]
    around = [each.clone() for each in kept_in]
    cache.write_window(*paged, stored, *fresh, start, end, b, table=table)

    for whole, ours, before in zip(plain, paged, untouched, strict=True):
        for s, length in enumerate(case.lengths):
            wanted = whole[s, :, :length].transpose(0, 1)
            assert_same_bits(pool.read(ours, s, length).cpu(), wanted.cpu(), f"sequence {s} {case}")
            for t in range(int(starts[s]), length):  # put back what was there; then nothing may differ
                ours[pool.at(s, t)] = before[pool.at(s, t)]
        assert_same_bits(ours.cpu(), before.cpu(), f"other slots {case}")
    for s, length in enumerate(case.lengths):
        if kept == "sketches":
            for ours, theirs in zip((stored.codes, stored.scales), (codes, scales), strict=True):
                wanted = theirs[s, :, :length].transpose(0, 1)
                assert_same_bits(pool.read(ours, s, length).cpu(), wanted.cpu(), f"sketches {case}")
        for i in range(int(starts[s]) // b, -(-length // b) if starts[s] < length and kept == "bounds" else 0):
            ours = stored[int(pool.pages[s, i // pages]), :, i % pages]  # [Hkv, 2, D]
            assert_same_bits(ours.cpu(), searched[s, ..., i].cpu(), f"bounds of block {i} {case}")

    for ours, before in zip(kept_in, around, strict=True):
        for s, length in enumerate(case.lengths):
            for t in range(int(starts[s]), length):
                page, _, slot = pool.at(s, t)
                at = page, slice(None), slot // b if kept == "bounds" else slot
                ours[at] = before[at]
        assert_same_bits(ours.cpu(), before.cpu(), f"other places of {kept} {case}")


def test_two_sequences_share_pages_and_a_page_gets_another_owner(kernels):
    """The second reads the first's pages. When the first has ended, a third writes to its last."""
    attention, _, cache, _, _ = modules()
    case = Case(3, 2, 3, 16, 8, lengths=(48, 36), capacity=48)
    x, pool = case.build(torch.float32), Pool(case, 16, n_shared=2)
    x.keys[1, :, :32], x.values[1, :, :32] = x.keys[0, :, :32], x.values[0, :, :32]
    (keys, values), bounds = pool.filled(x.keys, x.values), torch.zeros(pool.n_pages, 2, 2, 2, 16, device=DEVICE)
    query, *plain = (each.to(DEVICE) for each in x.attention)
    table, lengths, query = pool.table.to(DEVICE), x.lengths.to(DEVICE), query[:, :, None]
    expected = attention.dense_attention(query, *plain, lengths)
    found = attention.dense_attention(query, keys, values, lengths, table=table)
    assert_same_bits(found.cpu(), expected.cpu(), "shared")

    third = torch.stack([pool.spare[0], pool.pages[0, 2]])[None].to(DEVICE)
    new = torch.randn(2, 1, 2, 20, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    start, end = (torch.tensor([edge], dtype=torch.int32, device=DEVICE) for edge in (0, 20))
    cache.write_window(keys, values, bounds, *new, start, end, 8, table=third)
    found = attention.dense_attention(query[:1], keys, values, end, table=third)
    assert_same_bits(found.cpu(), attention.dense_attention(query[:1], *new, end).cpu(), "another owner")
    found = attention.dense_attention(query[1:], keys, values, lengths[1:], table=table[1:])
    assert_same_bits(found.cpu(), expected[1:].cpu(), "the other sequence")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("table", lambda keys, table: (keys, table.long())),
        ("table", lambda keys, table: (keys, table.repeat(1, 2)[:, ::2])),
        ("keys", lambda keys, table: (torch.zeros(4, 2, 16, 17, device=DEVICE)[..., :16], table)),
        ("values", lambda keys, table: (torch.zeros(4, 2, 16, 32, device=DEVICE)[..., :16], table)),
        ("keys", lambda keys, table: (keys.transpose(1, 2).contiguous().transpose(1, 2), table)),
    ],
)
def test_what_the_kernels_cannot_read_is_named(kernels, name, change):
    attention, *_ = modules()
    pool = torch.zeros(4, 2, 16, 16, device=DEVICE)
    keys, table = change(pool, torch.zeros(1, 2, dtype=torch.int32, device=DEVICE))
    lengths, query = torch.tensor([3], dtype=torch.int32, device=DEVICE), torch.zeros(1, 2, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{name}"):
        attention.dense_attention(query, keys, pool, lengths, table=table)


@pytest.mark.parametrize(
    ("name", "page_size", "shape"),
    [("keys", 24, (4, 2, 1, 2, 16)), ("bounds", 32, (4, 2, 1, 2, 16)), ("bounds", 32, (4, 2, 2, 2, 17))],
)
def test_bounds_that_do_not_fit_their_pages_are_named(kernels, name, page_size, shape):
    """Whole blocks to a page, and bounds for each of them, in one piece."""
    _, blocks, cache, *_ = modules()
    keys, bounds = torch.zeros(4, 2, page_size, 16, device=DEVICE), torch.zeros(shape, device=DEVICE)[..., :16]
    table, edge = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in ((1, 2), (1,)))
    with pytest.raises(ValueError, match=f"^{name}"):
        cache.write_window(keys, keys.clone(), bounds, keys[:1], keys[:1], edge, edge + 1, 16, table=table)
    eight = import_module("resa.fast").compress_bounds(torch.zeros(1, 2, 2, 16, 4, device=DEVICE))
    with pytest.raises(ValueError, match=r"^bounds"):
        blocks.score_blocks(keys[:1, :, 0], eight, edge, 16, table=table)
