"""Which blocks of the cache a decoding step reads, in Triton: bounds (eq. 3), scores (eq. 4), selection (eq. 5).

The reference states each result over the whole cache at once; here each is one kernel that reads every byte it needs
once. Scoring reads half the bounds: `max(q̄·lo, q̄·hi)` is `q̄·hi` where q̄ ≥ 0 and `q̄·lo` elsewhere, and because bounds
are stored channel by channel, the half not called for is never touched. Selection does not sort: it bisects for the
n-th highest score, then numbers the blocks at or above it in order.

The public functions check their arguments, which waits for the device. The `enqueue_…` functions behind them only
launch, so that the decode loop can capture them in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.blocks import active_blocks
from resa.reference.checks import bind_shapes, check_dtypes, check_heads, check_lengths, is_integer, require
from resa.reference.config import ReSAConfig

from .bounds8 import Bounds8
from .cache import write_block
from .checks import check_device, check_kernel_dtypes, check_layout, check_sizes
from .launch import let_next_start, overlapped, wait_for_previous

MANY_SCORES = 2**17  # from here on larger tiles pay: there are programs enough to fill the GPU
LONG_ROW = tl.constexpr(4096)  # scores, up to which the warps' own sum of integers decides about the time
GUESSES = tl.constexpr(12)  # passes that interpolate; simulated rows of 16,384 scores took 7 to 13


def block_bounds(keys: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """Smallest and largest key of every block, per channel (eq. 3).

    keys [B, Hkv, T_max, D], lengths [B] → bounds [B, Hkv, 2, D, M] in the keys' dtype: 0 = lo, 1 = hi,
    M = ceil(T_max / block_size). Only keys before the length count; a block without any has lo = +∞, hi = −∞.
    Raises `ValueError` for arguments that do not fit together or that the kernels do not support.
    """
    sizes = bind_shapes(keys=(keys, "B Hkv T_max D"), lengths=(lengths, "B"))
    check_kernel_dtypes(keys=keys)
    check_lengths("lengths", lengths, sizes["T_max"])
    require(is_integer(block_size, 1), "block_size", block_size, "an integer ≥ 1")
    check_sizes(D=sizes["D"], block_size=block_size, rows=sizes["B"] * sizes["Hkv"])
    check_layout(keys=keys)
    batch, kv_heads, capacity, head_dim = keys.shape
    n_blocks = triton.cdiv(capacity, block_size)
    bounds = keys.new_empty(batch, kv_heads, 2, head_dim, n_blocks)
    if bounds.numel():
        tile = max(16, 2048 // head_dim)
        grid = (triton.cdiv(n_blocks, tile), batch * kv_heads)
        lengths = lengths.to(torch.int32).contiguous()
        _bounds_kernel[grid](keys, lengths, bounds, kv_heads, capacity, n_blocks, head_dim, block_size, tile)
    return bounds


@triton.jit
def _bounds_kernel(
    keys_ptr, lengths_ptr, bounds_ptr, n_kv_head, capacity, n_blocks,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Bounds of BLOCKS blocks of one KV head.

    Grid: (ceil(M / BLOCKS), B·Hkv). Tile: [BLOCKS, D], walking through the blocks token by token together.
    Invariant: after j steps lo and hi are the extremes of the blocks' first j valid tokens, NaN where one is NaN.
    """
    i_row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    o_block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    o_d = tl.arange(0, D)
    lo = tl.full([BLOCKS, D], float("inf"), tl.float32)  # the neutral elements of min and max
    hi = tl.full([BLOCKS, D], float("-inf"), tl.float32)
    p_key = keys_ptr + (i_row * capacity + o_block * BLOCK_SIZE)[:, None] * D + o_d
    for j in range(BLOCK_SIZE):
        m_key = (o_block * BLOCK_SIZE + j < length)[:, None]
        key = tl.load(p_key + j * D, mask=m_key, other=0.0).to(tl.float32)  # [BLOCKS, D]
        lo = tl.where(m_key, tl.minimum(lo, key, propagate_nan=tl.PropagateNan.ALL), lo)
        hi = tl.where(m_key, tl.maximum(hi, key, propagate_nan=tl.PropagateNan.ALL), hi)
    # Turned to [D, BLOCKS], because neighbours in memory are blocks of one channel.
    o_channel = i_row * 2 * D + o_d[:, None]  # [D, 1]: D channels of lo, then D of hi
    m_block = (o_block < n_blocks)[None, :]
    p_lo = bounds_ptr + o_channel * n_blocks + o_block[None, :]
    p_hi = bounds_ptr + (o_channel + D) * n_blocks + o_block[None, :]
    tl.store(p_lo, tl.trans(lo).to(bounds_ptr.dtype.element_ty), mask=m_block)
    tl.store(p_hi, tl.trans(hi).to(bounds_ptr.dtype.element_ty), mask=m_block)


def score_blocks(query: Tensor, bounds: Tensor | Bounds8, lengths: Tensor, block_size: int) -> Tensor:
    """Upper bound of the pooled query's logit over each block, without the softmax scale (eq. 4).

        score[i] = Σ_d max(q̄_d · lo[i]_d, q̄_d · hi[i]_d),  q̄ = mean of the group's query heads

    query [B, Hq, D], bounds [B, Hkv, 2, D, M], exact or in 8 bits, lengths [B] → scores [B, Hkv, M] float32, −∞ for
    blocks past the end. Raises `ValueError` for arguments that do not fit together or that the kernels do not support.
    """
    table = bounds.codes if isinstance(bounds, Bounds8) else bounds
    sizes = bind_shapes(query=(query, "B Hq D"), bounds=(table, "B Hkv 2 D M"), lengths=(lengths, "B"))
    check_heads(sizes["Hq"], sizes["Hkv"])
    check_kernel_dtypes(query=query, **({} if isinstance(bounds, Bounds8) else {"bounds": bounds}))
    require(is_integer(block_size, 1), "block_size", block_size, "an integer ≥ 1")
    check_sizes(D=sizes["D"], G=sizes["Hq"] // sizes["Hkv"], block_size=block_size, rows=sizes["B"] * sizes["Hkv"])
    check_lengths("lengths", lengths, sizes["M"] * block_size)
    check_layout(bounds=table)
    return enqueue_scores(query.contiguous(), bounds, lengths.to(torch.int32).contiguous(), block_size)


def enqueue_scores(query: Tensor, bounds: Tensor | Bounds8, lengths: Tensor, block_size: int) -> Tensor:
    """`score_blocks` without its checks: nothing is read back from the device."""
    is_compressed = isinstance(bounds, Bounds8)
    table, scale = (bounds.codes, bounds.scale) if is_compressed else (bounds, None)
    batch, kv_heads, _, head_dim, n_blocks = table.shape
    scores = query.new_empty(batch, kv_heads, n_blocks, dtype=torch.float32)
    if scores.numel():
        group = query.shape[1] // kv_heads
        is_many = scores.numel() >= MANY_SCORES
        tile = 64 if is_many and head_dim <= 128 else 32
        # Started early, many programs would crowd onto the multiprocessors that the last kernel leaves first.
        early = {} if is_many else overlapped(query.device)
        grid = (triton.cdiv(n_blocks, tile), batch * kv_heads)
        _score_kernel[grid](
            query, table, scale, lengths, scores, kv_heads, n_blocks, group, head_dim, block_size, tile,
            n_blocks % 16 == 0, num_warps=1, **early,
        )  # fmt: skip
    return scores


@triton.jit
def _score_kernel(
    query_ptr, bounds_ptr, scale_ptr, lengths_ptr, scores_ptr, n_kv_head, n_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCKS blocks of one KV head. Grid: (ceil(M / BLOCKS), B·Hkv)."""
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    _score_tile(
        query_ptr, bounds_ptr, scale_ptr, scores_ptr, length, i_row, tl.program_id(0), n_blocks,
        G, D, BLOCK_SIZE, BLOCKS, ALIGNED,
    )  # fmt: skip


@triton.jit
def _score_tile(
    query_ptr, bounds_ptr, scale_ptr, scores_ptr, length, i_row, i_tile, n_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Scores of tile i_tile of KV head i_row, whose sequence has `length` tokens that count.

    Tile: [D, BLOCKS], the one bound of each channel that the sign of q̄ calls for, as it is or, with a scale, decoded.
    Invariant: every score of the tile is written, −∞ past the end.
    """
    o_block = i_tile * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    o_d = tl.arange(0, D)
    o_g = tl.arange(0, 16)
    p_query = query_ptr + (i_row * G + o_g)[:, None] * D + o_d
    query = tl.load(p_query, mask=(o_g < G)[:, None], other=0.0).to(tl.float32)  # [16, D]
    pooled = tl.sum(query, axis=0) / G  # [D]
    side = tl.where(pooled >= 0, D, 0) + o_d  # [D]: rows 0 … D−1 are lo, D … 2D−1 hi
    p_bound = bounds_ptr + (i_row * 2 * D + side)[:, None] * n_blocks + o_block[None, :]
    total = tl.cdiv(length, BLOCK_SIZE)
    bound = tl.load(p_bound, mask=(o_block < _row_end(total, ALIGNED))[None, :], other=0)  # [D, BLOCKS]
    if scale_ptr is None:
        weight = pooled[:, None]
        is_zero = (weight == 0) & (tl.abs(bound) == float("inf"))  # 0·∞ is 0
        product = tl.where(is_zero, 0.0, weight * bound.to(tl.float32))
    else:
        weight = (pooled * tl.load(scale_ptr + i_row * D + o_d))[:, None]
        bound = bound.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        unbounded = tl.where(pooled[:, None] == 0, 0.0, float("inf"))  # q̄·∞ is ∞ on either side
        product = tl.where(tl.abs(bound) <= 448, weight * bound, unbounded)  # the code 0x7F is no number up to 448
    score = tl.where(o_block < total, tl.sum(product, axis=0), float("-inf"))
    tl.store(scores_ptr + i_row * n_blocks + o_block, score, mask=o_block < n_blocks)


def enqueue_append_and_scores(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, bounds: Tensor | Bounds8,
    start: Tensor, end: Tensor, completed: Tensor, block_size: int,
) -> Tensor:  # fmt: skip
    """`enqueue_write` of one token per sequence and `enqueue_scores` of the blocks before its own, in one kernel.

    query [B, Hq, D], key and value [B, Hkv, 1, D], start, end and completed [B] int32 → scores [B, Hkv, M] float32.
    Nothing before `completed` may lie in the block that the token goes to.
    """
    table, scale = (bounds.codes, bounds.scale) if isinstance(bounds, Bounds8) else (bounds, None)
    batch, kv_heads, capacity, head_dim = keys.shape
    n_blocks, tile = table.shape[4], 32
    scores = query.new_empty(batch, kv_heads, n_blocks, dtype=torch.float32)
    _append_and_score_kernel[(1 + triton.cdiv(n_blocks, tile), batch * kv_heads)](
        query, key, value, keys, values, table, scale, scores, start, end, completed, kv_heads, capacity, n_blocks,
        query.shape[1] // kv_heads, head_dim, block_size, tile, n_blocks % 16 == 0, num_warps=1,
        **overlapped(query.device),
    )  # fmt: skip
    return scores


@triton.jit
def _append_and_score_kernel(
    query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, bounds_ptr, scale_ptr, scores_ptr, start_ptr, end_ptr,
    completed_ptr, n_kv_head, capacity, n_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The first program of every KV head stores the token, the others score. Grid: (1 + ceil(M / BLOCKS), B·Hkv).

    They need not wait for each other: what the one writes, the others do not count.
    """
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    i_sequence = i_row // n_kv_head
    if tl.program_id(0) == 0:
        start, end = tl.load(start_ptr + i_sequence), tl.load(end_ptr + i_sequence)
        write_block(
            keys_ptr, values_ptr, bounds_ptr, scale_ptr, key_ptr, value_ptr, start, end,
            i_row, start // BLOCK_SIZE, capacity, 1, n_blocks, D, BLOCK_SIZE,
        )  # fmt: skip
    else:
        length = tl.load(completed_ptr + i_sequence)
        _score_tile(
            query_ptr, bounds_ptr, scale_ptr, scores_ptr, length, i_row, tl.program_id(0) - 1, n_blocks,
            G, D, BLOCK_SIZE, BLOCKS, ALIGNED,
        )  # fmt: skip


@triton.jit
def _row_end(total, ALIGNED: tl.constexpr):
    """Where to stop reading a row of blocks, `total` of which count.

    A mask that may change between any two neighbours splits a load into single elements. Where rows are padded to
    multiples of 16, reading up to one keeps it whole; what lies past `total` must be masked after the load.
    """
    return tl.cdiv(total, 16) * 16 if ALIGNED else total


def select_blocks(scores: Tensor, lengths: Tensor, config: ReSAConfig) -> Tensor:
    """The blocks to attend: the newest `local_blocks`, then the highest scores, n in all (eq. 5).

    scores [B, Hkv, M] float32, lengths [B] → indices [B, Hkv, N] int32, ascending, −1 behind them; N is the n of a
    full cache, so that no length has to be read back. Equal scores: the lower index wins. NaN ranks below every
    number, and blocks past the end are never taken. Raises `ValueError` for arguments that do not fit together or
    that the kernels do not support.
    """
    sizes = bind_shapes(scores=(scores, "B Hkv M"), lengths=(lengths, "B"))
    check_dtypes((torch.float32,), scores=scores)
    check_device("scores", scores)
    check_sizes(block_size=config.block_size)
    check_lengths("lengths", lengths, sizes["M"] * config.block_size)
    check_layout(scores=scores)
    counts = active_blocks(lengths, config).to(torch.int32)
    return enqueue_selection(scores, lengths.to(torch.int32).contiguous(), counts, config)


def enqueue_selection(scores: Tensor, lengths: Tensor, counts: Tensor, config: ReSAConfig) -> Tensor:
    """`select_blocks` without its checks, given counts [B] int32 = `active_blocks(lengths, config)`."""
    batch, kv_heads, n_blocks = scores.shape
    full = torch.tensor([n_blocks * config.block_size])
    width = int(active_blocks(full, config))  # on the CPU: nothing waits
    indices = scores.new_empty(batch, kv_heads, width, dtype=torch.int32)
    if indices.numel():
        tile = max(4, triton.next_power_of_2(n_blocks))
        _select_kernel[(batch * kv_heads,)](
            scores, lengths, counts, indices, kv_heads, n_blocks, width, config.local_blocks, config.block_size, tile,
            n_blocks % 16 == 0, num_warps=min(8, max(1, tile // 256)), **overlapped(scores.device),
        )  # fmt: skip
    return indices


@triton.jit
def _select_kernel(
    scores_ptr, lengths_ptr, counts_ptr, indices_ptr, n_kv_head, n_blocks, width, local_blocks,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The selected blocks of one KV head, ascending, −1 behind them.

    Grid: (B·Hkv,). Tile: [BLOCKS], the whole row in registers, BLOCKS ≥ M.
    The n-th highest score is searched for among integers that have the order of float32. Invariant: `at_low` ≥ `needed`
    candidates have a score of at least `low`'s, `at_high` < `needed` one of at least `high`'s. The search guesses by
    interpolation, which a smooth distribution rewards, and after GUESSES passes halves, which none can defeat. Among
    equals of the last score taken, the lowest indices are found by a second search, which only runs when there are too
    many of them.
    """
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    n = tl.load(counts_ptr + i_row // n_kv_head)
    total = tl.cdiv(length, BLOCK_SIZE)
    candidates = tl.maximum(total - local_blocks, 0)
    needed = n - (total - candidates)
    p_index = indices_ptr + i_row * width
    for i_block in range(candidates, total):
        tl.store(p_index + needed + i_block - candidates, i_block)
    o_block = tl.arange(0, BLOCKS)
    m_score = o_block < _row_end(total, ALIGNED)
    score = tl.load(scores_ptr + i_row * n_blocks + o_block, mask=m_score, other=0.0)
    score = tl.where(o_block < candidates, score, float("nan"))  # NaN is above nothing, and no minimum or maximum

    low, high = _order(tl.min(score, axis=0)), _order(tl.max(score, axis=0)) + 1
    at_low, at_high, n_pass = candidates, 0, 0
    while (at_low > needed) & (high > low + 1):
        width_half = (high >> 1) - (low >> 1)  # half of it, because the whole can exceed 32 bits
        share = (at_low - needed).to(tl.float32) / (at_low - at_high).to(tl.float32)
        guess = low + 2 * (width_half.to(tl.float32) * share).to(tl.int32)
        halfway = (low & high) + ((low ^ high) >> 1)
        middle = tl.where(n_pass < GUESSES, tl.minimum(tl.maximum(guess, low + 1), high - 1), halfway)
        above = _count(score >= _number(middle))
        is_low = above >= needed
        low, high = tl.where(is_low, middle, low), tl.where(is_low, high, middle)
        at_low, at_high = tl.where(is_low, above, at_low), tl.where(is_low, at_high, above)
        n_pass += 1

    low = tl.minimum(low, 2139095040)  # the place of +∞; where all scores are NaN, so were the extremes
    if needed == candidates:
        score = tl.where(o_block < candidates, float("inf"), float("nan"))  # all, and NaN as well
    elif at_low > needed:  # some of several equals; or all numbers and some NaN
        is_tied = (score != score) & (o_block < candidates)
        if _count(score >= _number(low)) >= needed:
            is_tied = score == _number(low)
        wanted = needed - _count((score >= _number(low)) & (is_tied == 0))
        first = 0
        last = BLOCKS + 1
        while last > first + 1:  # at most `wanted` tied blocks lie before `first`, more before `last`
            middle = (first + last) >> 1
            before = _count(is_tied & (o_block < middle))
            first, last = tl.where(before <= wanted, middle, first), tl.where(before <= wanted, last, middle)
        score = tl.where(is_tied, tl.where(o_block < first, float("inf"), float("nan")), score)
    # Four neighbours lie in one thread, so only their sums are scanned, and each column of four is stored on its own:
    # a store of all at once would first be rearranged through shared memory.
    even, odd = tl.split(tl.reshape((score >= _number(low)).to(tl.int32), [BLOCKS // 4, 2, 2]))
    taken_0, taken_2 = tl.split(even)  # [BLOCKS / 4]
    taken_1, taken_3 = tl.split(odd)
    taken = taken_0 + taken_1 + taken_2 + taken_3
    p_taken = p_index + tl.cumsum(taken, axis=0) - taken
    o_first = tl.arange(0, BLOCKS // 4) * 4
    tl.store(p_taken, o_first, mask=taken_0 > 0)
    tl.store(p_taken + taken_0, o_first + 1, mask=taken_1 > 0)
    tl.store(p_taken + taken_0 + taken_1, o_first + 2, mask=taken_2 > 0)
    tl.store(p_taken + taken - taken_3, o_first + 3, mask=taken_3 > 0)
    if n < width:
        tl.store(p_index + o_block, -1, mask=(o_block >= n) & (o_block < width))


@triton.jit
def _count(is_counted):
    """How many are true."""
    if is_counted.shape[0] > LONG_ROW:  # exact below 2**24, and one instruction less per number, but slower to add up
        return tl.sum(is_counted.to(tl.float32), axis=0).to(tl.int32)
    return tl.sum(is_counted.to(tl.int32), axis=0)


@triton.jit
def _order(number):
    """A float32 as an integer of the same order; both zeros are 0."""
    bits = (number + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _number(order):
    """The float32 that has this place in the order of `_order`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
