"""Attention mass of blocks, estimated from key sketches, in Triton.

The reference states estimate and mass over the whole cache. Here one kernel reads every code once
for eight query heads, and leaves per block and head the largest estimated logit and a sum of
exponentials. Another adds up the blocks' shares of the heads' totals.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.checks import require

from .attention import count_splits
from .gpu.launch import IS_COMPILED, let_next_start, overlapped, wait_for_previous
from .pages import layout, row_stride, tile_rows
from .sketch import MAGIC, SHRUNK, Factors, rotate_queries

TOKENS = 128  # of a tile: a whole number of blocks
LONG = 2**22  # tokens of all rows; from here on more programs at once pay, with fewer registers
ONE_BIT, ONE_BIT_NEXT = (tl.constexpr(f"and.b32 $0, $1, 0x0{m}0{m}0{m}0{m};") for m in "12")
TWO_BITS, TWO_BITS_NEXT = (tl.constexpr(f"and.b32 $0, $1, 0x0{m}0{m}0{m}0{m};") for m in "3c")
MASK = tl.constexpr("and.b32 $0, $1, $2;")
EXACT = tl.constexpr(1.5 * 2**12)  # added and taken away, leaves multiples of 2⁻⁴⁰ in float64


def score_sketch(
    query: Tensor, codes: Tensor, scales: Tensor, lengths: Tensor, block_size: int,
    *, table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Estimated attention mass of each block, summed over the heads of a group.

    query [B, Hq, D], codes [B, Hkv, T_max, D·bits/8], scales [B, Hkv, T_max], lengths [B] → scores
    [B, Hkv, M] float32, −∞ for blocks past the end, NaN where a valid token's scale is. From 64
    channels of 16 bits on, a rotated query is rounded to 16 bits of its largest channel. With a
    table [B, pages] int32, codes and scales are pools [P, Hkv, N, …] (see `pages.py`).
    """
    bits = 8 * codes.shape[3] // query.shape[2]
    lengths = lengths.to(torch.int32).contiguous()  # before: the scoring may start early
    factors = rotate_queries(query, codes.shape[1], bits)
    return score_rotated(factors, codes, scales, lengths, block_size, table=table)


def score_rotated(
    factors: Factors, codes: Tensor, scales: Tensor, lengths: Tensor, block_size: int,
    *, table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Estimated attention mass of each block, as by `score_sketch`, from rotated queries.

    lengths [B] int32 must not be written by the kernel that made the factors, or after it.
    """
    batch, n_kv_head, capacity, page_size = layout(codes, table)
    require(
        page_size % block_size == 0, "codes", f"pages of {page_size}", f"a multiple of {block_size}"
    )
    n_bytes, (rows, group) = codes.shape[3], factors.unit.shape
    _, n_eights, n_steps, _, width = factors.rows.shape
    n_blocks, head_dim = triton.cdiv(capacity, block_size), n_steps * width
    scores = factors.unit.new_empty(batch, n_kv_head, n_blocks)
    if scores.numel():
        # A multiprocessor runs all its programs at once, and all have equal shares.
        is_integer = factors.rows.dtype == torch.int8
        is_long = rows * capacity >= LONG and head_dim <= 128  # wider keys take more registers
        programs, registers = (12, 168) if is_long else (8, None)
        n_tiles = triton.cdiv(capacity, TOKENS)
        splits = count_splits(rows * n_eights, programs, n_tiles, codes.device)
        run = triton.cdiv(n_tiles, splits)  # tiles of one program
        n_runs = triton.cdiv(n_tiles, run)
        launch = {"num_warps": 1, "maxnreg": registers} if is_integer else {"num_warps": 4}

        early = overlapped(codes.device)
        by_block, by_run = (scores.new_empty(2, rows, group, n) for n in (n_blocks, n_runs))
        _estimate_kernel[(n_runs, rows, n_eights)](
            factors.rows, factors.offset, factors.unit, codes, scales, table, lengths, by_block,
            by_run, n_kv_head, capacity, n_blocks, run, group, head_dim, n_bytes * 8 // head_dim,
            width, block_size, TOKENS, page_size, row_stride(table, codes=codes),
            row_stride(table, scales=scales), **launch, **early
        )  # fmt: skip
        tile = 256
        _share_kernel[(triton.cdiv(n_blocks, tile), rows)](
            by_block, by_run, lengths, scores, n_kv_head, n_blocks, n_runs, run * TOKENS,
            group, block_size, tile, **early
        )  # fmt: skip
    return scores


@triton.jit
def _estimate_kernel(
    rows_ptr, offset_ptr, unit_ptr, codes_ptr, scales_ptr, table_ptr, lengths_ptr, by_block_ptr,
    by_run_ptr, n_kv_head, capacity, n_blocks, n_tiles, G: tl.constexpr, D: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
    PAGE: tl.constexpr, CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr
):  # fmt: skip
    """Maxima m and sums of exp2(logit − m) of a run of tiles: of every block, and of the whole run.

    Grid: (ceil(T_max / run), B·Hkv, ceil(G / 8)). A logarithm of the sum would be lost beside a
    large maximum. Invariant: a block's sum is NaN if the scale of a valid token in it is; a run's
    is over the tokens whose scale is a number.
    """
    i_run, i_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    wait_for_previous()
    let_next_start()

    # Factors, offsets and units of eight heads, on their way before the length is known.
    i_tile = i_row * tl.num_programs(2) + tl.program_id(2)
    o_row, o_g = tl.arange(0, 16), tl.program_id(2) * 8 + tl.arange(0, 8)
    p_factor = rows_ptr + i_tile * 16 * D + o_row[:, None] * WIDTH + tl.arange(0, WIDTH)
    factors = ()
    for step in tl.static_range(D // WIDTH):
        factors += (tl.load(p_factor + step * 16 * WIDTH),)
    offset = tl.load(offset_ptr + i_tile * 16 + o_row)
    unit = tl.load(unit_ptr + i_row * G + o_g, mask=o_g < G, other=1.0)  # 0 · ∞ would be NaN
    first = i_run * n_tiles * TOKENS
    if first < length:
        i_head = i_row * G + o_g
        n_heads = tl.num_programs(1).to(tl.int64) * G
        p_block = by_block_ptr + i_head[:, None] * n_blocks + first // BLOCK_SIZE
        p_code, p_scale = codes_ptr, scales_ptr
        if PAGE == 0:
            p_code += (i_row * capacity + first) * CODE_STRIDE
            p_scale += (i_row * capacity + first) * SCALE_STRIDE
        blocks_left, left = n_blocks - first // BLOCK_SIZE, length - first

        # Whole tiles need no masks; a lost token in them makes the sums NaN.
        heads = factors, offset, unit, o_g < G
        pointers = p_code, p_scale, p_block, p_block + n_heads * n_blocks
        place = table_ptr, i_row, n_kv_head, capacity, first
        m, z = tl.full([8], float("-inf"), tl.float32), tl.zeros([8], tl.float32)
        n_whole = tl.minimum(n_tiles, left // TOKENS)
        m, z = _run(
            m, z, heads, pointers, place, 0, n_whole, left, blocks_left,
            D, BITS, WIDTH, BLOCK_SIZE, TOKENS, PAGE, CODE_STRIDE, SCALE_STRIDE, False
        )  # fmt: skip
        check = tl.sum(z)
        if check != check:
            m, z = tl.full([8], float("-inf"), tl.float32), tl.zeros([8], tl.float32)
            n_whole = 0
        n_used = tl.minimum(n_tiles, tl.cdiv(left, TOKENS))
        m, z = _run(
            m, z, heads, pointers, place, n_whole, n_used, left, blocks_left,
            D, BITS, WIDTH, BLOCK_SIZE, TOKENS, PAGE, CODE_STRIDE, SCALE_STRIDE, True
        )  # fmt: skip
        p_run = by_run_ptr + i_head * tl.num_programs(0) + i_run
        tl.store(p_run, _finite(m) * unit, mask=o_g < G)
        tl.store(p_run + n_heads * tl.num_programs(0), z, mask=o_g < G)


@triton.jit
def _run(
    m, z, heads, pointers, place, begin, end, left, blocks_left, D: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
    PAGE: tl.constexpr, CODE_STRIDE: tl.constexpr, SCALE_STRIDE: tl.constexpr,
    IS_MASKED: tl.constexpr
):  # fmt: skip
    """Store the maxima and sums of the blocks of tiles begin … end − 1 → the run's own, [8] each.

    Tiles: [16, TOKENS]. Invariant: z = Σ exp2((s − m) · unit) over the logits s so far, in units of
    their heads, m ≥ each of their maxima. Differences come before units, because a fused product
    would not round as that of the maximum does.
    """
    factors, offset, unit, m_g = heads
    p_code, p_scale, p_max, p_sum = pointers
    N_BYTES: tl.constexpr = D * BITS // 8
    PLACES: tl.constexpr = WIDTH // N_BYTES
    STEPS: tl.constexpr = D // WIDTH
    BLOCKS: tl.constexpr = TOKENS // BLOCK_SIZE
    IS_INTEGER: tl.constexpr = factors[0].dtype == tl.int8
    o_k, o_t = tl.arange(0, WIDTH), begin * TOKENS + tl.arange(0, TOKENS)
    o_byte = o_k % N_BYTES if IS_INTEGER else o_k * BITS // 8
    o_block = begin * BLOCKS + tl.arange(0, BLOCKS)
    is_next = tl.full([TOKENS], True, tl.int1) & (begin < end)
    m_next = is_next & (o_t < left) if IS_MASKED else is_next
    o_row = _rows(place, begin * TOKENS, tl.arange(0, TOKENS), m_next, PAGE)
    p_code += o_byte[:, None]
    # In one cache, pointers move on from tile to tile. From pages, a turn hands the next its rows:
    # pointers would pass through shared memory, and those of a float32 tile of D = 256 do not fit.
    if PAGE == 0:
        p_code += o_row.to(tl.int64)[None, :] * CODE_STRIDE
        p_scale += o_row.to(tl.int64) * SCALE_STRIDE
        scale = tl.load(p_scale, mask=m_next, other=0.0)
    else:
        scale = tl.load(p_scale + o_row.to(tl.int64) * SCALE_STRIDE, mask=m_next, other=0.0)
    p_max += o_block[None, :]
    p_sum += o_block[None, :]
    for i_tile in range(begin, end):
        m_t = o_t < left
        p_tile = p_code
        if PAGE > 0:
            p_tile += o_row.to(tl.int64)[None, :] * CODE_STRIDE
        packed = tl.load(p_tile, mask=m_t[None, :], other=0) if IS_MASKED else tl.load(p_tile)
        own_scale = scale.to(tl.float32) * (SHRUNK if IS_INTEGER else 1.0)
        o_t += TOKENS
        is_next = tl.full([TOKENS], True, tl.int1) & (i_tile + 1 < end)
        m_next = is_next & (o_t < left) if IS_MASKED else is_next
        if PAGE == 0:
            p_code += TOKENS * CODE_STRIDE
            p_scale += TOKENS * SCALE_STRIDE
            scale = tl.load(p_scale, mask=m_next, other=0.0)
        else:
            o_row = _rows(place, (i_tile + 1) * TOKENS, tl.arange(0, TOKENS), m_next, PAGE)
            scale = tl.load(p_scale + o_row.to(tl.int64) * SCALE_STRIDE, mask=m_next, other=0.0)

        # Levels times factors.
        product = tl.broadcast_to(offset[:, None], [16, TOKENS])
        for step in tl.static_range(STEPS):
            if IS_INTEGER:
                level = _masked(packed, BITS, PLACES, step % 2)
                product = tl.dot(factors[step], level, product, out_dtype=tl.int32)
                if PLACES > 1 or step % 2 == 1:
                    packed = _shifted(packed, BITS * (2 if PLACES == 1 else PLACES))
            else:
                shift = (o_k * BITS % 8).to(tl.uint8)
                level = ((packed >> shift[:, None]) & (2**BITS - 1)).to(tl.float32)
                product = tl.dot(factors[step], level, product, input_precision="ieee")
        high, low = tl.split(tl.permute(tl.reshape(product, [2, 8, TOKENS]), [1, 2, 0]))
        product = high * 256 + low
        if IS_INTEGER:
            product = product.to(tl.float32, bitcast=True) - MAGIC
        logit = product * own_scale[None, :]  # in units of the head

        # The blocks' maxima and sums.
        if IS_MASKED:
            is_lost = m_t & (own_scale != own_scale)
            logit = tl.where((m_t & (is_lost == 0))[None, :], logit, float("-inf"))
        logit = tl.reshape(logit, [8, BLOCKS, BLOCK_SIZE])
        top = tl.max(logit, axis=2)  # [8, BLOCKS]
        safe = _finite(top) if IS_MASKED else top
        own_z = tl.sum(tl.exp2((logit - safe[:, :, None]) * unit[:, None, None]), axis=2)
        if IS_MASKED:
            lost = tl.max(tl.reshape(is_lost.to(tl.int32), [BLOCKS, BLOCK_SIZE]), axis=1) > 0
            marked = tl.where(lost[None, :], float("nan"), own_z)
            m_block = m_g[:, None] & (o_block < blocks_left)[None, :]
            tl.store(p_max, safe * unit[:, None], mask=m_block)
            tl.store(p_sum, marked, mask=m_block)
        else:
            tl.store(p_max, top * unit[:, None], mask=m_g[:, None])
            tl.store(p_sum, own_z, mask=m_g[:, None])
        o_block += BLOCKS
        p_max += BLOCKS
        p_sum += BLOCKS

        # And those of the run so far.
        new = tl.maximum(m, tl.max(top, axis=1))
        safe = _finite(new) if IS_MASKED else new
        by_top = own_z * tl.exp2((top - safe[:, None]) * unit[:, None])
        if not IS_INTEGER:
            # Four warps hold copies in orders of their own, and any of them may write the sum.
            # Multiples of 2⁻⁴⁰ add up exactly in float64, so that all copies are equal.
            by_top = by_top.to(tl.float64) + EXACT - EXACT
        z = z * tl.exp2((m - safe) * unit) + tl.sum(by_top, axis=1).to(tl.float32)
        m = new
    return m, z


@triton.jit
def _rows(place, token, o_t, m_t, PAGE: tl.constexpr):
    """Rows of a tile of a run, counted from the run's first token where there are no pages."""
    if PAGE == 0:
        o_row = token + o_t
    else:
        table_ptr, i_row, n_kv_head, capacity, first = place
        o_row = tile_rows(table_ptr, i_row, n_kv_head, capacity, first + token, o_t, m_t, PAGE)
    return o_row


@triton.jit
def _masked(packed, BITS: tl.constexpr, PLACES: tl.constexpr, IS_ODD: tl.constexpr):
    """Levels of the lowest bits of every byte as int8 [WIDTH, TOKENS], times their weights.

    A step takes the first of them, the one after it the second, without a shift in between; where
    tokens have few bytes, one takes PLACES of them. Four bytes at once. A mask that is the same
    everywhere is no operand of the instruction, so that the compiler lays out bytes for the product
    once, and not the levels of every step.
    """
    if PLACES == 1 and IS_COMPILED:
        FIRST: tl.constexpr = ONE_BIT if BITS == 1 else TWO_BITS
        SECOND: tl.constexpr = ONE_BIT_NEXT if BITS == 1 else TWO_BITS_NEXT
        AND: tl.constexpr = SECOND if IS_ODD else FIRST
        return tl.inline_asm_elementwise(AND, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    WIDTH: tl.constexpr = packed.shape[0]
    place = tl.arange(0, WIDTH) // (WIDTH // PLACES) + (IS_ODD if PLACES == 1 else 0)
    mask = ((2**BITS - 1) << (place * BITS)).to(tl.uint8)
    packed, mask = tl.broadcast(packed, mask[:, None])
    if not IS_COMPILED:
        return (packed & mask).to(tl.int8)
    return tl.inline_asm_elementwise(
        MASK, "=r,r,r", [packed, mask], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def _shifted(packed, BITS: tl.constexpr):
    """Every byte moved right by 2 or 4 bits, with what comes in from the next: masks drop it."""
    if not IS_COMPILED:
        return packed >> BITS
    SHIFT: tl.constexpr = "shr.b32 $0, $1, 2;" if BITS == 2 else "shr.b32 $0, $1, 4;"
    return tl.inline_asm_elementwise(SHIFT, "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def _finite(maximum):
    """The maximum of logits, or 0 where there is none: exp2(−∞ − 0) is 0, exp2(−∞ + ∞) is not."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _share_kernel(
    by_block_ptr, by_run_ptr, lengths_ptr, scores_ptr, n_kv_head, n_blocks, n_runs, run,
    G: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Scores of BLOCKS blocks of one KV head, from the maxima and sums of blocks and runs.

    Grid: (ceil(M / BLOCKS), B·Hkv). Invariant: every score is written, −∞ past the end.
    """
    i_row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    wait_for_previous()
    let_next_start()
    o_block, o_run = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, 64)
    m_block, n_used = o_block < tl.cdiv(length, BLOCK_SIZE), tl.cdiv(length, run)
    n_heads = tl.num_programs(1).to(tl.int64) * G
    score = tl.zeros([BLOCKS], tl.float32)
    for eight in tl.static_range((G + 7) // 8):
        # The heads' totals.
        o_g = eight * 8 + tl.arange(0, 8)
        m, z = tl.full([8], float("-inf"), tl.float32), tl.zeros([8], tl.float32)
        for begin in range(0, n_used, 64):
            m_run = (o_g < G)[:, None] & (begin + o_run < n_used)[None, :]
            p_run = by_run_ptr + (i_row * G + o_g)[:, None] * n_runs + begin + o_run
            own_m = tl.load(p_run, mask=m_run, other=float("-inf"))  # [8, 64]
            own_z = tl.load(p_run + n_heads * n_runs, mask=m_run, other=0.0)
            new = tl.maximum(m, tl.max(own_m, axis=1))
            safe = _finite(new)
            z = z * tl.exp2(m - safe) + tl.sum(own_z * tl.exp2(own_m - safe[:, None]), axis=1)
            m = new
        z = tl.where(z == 0, 1.0, z)  # no token has a sketch that is a number

        # The blocks' shares of them.
        p_block = by_block_ptr + (i_row * G + o_g)[:, None] * n_blocks + o_block
        m_own = (o_g < G)[:, None] & m_block[None, :]
        block_m = tl.load(p_block, mask=m_own, other=float("-inf"))  # [8, BLOCKS]
        block_z = tl.load(p_block + n_heads * n_blocks, mask=m_own, other=0.0)
        share = block_z * tl.exp2(block_m - _finite(m)[:, None]) / z[:, None]
        score += tl.sum(share, axis=0)
    p_score = scores_ptr + i_row * n_blocks + o_block
    tl.store(p_score, tl.where(m_block, score, float("-inf")), mask=o_block < n_blocks)
