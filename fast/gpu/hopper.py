"""Dense attention of a window on Hopper, whose tensor cores work beside the threads, in Gluon.

It computes what `fast/attention.py`'s dense kernel computes, which is the one to read first. A
rectification is bound by arithmetic, and that kernel lets the tensor cores rest while it takes
exponentials. Here one warp loads tiles of keys and values through the copy engine, and two groups
of four warps, 64 query rows each, take turns: one multiplies while the other is at its softmax.

Warps meet at barriers. A barrier counts the phases that have ended, and shows the last bit of that
number. To wait for phase 0, 1, 2, … is to wait for the bits 0, 1, 0, …: right as long as nobody
falls two phases behind.
"""

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import capability
from .limits import INTERPRETED

LOG2_E = gl.constexpr(1.4426950408889634)
GROUPS = gl.constexpr(2)  # of four warps; not a choice, turns are taken by two
ROWS = gl.constexpr(64)  # query rows of a group
PROGRAM_ROWS = gl.constexpr(128)
TOKENS = gl.constexpr(128)  # of a tile
WIDTH = gl.constexpr(64)  # channels of a token that lie next to each other in a slot, 128 bytes
STAGES = gl.constexpr(3)  # tiles in shared memory, each a slot of keys and a slot of values
# Registers per thread. The loading warp leaves most of its own to the groups. It counts as a group:
# 168 is the mean of 240, 240 and 24.
REGISTERS, LOADING_REGISTERS, MEAN_REGISTERS = gl.constexpr(240), gl.constexpr(24), 168
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16))
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # 3.9 renamed it


def suits(query: Tensor, n_rows: int, page_size: int = 0) -> bool:
    """Say whether windows [B, Hq, Q, D], of n_rows = Q·G rows, are faster here than portably."""
    fits = query.dtype != torch.float32 and query.shape[3] in (64, 128) and n_rows > 16
    return fits and page_size % 8 == 0 and not INTERPRETED and capability(query.device) == (9, 0)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor | None,
    sizes: tuple[int, int, int, int], lengths: Tensor, query_lengths: Tensor, out: Tensor,
    lse: Tensor, splits: int,
) -> Tensor:  # fmt: skip
    """Write the outputs, or return what each of several splits has summed.

    sizes: B, Hkv, T_max and the page size, 0 without pages.

    The sums are [B·Hkv · groups of ROWS rows, splits, ROWS·(D + 2)] float32: acc [ROWS, D], m and
    z.
    """
    (batch, n_kv_head, capacity, page_size), head_dim = sizes, keys.shape[3]
    group, n_queries, rows = query.shape[1] // n_kv_head, query.shape[2], batch * n_kv_head
    n_tiles = triton.cdiv(n_queries * group, PROGRAM_ROWS.value)
    n_parts = rows * n_tiles * GROUPS.value if splits > 1 else 0
    shape = n_parts, splits, ROWS.value * (head_dim + 2)
    partial = query.new_empty(shape, dtype=torch.float32)
    # What lies in one piece: a tile of a cache, or a page's part of a tile.
    piece = math.gcd(page_size, TOKENS.value) if page_size else TOKENS.value
    _attend_kernel[(n_tiles, splits, rows)](
        query, pieces_of(keys, piece), pieces_of(values, piece), table, lengths, query_lengths, out,
        lse, partial, n_kv_head, capacity, n_queries, group, head_dim, page_size, piece,
        num_warps=4, maxnreg=MEAN_REGISTERS
    )  # fmt: skip
    return partial


def pieces_of(cache: Tensor, n_rows: int) -> TensorDescriptor:
    """[B, Hkv, T_max, D] as rows of D, which the copy engine loads in pieces of n_rows rows.

    Shared memory holds a tile WIDTH channels at a time. So a piece that is not a whole tile has so
    many.
    """
    rows = cache.view(-1, cache.shape[3])
    piece = [n_rows, cache.shape[3] if n_rows == TOKENS.value else WIDTH.value]
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), piece, TILE.value)


@gluon.jit(do_not_specialize=["n_queries", "n_kv_head"])
def _attend_kernel(
    query_ptr, keys, values, table_ptr, lengths_ptr, query_lengths_ptr, out_ptr, lse_ptr,
    partial_ptr, n_kv_head, capacity, n_queries, G: gl.constexpr, D: gl.constexpr,
    PAGE: gl.constexpr, PIECE: gl.constexpr
):  # fmt: skip
    """Attention of PROGRAM_ROWS queries of one KV head over one split of the cache.

    Grid: (ceil(Q·G / PROGRAM_ROWS), splits, B·Hkv). The row tiles of one split are neighbours, so
    that the second finds in the L2 cache what the first has read.
    """
    # Slots for tiles in shared memory. A barrier tells when a slot is loaded, one when both groups
    # are done with it, and one when its last values are free of NaN. Two give the groups their
    # turns.
    DTYPE: gl.constexpr = query_ptr.dtype.element_ty
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(DTYPE, [GROUPS, ROWS, D], TILE)
    WIDE: gl.constexpr = D if PIECE == TOKENS else WIDTH
    N_PIECES: gl.constexpr = TOKENS // PIECE * (D // WIDE)  # of a tile
    pieces = gl.allocate_shared_memory(DTYPE, [2 * STAGES * N_PIECES, PIECE, WIDE], TILE)
    slots = pieces._reinterpret(DTYPE, [2 * STAGES, TOKENS, D], TILE)
    loaded = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    done = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    cleaned = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(done.index(i), count=GROUPS)
        mbarrier.init(cleaned.index(i), count=1)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    # One warp loads, two groups attend.
    start, n_valid, first, n_whole, n_masked = _share(lengths_ptr, query_lengths_ptr, n_kv_head, G)
    place = table_ptr, n_kv_head, capacity, start + n_valid
    memory = queries, slots, loaded, done, cleaned, turns
    pointers = query_ptr, lengths_ptr, query_lengths_ptr, out_ptr, lse_ptr, partial_ptr
    gl.warp_specialize([
        (_attend_group, (gl.constexpr(0), memory, pointers, n_kv_head, n_queries, G, D)),
        (_attend_group, (gl.constexpr(1), memory, pointers, n_kv_head, n_queries, G, D)),
        (_load_tiles, (
            keys, values, pieces, loaded, done, place, first, n_whole + n_masked, N_PIECES, PAGE
        )),
    ], [4, 1], [REGISTERS, LOADING_REGISTERS])  # fmt: skip


@gluon.jit
def _row_tile():
    """This program's rows. The last come first: in a prompt they see most, and take longest."""
    return gl.num_programs(0) - 1 - gl.program_id(0)


@gluon.jit
def _share(lengths_ptr, query_lengths_ptr, n_kv_head, G: gl.constexpr):
    """The window's first position and valid queries, and this program's tiles of the cache.

    These are its first tile, the number of tiles that all its rows see, shared among the splits,
    and, for the last split, the one or two after them that only some see.
    """
    i_tile, i_split, i_row = _row_tile(), gl.program_id(1), gl.program_id(2)
    n_valid = gl.load(query_lengths_ptr + i_row // n_kv_head)
    start = gl.load(lengths_ptr + i_row // n_kv_head) - n_valid
    q_first = i_tile * PROGRAM_ROWS // G
    q_last = gl.minimum(((i_tile + 1) * PROGRAM_ROWS - 1) // G, n_valid - 1)
    has_rows = q_first <= q_last
    n_seen = gl.where(has_rows, gl.cdiv(gl.maximum(start + q_last + 1, 0), TOKENS), 0)
    n_seen_by_all = gl.where(has_rows, gl.maximum(start + q_first + 1, 0) // TOKENS, 0)
    share = gl.cdiv(n_seen_by_all, gl.num_programs(1))
    first = gl.minimum(i_split * share, n_seen_by_all)
    n_whole = gl.minimum(share, n_seen_by_all - first)
    is_last = i_split == gl.num_programs(1) - 1
    return start, n_valid, first, n_whole, gl.where(is_last, n_seen - n_seen_by_all, 0)


@gluon.jit
def _slot(i):
    """The slot of tile i's keys, before that of its values, and its barriers' phase, 0 or 1."""
    return i % STAGES * 2, i // STAGES & 1


@gluon.jit
def _load_tiles(
    keys, values, pieces, loaded, done, place, first, n_tiles, N_PIECES: gl.constexpr,
    PAGE: gl.constexpr
):  # fmt: skip
    """Load tile after tile, each into the slots that were loaded longest ago.

    A slot is free when its tile before this one is done with: one phase earlier. A new barrier
    passes as one whose phase 1 has ended.
    """
    BYTES: gl.constexpr = N_PIECES * keys.block_type.nbytes
    for i in range(n_tiles):
        slot, phase = _slot(i)
        rows = _rows_of(place, (first + i) * TOKENS, keys.block_type.shape[0], PAGE)
        mbarrier.wait(done.index(slot), phase ^ 1)
        mbarrier.expect(loaded.index(slot), BYTES)
        _load_tile(keys, rows, loaded.index(slot), pieces, slot * N_PIECES, N_PIECES)
        mbarrier.wait(done.index(slot + 1), phase ^ 1)
        mbarrier.expect(loaded.index(slot + 1), BYTES)
        _load_tile(values, rows, loaded.index(slot + 1), pieces, (slot + 1) * N_PIECES, N_PIECES)


@gluon.jit
def _rows_of(place, token, PIECE: gl.constexpr, PAGE: gl.constexpr):
    """The row of a cache, or of a pool, at which each piece of a tile begins.

    Pieces past the sequence's length may be any page's.
    """
    table_ptr, n_kv_head, capacity, length = place
    i_row = gl.program_id(2)
    rows = ()
    for j in gl.static_range(TOKENS // PIECE):
        position = token + j * PIECE
        if PAGE == 0:
            row = (i_row.to(gl.int64) * capacity + position).to(gl.int32)
        else:
            p_page = table_ptr + i_row // n_kv_head * (capacity // PAGE) + position // PAGE
            page = gl.load(p_page, mask=position < length, other=0)
            row = (page * n_kv_head + i_row % n_kv_head) * PAGE + position % PAGE
        rows += (row,)
    return rows


@gluon.jit
def _load_tile(cache, rows, loaded, pieces, i_piece, N_PIECES: gl.constexpr):
    """Load a tile's pieces, those of its first WIDTH channels before those of the others."""
    N_ROWS: gl.constexpr = len(rows)
    for j in gl.static_range(N_PIECES):
        i_channel = j // N_ROWS * cache.block_type.shape[1]
        copy_tile(cache, [rows[j % N_ROWS], i_channel], loaded, pieces.index(i_piece + j))


@gluon.jit
def _attend_group(
    W: gl.constexpr, memory, pointers, n_kv_head, n_queries, G: gl.constexpr, D: gl.constexpr
):
    """Attention of the ROWS query rows of group W.

    Invariant of the loop: z = Σ exp(s − m) over the tiles before the i-th, m their largest logit s.
    acc = Σ exp(s − m)·v lacks the last of them, whose exp(s − m) is `weight`.
    """
    queries, slots, loaded, done, cleaned, turns = memory
    query_ptr, lengths_ptr, query_lengths_ptr, out_ptr, lse_ptr, partial_ptr = pointers
    DTYPE: gl.constexpr = query_ptr.dtype.element_ty
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    start, n_valid, first, n_whole, n_masked = _share(lengths_ptr, query_lengths_ptr, n_kv_head, G)
    i_row = gl.program_id(2).to(gl.int64)
    i_first = _row_tile() * PROGRAM_ROWS + W * ROWS

    # The queries.
    o_r = i_first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, MEMORY))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, MEMORY))
    p_query = query_ptr + ((i_row * G + o_r % G) * n_queries + o_r // G)[:, None] * D + o_d[None, :]
    query = queries.index(W)
    query.store(gl.load(p_query, mask=(o_r // G < n_valid)[:, None], other=0.0))
    fence_async_shared()

    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    z = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    acc = gl.zeros([ROWS, D], gl.float32, SUMS)
    unused = gl.zeros([ROWS, TOKENS], gl.float32, LOGITS)
    if n_whole > 0:
        # The first tile's weights. Group 0 begins, so group 1 waits for one turn more.
        mbarrier.wait(loaded.index(0), 0)
        if W == 1:
            mbarrier.wait(turns.index(1), 0)
        key_t = slots.index(0).permute((1, 0))
        logit = warpgroup_mma(query, key_t, unused, use_acc=False, is_async=True)
        mbarrier.arrive(turns.index(1 - W), count=1)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        mbarrier.arrive(done.index(0), count=1)
        weight, m, z, decay = _weigh(logit, m, z, D)
        weight = gl.convert_layout(weight.to(DTYPE), WEIGHTS)
        for i in range(1, n_whole):
            # Issue both products in this group's turn, then pass it on.
            slot, phase = _slot(i)
            before, phase_before = _slot(i - 1)
            mbarrier.wait(loaded.index(before + 1), phase_before)
            mbarrier.wait(loaded.index(slot), phase)
            mbarrier.wait(turns.index(W), (i - 1 + W) & 1)
            key_t = slots.index(slot).permute((1, 0))
            logit = warpgroup_mma(query, key_t, unused, use_acc=False, is_async=True)
            acc = warpgroup_mma(weight, slots.index(before + 1), acc, is_async=True)
            mbarrier.arrive(turns.index(1 - W), count=1)

            # The softmax of this tile beside the product of the one before.
            logit = warpgroup_mma_wait(1, deps=(logit,))
            mbarrier.arrive(done.index(slot), count=1)
            next_weight, m, z, decay = _weigh(logit, m, z, D)
            next_weight = gl.convert_layout(next_weight.to(DTYPE), WEIGHTS)
            # Passed before. The branch of this wait keeps the compiler from moving the next one
            # ahead of the softmax.
            mbarrier.wait(loaded.index(before + 1), phase_before)
            acc, weight = warpgroup_mma_wait(0, deps=(acc, next_weight))
            mbarrier.arrive(done.index(before + 1), count=1)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
        slot, phase = _slot(n_whole - 1)
        mbarrier.wait(loaded.index(slot + 1), phase)
        acc = warpgroup_mma(weight, slots.index(slot + 1), acc)
        mbarrier.arrive(done.index(slot + 1), count=1)

    # The tokens that only some rows see.
    o_q = (i_first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))) // G
    for i in range(n_whole, n_whole + n_masked):
        slot, phase = _slot(i)
        mbarrier.wait(loaded.index(slot), phase)
        logit = warpgroup_mma(query, slots.index(slot).permute((1, 0)), unused, use_acc=False)
        mbarrier.arrive(done.index(slot), count=1)
        token = (first + i) * TOKENS
        position = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LOGITS))
        is_visible = (position[None, :] <= (start + o_q)[:, None]) & (o_q < n_valid)[:, None]
        weight, m, z, decay = _weigh(gl.where(is_visible, logit, float("-inf")), m, z, D)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]

        mbarrier.wait(loaded.index(slot + 1), phase)
        _clean(W, slots.index(slot + 1), cleaned.index(slot + 1), start + n_valid - token, MEMORY)
        weight = gl.convert_layout(weight.to(DTYPE), WEIGHTS)
        acc = warpgroup_mma(weight, slots.index(slot + 1), acc)
        mbarrier.arrive(done.index(slot + 1), count=1)
    _store(m, z, acc, out_ptr, lse_ptr, partial_ptr, i_row, i_first, n_valid, n_queries, G)


@gluon.jit
def _weigh(logit, m, z, D: gl.constexpr):
    """One step of the running softmax, without the values: weights, m, z and acc's decay.

    The logits' scale stays outside of them, as in `fast/attention.py`.
    """
    SCALE: gl.constexpr = D**-0.5 * LOG2_E
    m_next = gl.maximum(m, gl.max(logit, axis=1))
    m_safe = gl.where(m_next == float("-inf"), 0.0, m_next)  # −∞ − −∞ would be NaN
    weight = gl.exp2((logit - m_safe[:, None]) * SCALE)
    decay = gl.exp2((m - m_safe) * SCALE)
    return weight, m_next, z * decay + gl.sum(weight, axis=1), decay


@gluon.jit
def _clean(W: gl.constexpr, values, cleaned, n_tokens, MEMORY: gl.constexpr):
    """Set values from the n_tokens-th on to 0: they may be NaN, and 0 · NaN is NaN.

    Group 0 does it, the other waits. A slot is cleaned once at most: its barrier has one phase.
    """
    if W == 0:
        o_t = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, MEMORY))
        values.store(gl.where((o_t < n_tokens)[:, None], values.load(MEMORY), 0.0))
        fence_async_shared()
        mbarrier.arrive(cleaned, count=1)
    else:
        mbarrier.wait(cleaned, 0)


@gluon.jit
def _store(
    m, z, acc, out_ptr, lse_ptr, partial_ptr, i_row, i_first, n_valid, n_queries, G: gl.constexpr
):
    """Store rows i_first … i_first + ROWS − 1 of a KV head's window, or a split's sums of them."""
    D: gl.constexpr = acc.shape[1]
    LOGIT_ROWS: gl.constexpr = m.type.layout
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    o_m, o_r = gl.arange(0, ROWS, layout=LOGIT_ROWS), gl.arange(0, ROWS, layout=SUM_ROWS)
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, acc.type.layout))

    # Rows past the window have run along in the loop without a mask: forget what they summed.
    z = gl.where((i_first + o_m) // G < n_valid, z, 0.0)
    acc = gl.where(((i_first + o_r) // G < n_valid)[:, None], acc, 0.0)
    if gl.num_programs(1) > 1:
        i_part = (i_row * gl.num_programs(0) * PROGRAM_ROWS + i_first) // ROWS
        p_part = partial_ptr + (i_part * gl.num_programs(1) + gl.program_id(1)) * ROWS * (D + 2)
        gl.store(p_part + o_r[:, None] * D + o_d[None, :], acc)
        gl.store(p_part + ROWS * D + o_m, m)
        gl.store(p_part + ROWS * (D + 1) + o_m, z)
    else:
        total = gl.where(z == 0, 1.0, z)  # nothing visible: 0 and −∞
        lse = gl.where(z == 0, float("-inf"), m * D**-0.5 + gl.log(total))
        acc = acc / gl.convert_layout(total, SUM_ROWS)[:, None]
        o_m, o_r = i_first + o_m, i_first + o_r
        p_lse = lse_ptr + (i_row * G + o_m % G) * n_queries + o_m // G
        gl.store(p_lse, lse, mask=o_m // G < n_queries)
        p_out = out_ptr + ((i_row * G + o_r % G) * n_queries + o_r // G)[:, None] * D + o_d[None, :]
        out = acc.to(out_ptr.dtype.element_ty)
        gl.store(p_out, out, mask=(o_r // G < n_queries)[:, None])
