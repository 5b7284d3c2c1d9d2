"""Which blocks a step reads, in Triton: bounds (eq. 3), scores (eq. 4), selection (eq. 5).

The reference states each result over the whole cache. Here each is one kernel that reads every byte
it needs once. Scoring reads half the bounds: `max(q̄·lo, q̄·hi)` is `q̄·hi` where q̄ ≥ 0 and `q̄·lo`
elsewhere, and bounds are stored channel by channel, so the other half is never touched. Selection
does not sort: it searches for the n-th highest score, then numbers the blocks at or above it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.blocks import active_blocks
from resa.reference.config import ReSAConfig

from .cache import write_block
from .gpu.bounds8 import Bounds8, table_and_scale
from .gpu.launch import let_next_start, overlapped, wait_for_previous
from .pages import cached_rows, check_bounds, layout

MANY_SCORES = 2**17  # from here on larger tiles pay: there are programs enough to fill the GPU
# In rows up to this long the reduction dominates; warps add integers in one instruction.
LONG_ROW = tl.constexpr(4096)
GUESSES = tl.constexpr(16)  # passes that interpolate; smooth rows of 16,384, simulated, took 3 to 9
LOGISTIC = tl.constexpr(0.5513)  # scale of a logistic distribution of standard deviation 1, √3/π


def block_bounds(keys: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """Smallest and largest key of every block, per channel (eq. 3).

    keys [B, Hkv, T_max, D], lengths [B] → bounds [B, Hkv, 2, D, M] in the keys' dtype: 0 = lo, 1 =
    hi, with +∞ and −∞ for a block without keys.
    """
    batch, n_kv_head, capacity, head_dim = keys.shape
    n_blocks = triton.cdiv(capacity, block_size)
    bounds = keys.new_empty(batch, n_kv_head, 2, head_dim, n_blocks)
    if bounds.numel():
        tile = max(16, 2048 // head_dim)
        lengths = lengths.to(torch.int32).contiguous()
        _bounds_kernel[(triton.cdiv(n_blocks, tile), batch * n_kv_head)](
            keys, lengths, bounds, n_kv_head, capacity, n_blocks, head_dim, block_size, tile
        )
    return bounds


@triton.jit
def _bounds_kernel(
    keys_ptr, lengths_ptr, bounds_ptr, n_kv_head, capacity, n_blocks,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Bounds of BLOCKS blocks of one KV head.

    Grid: (ceil(M / BLOCKS), B·Hkv). Tile: [BLOCKS, D], one token of each block at a time.
    Invariant: after j steps lo and hi are the extremes of the blocks' first j valid tokens, NaN
    where one is NaN.
    """
    i_row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    o_block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    o_d = tl.arange(0, D)

    # Begin with the neutral elements of min and max.
    lo = tl.full([BLOCKS, D], float("inf"), tl.float32)
    hi = tl.full([BLOCKS, D], float("-inf"), tl.float32)
    p_key = keys_ptr + (i_row * capacity + o_block * BLOCK_SIZE)[:, None] * D + o_d
    for j in range(BLOCK_SIZE):
        m_key = (o_block * BLOCK_SIZE + j < length)[:, None]
        key = tl.load(p_key + j * D, mask=m_key, other=0.0).to(tl.float32)  # [BLOCKS, D]
        lo = tl.where(m_key, tl.minimum(lo, key, propagate_nan=tl.PropagateNan.ALL), lo)
        hi = tl.where(m_key, tl.maximum(hi, key, propagate_nan=tl.PropagateNan.ALL), hi)

    # Store as [D, BLOCKS], because neighbours in memory are blocks of one channel.
    o_channel = i_row * 2 * D + o_d[:, None]  # [D, 1]: D channels of lo, then D of hi
    m_block = (o_block < n_blocks)[None, :]
    p_lo = bounds_ptr + o_channel * n_blocks + o_block[None, :]
    p_hi = bounds_ptr + (o_channel + D) * n_blocks + o_block[None, :]
    tl.store(p_lo, tl.trans(lo).to(bounds_ptr.dtype.element_ty), mask=m_block)
    tl.store(p_hi, tl.trans(hi).to(bounds_ptr.dtype.element_ty), mask=m_block)


def score_blocks(
    query: Tensor, bounds: Tensor | Bounds8, lengths: Tensor, block_size: int,
    *, table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Upper bound of the pooled query's logit over each block, without the softmax scale (eq. 4).

    query [B, Hq, D], bounds [B, Hkv, 2, D, M], exact or in 8 bits, lengths [B] → scores
    [B, Hkv, M] float32, −∞ for blocks past the end. With a table [B, pages] int32, bounds are those
    of pages, [P, Hkv, N / block_size, 2, D] (see `pages.py`).
    """
    if table is not None:
        return _score_pages(query, bounds, table, lengths, block_size)
    bounds, scale = table_and_scale(bounds)
    batch, n_kv_head, _, head_dim, n_blocks = bounds.shape
    scores = query.new_empty(batch, n_kv_head, n_blocks, dtype=torch.float32)
    if scores.numel():
        query, lengths = query.contiguous(), lengths.to(torch.int32).contiguous()
        is_many = scores.numel() >= MANY_SCORES
        tile = 64 if is_many and head_dim <= 128 else 32
        # Started early, many programs would crowd onto the multiprocessors that are free first.
        early = {} if is_many else overlapped(query.device)
        _score_kernel[(triton.cdiv(n_blocks, tile), batch * n_kv_head)](
            query, bounds, scale, lengths, scores, n_kv_head, n_blocks,
            query.shape[1] // n_kv_head, head_dim, block_size, tile, n_blocks % 16 == 0,
            num_warps=1, **early
        )  # fmt: skip
    return scores


@triton.jit
def _score_kernel(
    query_ptr, bounds_ptr, scale_ptr, lengths_ptr, scores_ptr, n_kv_head, n_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr
):  # fmt: skip
    """Scores of BLOCKS blocks of one KV head. Grid: (ceil(M / BLOCKS), B·Hkv)."""
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    _score_tile(
        query_ptr, bounds_ptr, scale_ptr, scores_ptr, length, i_row, tl.program_id(0), n_blocks,
        G, D, BLOCK_SIZE, BLOCKS, ALIGNED
    )  # fmt: skip


@triton.jit
def _score_tile(
    query_ptr, bounds_ptr, scale_ptr, scores_ptr, length, i_row, i_tile, n_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
    ALIGNED: tl.constexpr
):  # fmt: skip
    """Scores of tile i_tile of KV head i_row, `length` tokens of whose sequence count.

    Tile: [D, BLOCKS], for each channel the one bound that the sign of q̄ calls for, as it is or,
    with a scale, decoded. Invariant: every score of the tile is written, −∞ past the end.
    """
    # Pool the query heads of the group.
    o_block = i_tile * BLOCKS + tl.arange(0, BLOCKS)  # [BLOCKS]
    o_d = tl.arange(0, D)
    o_g = tl.arange(0, 16)
    p_query = query_ptr + (i_row * G + o_g)[:, None] * D + o_d
    query = tl.load(p_query, mask=(o_g < G)[:, None], other=0.0).to(tl.float32)  # [16, D]
    pooled = tl.sum(query, axis=0) / G  # [D]

    # Load one bound per channel: rows 0 … D−1 are lo, D … 2D−1 hi.
    side = tl.where(pooled >= 0, D, 0) + o_d  # [D]
    p_bound = bounds_ptr + (i_row * 2 * D + side)[:, None] * n_blocks + o_block[None, :]
    total = tl.cdiv(length, BLOCK_SIZE)
    m_bound = (o_block < _row_end(total, ALIGNED))[None, :]
    bound = tl.load(p_bound, mask=m_bound, other=0)  # [D, BLOCKS]

    # Multiply. The product 0 · ±∞ is 0 here, not NaN; a code of no bound, 0x7F, reads as ±∞.
    if scale_ptr is None:
        weight = pooled[:, None]
        is_zero = (weight == 0) & (tl.abs(bound) == float("inf"))
        product = tl.where(is_zero, 0.0, weight * bound.to(tl.float32))
    else:
        weight = (pooled * tl.load(scale_ptr + i_row * D + o_d))[:, None]
        bound = bound.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        unbounded = tl.where(pooled[:, None] == 0, 0.0, float("inf"))  # q̄·∞ is ∞ on either side
        product = tl.where(tl.abs(bound) <= 448, weight * bound, unbounded)
    score = tl.where(o_block < total, tl.sum(product, axis=0), float("-inf"))
    tl.store(scores_ptr + i_row * n_blocks + o_block, score, mask=o_block < n_blocks)


def _score_pages(
    query: Tensor, bounds: Tensor, table: Tensor, lengths: Tensor, block_size: int
) -> Tensor:
    """Scores of blocks whose bounds lie with their pages, both sides of a channel in one row."""
    check_bounds(bounds, None, block_size)
    batch, n_kv_head, n_blocks, page_size = layout(bounds, table)  # counted in blocks
    head_dim, group = bounds.shape[4], query.shape[1] // n_kv_head
    scores = query.new_empty(batch, n_kv_head, n_blocks, dtype=torch.float32)
    if scores.numel():
        query, lengths = query.contiguous(), lengths.to(torch.int32).contiguous()
        tile = max(1, 4096 // head_dim)
        _score_pages_kernel[(triton.cdiv(n_blocks, tile), batch * n_kv_head)](
            query, bounds, table, lengths, scores, n_kv_head, n_blocks, group, head_dim,
            block_size, page_size, tile, **overlapped(query.device)
        )  # fmt: skip
    return scores


@triton.jit
def _score_pages_kernel(
    query_ptr, bounds_ptr, table_ptr, lengths_ptr, scores_ptr, n_kv_head, n_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr,
    BLOCKS: tl.constexpr
):  # fmt: skip
    """Scores of BLOCKS blocks of one KV head. Grid: (ceil(M / BLOCKS), B·Hkv). Tile: [BLOCKS, D].

    PAGE counts blocks.
    """
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    total = tl.cdiv(tl.load(lengths_ptr + i_row // n_kv_head), BLOCK_SIZE)
    o_block, o_d = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, D)
    o_g, m_block = tl.arange(0, 16), o_block < total
    p_query = query_ptr + (i_row * G + o_g)[:, None] * D + o_d
    query = tl.load(p_query, mask=(o_g < G)[:, None], other=0.0).to(tl.float32)  # [16, D]
    pooled = (tl.sum(query, axis=0) / G)[None, :]

    o_row = cached_rows(table_ptr, i_row, n_kv_head, n_blocks, o_block, m_block, PAGE)
    p_lo = bounds_ptr + o_row[:, None] * 2 * D + o_d
    lo = tl.load(p_lo, mask=m_block[:, None], other=0.0).to(tl.float32)  # [BLOCKS, D]
    hi = tl.load(p_lo + D, mask=m_block[:, None], other=0.0).to(tl.float32)
    bound = tl.where(pooled >= 0, hi, lo)
    is_zero = (pooled == 0) & (tl.abs(bound) == float("inf"))
    product = tl.where(is_zero, 0.0, pooled * bound)
    score = tl.where(m_block, tl.sum(product, axis=1), float("-inf"))
    tl.store(scores_ptr + i_row * n_blocks + o_block, score, mask=o_block < n_blocks)


def append_and_score(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor,
    bounds: Tensor | Bounds8, start: Tensor, end: Tensor, completed: Tensor, block_size: int
) -> Tensor:  # fmt: skip
    """`write_window` of one token per sequence and `score_blocks` of the blocks before its own, in
    one kernel.

    query [B, Hq, D], key and value [B, Hkv, 1, D], start, end and completed [B] int32 → scores [B,
    Hkv, M] float32. The token's block must begin at `completed` or later. The three must be older
    than the kernel launched right before.
    """
    bounds, scale = table_and_scale(bounds)
    (batch, n_kv_head, capacity, head_dim), n_blocks, tile = keys.shape, bounds.shape[4], 32
    scores = query.new_empty(batch, n_kv_head, n_blocks, dtype=torch.float32)
    _append_and_score_kernel[(1 + triton.cdiv(n_blocks, tile), batch * n_kv_head)](
        query, key, value, keys, values, bounds, scale, scores, start, end, completed,
        n_kv_head, capacity, n_blocks, query.shape[1] // n_kv_head, head_dim, block_size, tile,
        n_blocks % 16 == 0, num_warps=1, **overlapped(query.device)
    )  # fmt: skip
    return scores


@triton.jit
def _append_and_score_kernel(
    query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, bounds_ptr, scale_ptr, scores_ptr,
    start_ptr, end_ptr, completed_ptr, n_kv_head, capacity, n_blocks, G: tl.constexpr,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """One token of one KV head, or scores of BLOCKS of its blocks.

    Grid: (1 + ceil(M / BLOCKS), B·Hkv), the first program of a row storing the token. The others
    need not wait for it: what it writes they do not count.
    """
    i_row = tl.program_id(1).to(tl.int64)
    i_sequence = i_row // n_kv_head
    start, end = tl.load(start_ptr + i_sequence), tl.load(end_ptr + i_sequence)
    length = tl.load(completed_ptr + i_sequence)
    wait_for_previous()
    let_next_start()
    if tl.program_id(0) == 0:
        write_block(
            keys_ptr, values_ptr, bounds_ptr, scale_ptr, None, key_ptr, value_ptr, start, end,
            i_row, start // BLOCK_SIZE, n_kv_head, capacity, 1, n_blocks, D, BLOCK_SIZE, 0, D
        )  # fmt: skip
    else:
        _score_tile(
            query_ptr, bounds_ptr, scale_ptr, scores_ptr, length, i_row, tl.program_id(0) - 1,
            n_blocks, G, D, BLOCK_SIZE, BLOCKS, ALIGNED
        )  # fmt: skip


@triton.jit
def _row_end(total, ALIGNED: tl.constexpr):
    """Where to stop reading a row of blocks, `total` of which count.

    A mask that may change between any two neighbours splits a load into single elements. Where rows
    are padded to multiples of 16, reading up to one keeps it whole; what lies past `total` must be
    masked after the load.
    """
    return tl.cdiv(total, 16) * 16 if ALIGNED else total


def select_blocks(
    scores: Tensor, lengths: Tensor, config: ReSAConfig, *, counts: Tensor | None = None
) -> Tensor:
    """The blocks to read: the newest `local_blocks`, then the highest scores, n in all (eq. 5).

    scores [B, Hkv, M] float32, lengths [B] → indices [B, Hkv, N] int32, ascending, −1 behind them.
    Unlike the reference's, N is the n of a full cache, so that no length has to be read back. The
    decode loop passes its own counts [B] int32, which are `active_blocks(lengths, config)`. They
    and the lengths must then be older than the kernel launched right before.
    """
    batch, n_kv_head, n_blocks = scores.shape
    full = torch.tensor([n_blocks * config.block_size], device="cpu")  # nothing waits for the GPU
    width = int(active_blocks(full, config))
    indices = scores.new_empty(batch, n_kv_head, width, dtype=torch.int32)
    if indices.numel():
        early = overlapped(scores.device) if counts is not None else {}
        if counts is None:
            counts = active_blocks(lengths, config).to(torch.int32)
        lengths = lengths.to(torch.int32).contiguous()
        tile = max(4, triton.next_power_of_2(n_blocks))
        _select_kernel[(batch * n_kv_head,)](
            scores, lengths, counts, indices, n_kv_head, n_blocks, width, config.local_blocks,
            config.block_size, tile, n_blocks % 16 == 0,
            num_warps=min(8, max(1, tile // 512)), **early
        )  # fmt: skip
    return indices


# Not one variant for widths that 16 divides, and one for others: it would only compile longer.
@triton.jit(do_not_specialize=["width"])
def _select_kernel(
    scores_ptr, lengths_ptr, counts_ptr, indices_ptr, n_kv_head, n_blocks, width, local_blocks,
    BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The selected blocks of one KV head, ascending, −1 behind them.

    Grid: (B·Hkv,). Tile: [BLOCKS], the whole row in registers, BLOCKS ≥ M. Invariant: a block is
    written once, at its rank among the selected; the newest come first, and their ranks are last.
    """
    i_row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    n = tl.load(counts_ptr + i_row // n_kv_head)
    # Wait for the scores. Lengths and counts are older than the kernel before this one.
    wait_for_previous()
    let_next_start()

    # The newest blocks are always in. `needed` more come from the candidates before them.
    total = tl.cdiv(length, BLOCK_SIZE)
    candidates = tl.maximum(total - local_blocks, 0)
    needed = n - (total - candidates)
    p_index = indices_ptr + i_row * width
    for i_block in range(candidates, total):
        tl.store(p_index + needed + i_block - candidates, i_block)

    # Of the candidates take those that reach the needed-th highest score. Everything else becomes
    # NaN, which reaches nothing and is no minimum or maximum.
    o_block = tl.arange(0, BLOCKS)
    m_score = o_block < _row_end(total, ALIGNED)
    score = tl.load(scores_ptr + i_row * n_blocks + o_block, mask=m_score, other=0.0)
    score = tl.where(o_block < candidates, score, float("nan"))
    low, at_low = _search(score, candidates, needed)
    if needed == candidates:
        score = tl.where(o_block < candidates, float("inf"), float("nan"))  # all, and NaN as well
    elif at_low > needed:
        score = _settle_ties(score, o_block, candidates, needed, low)

    # Rank them by a prefix sum and store each at its rank. Four neighbours lie in one thread, so
    # only their sums are scanned, and each column of four is stored on its own: a store of all at
    # once would first be rearranged through shared memory.
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
def _search(score, candidates, needed):
    """The highest number that `needed` scores reach, by its place in `_order`, and how many do.

    Invariant: `at_low` ≥ `needed` candidates reach `low`, and `at_high`, fewer, reach `high`. The
    first two guesses are those for a logistic distribution. Then the search interpolates, and after
    GUESSES passes it halves, which no distribution can defeat. An end that stays weighs less for
    the next guess (the Pegasus rule, Dowell and Jarratt 1972), or interpolation could creep along
    from one end. One score from the goal, it goes there. More than `needed` reach the result if
    scores are tied there, or if some are NaN.
    """
    lowest = tl.min(score, axis=0)
    low, high = _order(lowest), _order(tl.max(score, axis=0)) + 1
    at_low, at_high, n_pass, last = candidates, 0, 0, 0
    # Weights of the ends: how far they miss, or less.
    below, above = (candidates - needed).to(tl.float32), needed.to(tl.float32)

    # Mean and scale of the finite scores. Where none is negative, masses say, those of their
    # places, which grow with the logarithm.
    place = _order(score).to(tl.float32) - low.to(tl.float32)
    x = tl.where(tl.abs(score) < float("inf"), tl.where(lowest < 0, score, place), 0.0)
    n_scores = tl.maximum(candidates, 1)
    mean, square = tl.sum(x, axis=0) / n_scores, tl.sum(x * x, axis=0) / n_scores
    scale = tl.sqrt(tl.maximum(square - mean * mean, 0.0)) * LOGISTIC
    n_below, n_above = tl.maximum(below, 0.5), tl.maximum(above, 0.5)
    logistic = mean + scale * tl.log(n_below / n_above)
    per_score = scale * candidates / (n_below * n_above)
    first_place, width = low, high.to(tl.float32) - low.to(tl.float32)
    while (at_low > needed) & (high > low + 1):
        width_half = (high >> 1) - (low >> 1)  # half of it, because the whole can exceed 32 bits
        share = below / (below + above)
        guess = low + 2 * (width_half.to(tl.float32) * share).to(tl.int32)
        if n_pass < 2:
            within = tl.minimum(tl.maximum(logistic, 0.0), width)
            by_place = first_place + 2 * (within * 0.5).to(tl.int32)
            guess = tl.where(lowest < 0, _order(logistic), by_place)
        guess = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        halfway = (low & high) + ((low ^ high) >> 1)
        middle = tl.where(n_pass < GUESSES, guess, halfway)
        takes_one, drops_one = needed - at_high == 1, (needed > 0) & (at_low - needed == 1)
        if takes_one:  # the highest below `high`
            most = tl.max(tl.where(score >= _number(high), float("-inf"), score), axis=0)
            middle = _order(most)
        elif drops_one:  # the lowest that reaches `low`
            least = tl.min(tl.where(score >= _number(low), score, float("inf")), axis=0)
            low = _order(least)
            middle = low + 1
        count = _count(score >= _number(middle))
        is_low, miss = count >= needed, tl.abs(count - needed).to(tl.float32)
        logistic += (count - needed) * per_score
        if is_low:
            above *= tl.where(last > 0, below / (below + miss), 1.0)
            high = tl.where(takes_one, middle + 1, high)
            low, at_low, below, last = middle, count, miss, 1
        else:
            below *= tl.where(last < 0, above / (above + miss), 1.0)
            high, at_high, above, last = middle, count, miss, -1
        n_pass += 1
    # At most the place of +∞: where all scores are NaN, so were the extremes.
    return tl.minimum(low, 2139095040), at_low


@triton.jit
def _settle_ties(score, o_block, candidates, needed, low):
    """The scores with only so many left that reach `low`: of those tied there, the first blocks.

    Tied are the scores equal to it or, where fewer than `needed` numbers reach it, the NaN.
    Invariant of the search: at most `wanted` tied blocks lie before `first`, more before `last`.
    """
    is_tied = (score != score) & (o_block < candidates)
    if _count(score >= _number(low)) >= needed:
        is_tied = score == _number(low)
    wanted = needed - _count((score >= _number(low)) & (is_tied == 0))
    first = 0
    last = o_block.shape[0] + 1
    while last > first + 1:
        middle = (first + last) >> 1
        is_first = _count(is_tied & (o_block < middle)) <= wanted
        first, last = tl.where(is_first, middle, first), tl.where(is_first, last, middle)
    return tl.where(is_tied, tl.where(o_block < first, float("inf"), float("nan")), score)


@triton.jit
def _count(is_counted):
    """Number of true elements."""
    if is_counted.shape[0] > LONG_ROW:
        # Exact below 2**24, and one instruction less per number, but slower to add up.
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
