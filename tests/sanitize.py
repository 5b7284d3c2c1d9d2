"""Every kernel at small awkward sizes, and a decode loop, for compute-sanitizer to watch: see `make sanitize`.

Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1: every tensor is then an allocation of its own, and an access past its end
is seen. Each result is also compared with the reference, so a run that computed nothing cannot pass.
"""

import itertools
import sys
from unittest import mock

import torch

import pools
from resa import fast, reference
from resa.fast import TRITON_OPS, estimate
from resa.fast.cache import write_window
from resa.fast.generate import DecodeLoop
from resa.fast.sampling import Sampler
from resa.fast.sketch import Sketches, write_sketched
from resa.reference import ReSAConfig, Sampling, attention, blocks, sketch
from small_models import Shape
from strategies import Case

CASES = [  # lengths around the edges of blocks; rows of blocks that are multiples of 16 and that are not
    Case(0, kv_heads=2, group=7, head_dim=128, block_size=16, lengths=(1, 300), capacity=300),
    Case(1, kv_heads=1, group=1, head_dim=16, block_size=8, lengths=(129, 0, 7), capacity=256),
    Case(2, kv_heads=3, group=16, head_dim=64, block_size=32, lengths=(33,), capacity=65),
    Case(3, kv_heads=1, group=4, head_dim=256, block_size=128, lengths=(255, 257), capacity=512),
]


def close(name, actual, expected, allowed):
    """Compare with the reference; prints and remembers a failure."""
    actual, expected = actual.float().cpu(), expected.float()
    error = torch.where(actual == expected, 0.0, (actual - expected).abs()).max().item()
    print(f"  {name:<10} {error:.2g}", "" if error <= allowed else f"FAILED, allowed {allowed:.2g}")
    return error <= allowed


def run(case, dtype):
    """All operations on one case; True if all agree with the reference."""
    x = case.build(dtype)
    keys, values, query, lengths = (tensor.cuda() for tensor in (x.keys, x.values, x.query, x.lengths))
    b, config = x.block_size, ReSAConfig(block_size=x.block_size, active_ratio=0.5, min_blocks=2)
    rounding = 8 * torch.finfo(dtype).eps * x.values.nan_to_num().abs().max().item() + 1e-5
    bounds, plain_bounds = fast.block_bounds(keys, lengths, b), blocks.block_bounds(x.keys, x.lengths, b)
    scores, plain_scores = (
        fast.score_blocks(query, bounds, lengths, b),
        blocks.score_blocks(x.query, plain_bounds, x.lengths, b),
    )
    indices = fast.select_blocks(scores, lengths, config)
    plain_indices = blocks.select_blocks(scores.cpu(), x.lengths, config)
    window = case.build(dtype, n_queries=20)
    window_lengths = x.lengths.clamp(max=20)
    dense = fast.dense_attention(window.query.cuda(), keys, values, lengths, query_lengths=window_lengths.cuda())
    plain_dense = attention.dense_attention(window.query, x.keys, x.values, x.lengths, query_lengths=window_lengths)
    good = [
        close("bounds", bounds, plain_bounds, 0),
        close("scores", scores, plain_scores, 1e-3),
        close("indices", indices[..., : plain_indices.shape[2]], plain_indices, 0),
        close(
            "sparse",
            fast.sparse_attention(query, keys, values, indices, lengths, b),
            attention.sparse_attention(x.query, x.keys, x.values, plain_indices, x.lengths, b),
            rounding,
        ),
        close("dense", dense, plain_dense, rounding),
    ]
    compressed = fast.compress_bounds(bounds)
    good.append(bool((fast.score_blocks(query, compressed, lengths, b) >= scores - 1e-3).all()))
    start = (lengths - 5).clamp(min=0)
    new = torch.randn(2, len(lengths), case.kv_heads, 5, case.head_dim, device="cuda").to(dtype)
    for table in (bounds, compressed):
        write_window(keys, values, table, *new, start, lengths, b)
    good.append(close("write", bounds, blocks.block_bounds(keys.cpu(), x.lengths, b), 0))
    # Bounds written in 8 bits are still bounds of the exact ones.
    rewritten, exact = (fast.score_blocks(query, table, lengths, b) for table in (compressed, bounds))
    good.append(bool((rewritten >= exact - 1e-3).all()))
    good.append(in_pages(case, dtype, x, window, window_lengths))
    good += [score_by_sketches(x.query, keys, lengths, b, bits, runs) for bits, runs in ((1, 3), (2, 1))]
    return all(good)


def in_pages(case, dtype, x, window, window_lengths):
    """Everything once more through pages of two blocks; True if one long cache gives the same bits."""
    case, page_size = pools.in_pages(case, 2)
    pool, b = pools.Pool(case, page_size), case.block_size
    padded = case.build(dtype)
    cache = [each.cuda() for each in (padded.keys, padded.values)]
    pages, lengths, table = pool.filled(*cache), x.lengths.cuda(), pool.table.cuda()
    query, indices = x.query.cuda(), case.indices().cuda()
    codes, scales = fast.sketch_keys(cache[0], 2)
    paged = *pool.filled(codes), *pool.filled(scales)
    bounds = torch.zeros(pool.n_pages, case.kv_heads, 2, 2, case.head_dim, dtype=dtype, device="cuda")
    start, new = torch.zeros_like(lengths), [each[:, :, : int(lengths.max())].contiguous() for each in cache]
    write_window(*pages, bounds, *new, start, lengths, b, table=table)
    write_window(*pages, Sketches(*paged, 2), *new, start, lengths, b, table=table)
    scores = fast.score_blocks(query, fast.block_bounds(cache[0], lengths, b), lengths, b)
    options, wide = {"query_lengths": window_lengths.cuda()}, window.query.cuda()
    pairs = {
        "scores": (TRITON_OPS.score_blocks(query, bounds, lengths, b, table=table), scores, 1e-3),
        "masses": (
            TRITON_OPS.score_sketch(query, *paged, lengths, b, table=table),
            TRITON_OPS.score_sketch(query, codes, scales, lengths, b),
            0,
        ),
        "sparse": (
            TRITON_OPS.sparse_attention(query, *pages, indices, lengths, b, table=table),
            TRITON_OPS.sparse_attention(query, *cache, indices, lengths, b),
            0,
        ),
        "dense": (
            TRITON_OPS.dense_attention(wide, *pages, lengths, table=table, **options),
            TRITON_OPS.dense_attention(wide, *cache, lengths, **options),
            0,
        ),
    }
    found = [close(f"paged {name}", ours, theirs.cpu(), allowed) for name, (ours, theirs, allowed) in pairs.items()]
    return all(found)


def score_by_sketches(query, keys, lengths, b, bits, runs):
    """Masses from sketches, one of them lost, in so many runs of tiles; True if the reference agrees."""
    codes, scales = fast.sketch_keys(keys, bits)
    scales[:, 0, min(20, keys.shape[2] - 1)] = float("nan")
    with mock.patch.object(estimate, "count_splits", return_value=runs):
        masses = fast.score_sketch(query.cuda(), codes, scales, lengths, b).cpu()
        # The same once more, with queries rotated beside a window that is empty.
        none, stored = torch.zeros_like(lengths, dtype=torch.int32), Sketches(codes, scales, bits)
        factors = write_sketched(None, None, stored, keys[:, :, :1], None, none, none, query.cuda())
        again = estimate.score_rotated(factors, codes, scales, lengths.int(), b).cpu()
    expected = sketch.score_sketch(query.float(), codes.cpu(), scales.float().cpu(), lengths.cpu(), b)
    is_lost = expected.isnan()
    is_close = close(f"{bits} bits", masses.masked_fill(is_lost, 0.0), expected.masked_fill(is_lost, 0.0), 1e-3)
    same = torch.equal(again.nan_to_num(-1.0), masses.nan_to_num(-1.0))
    return is_close and same and torch.equal(masses.isnan(), is_lost)


def draw():
    """Tokens from rows of logits with ties and impossible ones; True if the reference draws the same."""
    logits = torch.randn(3, 5001, generator=torch.Generator().manual_seed(0)).half()
    logits[1], logits[2, ::2] = logits[1].round(), float("-inf")
    sampling, good = Sampling(0.7, 0.9, 1000), True
    for seed in range(3):
        own = [torch.Generator().manual_seed(seed) for _ in logits]
        sampler = Sampler(sampling, own, 1, torch.device("cuda"))
        found = sampler(logits.cuda(), torch.zeros(3, dtype=torch.int64, device="cuda")).tolist()
        expected = [sampling.token(row, generator) for row, generator in zip(logits, own, strict=True)]
        print("drawing", found, "" if found == expected else f"FAILED, expected {expected}")
        good &= found == expected
    return good


def decode(interval, schedule, selection="bounds"):
    """Two sequences of unequal length through sparse steps and rectifications; True if the reference agrees.

    At interval 32 the rows of a rectification fill several tiles per KV head, each with a split counter of its own.
    """
    # Graphs can only be captured with the allocator that is switched off here, so every step is launched as it stands.
    DecodeLoop.launch = DecodeLoop.step
    shape = Shape(seed=36, head_dim=16, hidden=32, context=256, tied=False)
    model, prompts = shape.model(torch.float32).cuda(), shape.prompts((70, 20))
    config = ReSAConfig(block_size=8, min_blocks=2, interval=interval, schedule=schedule, selection=selection)
    found, expected = (
        [generation.tokens for generation in decoder(model, prompts, interval + 8, config)]
        for decoder in (fast.generate, reference.generate)
    )
    verdict = "" if found == expected else f"FAILED, expected {expected}"
    print(f"decoding, interval {interval}, schedule {schedule}, {selection}", found, verdict)
    return found == expected


def main():
    """Exit status 1 if any result is wrong; what compute-sanitizer finds is its own to report."""
    good = True
    for case, dtype in itertools.product(CASES, (torch.float16, torch.bfloat16, torch.float32)):
        print(case, dtype)
        good &= run(case, dtype)
    for interval, schedule in itertools.product((4, 32), ("fused", "paper")):
        good &= decode(interval, schedule)
    good &= decode(4, "fused", "sketch")
    good &= draw()
    torch.cuda.synchronize()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
