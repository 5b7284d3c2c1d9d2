"""Key sketches in Triton: written with the keys, and scored without touching the keys again.

The reference states rotation, code, estimate and mass over the whole cache. Here one kernel stores
a window's keys and values with their sketches. Another reads every code once for the whole group of
query heads, and leaves per block and head the largest estimated logit and a sum of exponentials.
Two small ones then add up the heads' totals, and the blocks' shares of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resa.reference.sketch import STEP

from .gpu.launch import let_next_start, overlapped, wait_for_previous

LEVELS_APART = tl.constexpr(STEP)
TOKENS = 128  # whose codes one program scores: a whole number of blocks
HEADS = tl.constexpr(16)  # rows of a tile of query heads, the fewest that the matrix units take


@dataclass(frozen=True)
class Sketches:
    """Sketches of a batch, of one layer or, with a dimension more in front, of all."""

    codes: Tensor  # [B, Hkv, T_max, D·bits/8] uint8
    scales: Tensor  # [B, Hkv, T_max]
    bits: int

    def of_layer(self, layer: int) -> "Sketches":
        """One layer's."""
        return Sketches(self.codes[layer], self.scales[layer], self.bits)


def sketch_keys(keys: Tensor, bits: int = 2) -> tuple[Tensor, Tensor]:
    """Code and scale of every key.

    keys [B, Hkv, T_max, D] → codes [B, Hkv, T_max, D·bits/8] uint8, scales [B, Hkv, T_max] in the
    keys' dtype; code 0 and scale NaN for a key that is not finite, or whose scale is not.
    """
    batch, n_kv_head, capacity, head_dim = keys.shape
    codes = keys.new_empty(batch, n_kv_head, capacity, head_dim * bits // 8, dtype=torch.uint8)
    scales = keys.new_empty(batch, n_kv_head, capacity)
    start = torch.zeros(batch, dtype=torch.int32, device=keys.device)
    write_sketched(None, None, Sketches(codes, scales, bits), keys, None, start, start + capacity)
    return codes, scales


def write_sketched(
    keys: Tensor | None, values: Tensor | None, sketches: Sketches, new_keys: Tensor,
    new_values: Tensor | None, start: Tensor, end: Tensor
) -> None:  # fmt: skip
    """Store a window's keys, values and sketches in place; without values, its sketches alone.

    new_keys and new_values [B, Hkv, Q, D], start and end [B] int32: sequence s stores its first
    end[s] − start[s] ≤ Q new tokens at positions start[s], start[s] + 1, …
    """
    batch, n_kv_head, width, head_dim = new_keys.shape
    if new_keys.numel():
        tile = 16  # one size, so that a token's sums are the same in every window (law 12)
        _write_sketches_kernel[(triton.cdiv(width, tile), batch * n_kv_head)](
            keys, values, sketches.codes, sketches.scales, new_keys.contiguous(),
            None if new_values is None else new_values.contiguous(), start, end,
            n_kv_head, sketches.scales.shape[2], width, head_dim, sketches.bits, tile
        )  # fmt: skip


@triton.jit(do_not_specialize=["width"])  # one variant for every window, for the same reason
def _write_sketches_kernel(
    keys_ptr, values_ptr, codes_ptr, scales_ptr, new_keys_ptr, new_values_ptr, start_ptr, end_ptr,
    n_kv_head, capacity, width, D: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """TOKENS tokens of the window of one KV head. Grid: (ceil(Q / TOKENS), B·Hkv).

    Tile: [TOKENS, D]. Invariant: a token's key, value, code and scale are written together.
    """
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    start, end = tl.load(start_ptr + i_row // n_kv_head), tl.load(end_ptr + i_row // n_kv_head)
    o_t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    o_d, m_t = tl.arange(0, D), o_t < end - start
    o_new = (i_row * width + o_t)[:, None] * D + o_d  # [TOKENS, D]
    o_token = i_row * capacity + start + o_t  # [TOKENS]
    key = tl.load(new_keys_ptr + o_new, mask=m_t[:, None], other=0.0)
    if new_values_ptr is not None:
        value = tl.load(new_values_ptr + o_new, mask=m_t[:, None], other=0.0)
        tl.store(keys_ptr + o_token[:, None] * D + o_d, key, mask=m_t[:, None])
        tl.store(values_ptr + o_token[:, None] * D + o_d, value, mask=m_t[:, None])

    # The level of every rotated channel: its sign, or 0 … 3.
    key = key.to(tl.float32)
    rotated = _rotated(key, TOKENS, D)
    level = (rotated >= 0).to(tl.int32)
    if BITS == 2:
        step = LEVELS_APART * tl.sqrt_rn(tl.sum(rotated * rotated, axis=1) / D)[:, None]
        level += (rotated >= -step).to(tl.int32) + (rotated >= step).to(tl.int32)

    # The scale in the keys' dtype, and whether it and the key are numbers.
    code = _centred(level, BITS)
    scale = tl.sum(rotated * code, axis=1) / tl.sum(code * code, axis=1)
    scale = scale.to(scales_ptr.dtype.element_ty)
    is_finite = tl.min((tl.abs(key) < float("inf")).to(tl.int32), axis=1) > 0
    is_finite = is_finite & (tl.abs(scale.to(tl.float32)) < float("inf"))
    tl.store(
        scales_ptr + o_token, tl.where(is_finite, scale.to(tl.float32), float("nan")), mask=m_t
    )

    # Pack 8 / BITS channels into a byte, the first one lowest.
    PER_BYTE: tl.constexpr = 8 // BITS
    level = tl.reshape(tl.where(is_finite[:, None], level, 0), [TOKENS, D // PER_BYTE, PER_BYTE])
    packed = tl.sum(level << (tl.arange(0, PER_BYTE) * BITS)[None, None, :], axis=2)
    o_byte = tl.arange(0, D // PER_BYTE)
    p_code = codes_ptr + o_token[:, None] * (D // PER_BYTE) + o_byte
    tl.store(p_code, packed.to(tl.uint8), mask=m_t[:, None])


@triton.jit
def _rotated(x, ROWS: tl.constexpr, D: tl.constexpr):
    """Signs, then a Hadamard transform: x [ROWS, D] float32, D a power of two → the same."""
    # The hash of the channel's number, modulo 2^32.
    mixed = ((tl.arange(0, D) + 1).to(tl.int64) * 2654435761) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
    x = x * (1 - 2 * (mixed >> 31)).to(tl.float32)[None, :]

    # Butterflies of stride 1, 2, 4, …, in the order in which the reference adds.
    for log_stride in tl.static_range(8):
        if (1 << log_stride) < D:
            pairs = tl.reshape(x, [ROWS, D >> (log_stride + 1), 2, 1 << log_stride])
            first, second = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
            pairs = tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2])
            x = tl.reshape(pairs, [ROWS, D])
    return x * (D**-0.5)


@triton.jit
def _centred(level, BITS: tl.constexpr):
    """Levels as numbers around 0: −1.5, −0.5, 0.5 and 1.5, or −1 and 1 for one bit."""
    return level.to(tl.float32) - 1.5 if BITS == 2 else 2.0 * level.to(tl.float32) - 1.0


def score_sketch(
    query: Tensor, codes: Tensor, scales: Tensor, lengths: Tensor, block_size: int
) -> Tensor:
    """Estimated attention mass of each block, summed over the heads of a group.

    query [B, Hq, D], codes [B, Hkv, T_max, D·bits/8], scales [B, Hkv, T_max], lengths [B] → scores
    [B, Hkv, M] float32, −∞ for blocks past the end, NaN where a valid token's scale is.
    """
    (batch, n_kv_head, capacity, n_bytes), (_, n_head, head_dim) = codes.shape, query.shape
    group, rows, n_blocks = (
        n_head // n_kv_head,
        batch * n_kv_head,
        triton.cdiv(capacity, block_size),
    )
    scores = query.new_empty(batch, n_kv_head, n_blocks, dtype=torch.float32)
    if scores.numel():
        query, lengths = query.contiguous(), lengths.to(torch.int32).contiguous()
        rotated = query.new_empty(rows, group, head_dim, dtype=torch.float32)
        n_tiles = triton.cdiv(capacity, TOKENS)
        by_block = rotated.new_empty(rows, n_blocks, 2, group)  # a maximum and a sum
        by_tile, total = (rotated.new_empty(rows, n, 2, group) for n in (n_tiles, 1))
        early = overlapped(query.device)
        _rotate_kernel[(rows,)](query, rotated, group, head_dim, **early)
        _estimate_kernel[(n_tiles, rows)](
            rotated, codes, scales, lengths, by_block, by_tile, scores, n_kv_head, capacity,
            n_blocks, group, head_dim, 8 * n_bytes // head_dim, block_size, TOKENS,
            query.dtype == torch.float32, **early
        )  # fmt: skip
        _total_kernel[(rows,)](by_tile, lengths, total, n_kv_head, n_tiles, group, TOKENS, **early)
        tile = 64
        _share_kernel[(triton.cdiv(n_blocks, tile), rows)](
            by_block, total, lengths, scores, n_kv_head, n_blocks, group, block_size, tile, **early
        )
    return scores


@triton.jit
def _rotate_kernel(query_ptr, rotated_ptr, G: tl.constexpr, D: tl.constexpr):
    """The queries of one KV head, rotated, and divided by sqrt(D). Grid: (B·Hkv,)."""
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, HEADS)
    offsets, m_g = (i_row * G + o_g)[:, None] * D + tl.arange(0, D), (o_g < G)[:, None]
    query = tl.load(query_ptr + offsets, mask=m_g, other=0.0).to(tl.float32)
    tl.store(rotated_ptr + offsets, _rotated(query, HEADS, D) * (D**-0.5), mask=m_g)


@triton.jit
def _estimate_kernel(
    rotated_ptr, codes_ptr, scales_ptr, lengths_ptr, by_block_ptr, by_tile_ptr, scores_ptr,
    n_kv_head, capacity, n_blocks, G: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, IS_WIDE: tl.constexpr
):  # fmt: skip
    """Maxima and sums of the estimated logits of TOKENS tokens of one KV head, by block and tile.

    Grid: (ceil(T_max / TOKENS), B·Hkv). Tiles: codes [TOKENS, D·BITS/8], queries [16, D]. A sum is
    of exp(logit − maximum): a logarithm would lose it beside a large maximum.
    Invariant: a block's score is left NaN if the scale of one of its valid tokens is, else 0.
    """
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    i_tile = tl.program_id(0)
    length = tl.load(lengths_ptr + i_row // n_kv_head)
    if i_tile * TOKENS < length:
        # Unpack the codes, channel by channel in their order.
        o_t = i_tile * TOKENS + tl.arange(0, TOKENS)
        m_t = o_t < length
        PER_BYTE: tl.constexpr = 8 // BITS
        o_byte = tl.arange(0, D // PER_BYTE)
        p_code = codes_ptr + (i_row * capacity + o_t)[:, None] * (D // PER_BYTE) + o_byte
        packed = tl.load(p_code, mask=m_t[:, None], other=0).to(tl.int32)
        shifts = (tl.arange(0, PER_BYTE) * BITS)[None, None, :]
        level = (packed[:, :, None] >> shifts) & (2**BITS - 1)
        code = _centred(tl.reshape(level, [TOKENS, D]), BITS)

        # Multiply by the queries of all heads. In 16 bits a query is a sum of two numbers.
        o_g = tl.arange(0, HEADS)
        p_query = rotated_ptr + (i_row * G + o_g)[:, None] * D + tl.arange(0, D)
        query = tl.load(p_query, mask=(o_g < G)[:, None], other=0.0)  # [16, D]
        if IS_WIDE:
            product = tl.dot(code, tl.trans(query), input_precision="ieee")  # [TOKENS, 16]
        else:
            size = tl.max(tl.abs(query), axis=1)
            size = tl.where(size > 0, size, 1.0)
            query = query / size[:, None]
            high = query.to(tl.float16)
            low = (query - high.to(tl.float32)).to(tl.float16)
            code = code.to(tl.float16)
            product = tl.dot(code, tl.trans(high)) + tl.dot(code, tl.trans(low))
            product = product * size[None, :]
        scale = tl.load(scales_ptr + i_row * capacity + o_t, mask=m_t, other=0.0).to(tl.float32)
        is_lost = m_t & (scale != scale)
        logit = product * scale[:, None]
        logit = tl.where((m_t & (is_lost == 0))[:, None], logit, float("-inf"))  # [TOKENS, 16]

        # Add up by block, then the tile's blocks.
        BLOCKS: tl.constexpr = TOKENS // BLOCK_SIZE
        o_block = i_tile * BLOCKS + tl.arange(0, BLOCKS)
        m_block = o_block < n_blocks
        mark = tl.max(tl.reshape(is_lost.to(tl.int32), [BLOCKS, BLOCK_SIZE]), axis=1)
        mark = tl.where(mark > 0, float("nan"), 0.0)
        tl.store(scores_ptr + i_row * n_blocks + o_block, mark, mask=m_block)
        logit = tl.reshape(logit, [BLOCKS, BLOCK_SIZE, HEADS])
        m = tl.max(logit, axis=1)  # [BLOCKS, 16]
        z = tl.sum(tl.exp(logit - _finite(m)[:, None, :]), axis=1)
        p_block = by_block_ptr + (i_row * n_blocks + o_block)[:, None] * 2 * G + o_g
        mask = m_block[:, None] & (o_g < G)[None, :]
        tl.store(p_block, m, mask=mask)
        tl.store(p_block + G, z, mask=mask)
        top = tl.max(m, axis=0)  # [16]
        p_tile = by_tile_ptr + (i_row * tl.num_programs(0) + i_tile) * 2 * G + o_g
        tl.store(p_tile, top, mask=o_g < G)
        z = tl.sum(z * tl.exp(m - _finite(top)[None, :]), axis=0)
        tl.store(p_tile + G, z, mask=o_g < G)


@triton.jit
def _finite(maximum):
    """The maximum of logits, or 0 where there is none: exp(−∞ − 0) is 0, exp(−∞ + ∞) is not."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _total_kernel(
    by_tile_ptr, lengths_ptr, total_ptr, n_kv_head, n_tiles, G: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Maximum and sum over all tiles of one KV head. Grid: (B·Hkv,). Tile: [64, 16].

    Invariant: z = Σ exp(s − m) over the logits so far, m ≥ each of their maxima.
    """
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(0).to(tl.int64)
    n_used = tl.cdiv(tl.load(lengths_ptr + i_row // n_kv_head), TOKENS)
    o_g, o_tile = tl.arange(0, HEADS), tl.arange(0, 64)
    m = tl.full([HEADS], float("-inf"), tl.float32)
    z = tl.zeros([HEADS], tl.float32)
    for first in range(0, n_used, 64):
        mask = (first + o_tile < n_used)[:, None] & (o_g < G)[None, :]
        p_tile = by_tile_ptr + (i_row * n_tiles + first + o_tile)[:, None] * 2 * G + o_g
        own = tl.load(p_tile, mask=mask, other=float("-inf"))  # [64, 16]
        own_z = tl.load(p_tile + G, mask=mask, other=0.0)
        top = tl.maximum(m, tl.max(own, axis=0))
        safe = _finite(top)
        z = z * tl.exp(m - safe) + tl.sum(own_z * tl.exp(own - safe[None, :]), axis=0)
        m = top
    p_total = total_ptr + i_row * 2 * G + o_g
    tl.store(p_total, _finite(m), mask=o_g < G)
    tl.store(p_total + G, z, mask=o_g < G)


@triton.jit
def _share_kernel(
    by_block_ptr, total_ptr, lengths_ptr, scores_ptr, n_kv_head, n_blocks,
    G: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Scores of BLOCKS blocks of one KV head, from their maxima and sums and the heads' totals.

    Grid: (ceil(M / BLOCKS), B·Hkv). Invariant: every score is written, −∞ past the end.
    """
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    used = tl.cdiv(tl.load(lengths_ptr + i_row // n_kv_head), BLOCK_SIZE)
    o_block, o_g = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, HEADS)
    mask = (o_block < used)[:, None] & (o_g < G)[None, :]
    p_block = by_block_ptr + (i_row * n_blocks + o_block)[:, None] * 2 * G + o_g
    own = tl.load(p_block, mask=mask, other=float("-inf"))  # [BLOCKS, 16]
    own_z = tl.load(p_block + G, mask=mask, other=0.0)
    p_total = total_ptr + i_row * 2 * G + o_g
    m = tl.load(p_total, mask=o_g < G, other=0.0)
    z = tl.load(p_total + G, mask=o_g < G, other=1.0)
    z = tl.where(z == 0, 1.0, z)  # no token has a sketch that is a number
    share = tl.sum(own_z * tl.exp(own - m[None, :]) / z[None, :], axis=1)
    p_score = scores_ptr + i_row * n_blocks + o_block
    mark = tl.load(p_score, mask=o_block < used, other=0.0)
    score = tl.where(o_block < used, mark + share, float("-inf"))
    tl.store(p_score, score, mask=o_block < n_blocks)
