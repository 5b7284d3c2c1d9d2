"""Dense attention of a window on Hopper, whose tensor cores work beside the threads, in Gluon.

It computes what `fast/attention.py`'s dense kernel computes, which is the one to read first. A
rectification is bound by arithmetic, and that kernel lets the tensor cores rest while it takes
exponentials. Here one warp loads tiles of keys and values through the copy engine, and two groups
of four warps, 64 query rows each, take turns: one multiplies while the other is at its softmax.
"""

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
GROUPS = gl.constexpr(2)  # of four warps, in a program
ROWS = gl.constexpr(64)  # query rows of a group
TOKENS = gl.constexpr(128)  # of a tile
STAGES = gl.constexpr(3)  # tiles of keys, and of values, in shared memory
# Registers per thread. The loading warp leaves most of its own to the groups.
REGISTERS, LOADING_REGISTERS, MEAN_REGISTERS = gl.constexpr(240), gl.constexpr(24), 168
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16))
PROGRAM_ROWS = GROUPS.value * ROWS.value


def suits(query: Tensor, n_rows: int) -> bool:
    """Say whether windows [B, Hq, Q, D], of n_rows = Q·G rows, are faster here than portably."""
    is_right = query.dtype != torch.float32 and query.shape[3] in (64, 128) and n_rows > 16
    return is_right and not INTERPRETED and capability(query.device) == (9, 0)


def launch(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, query_lengths: Tensor,
    out: Tensor, lse: Tensor, partial: Tensor, splits: int,
) -> None:  # fmt: skip
    """Write the outputs, or what each of several splits has summed.

    partial [B·Hkv · groups of ROWS rows, splits, ROWS·(D + 2)] float32: acc [ROWS, D], m and z.
    """
    batch, n_kv_head, capacity, head_dim = keys.shape
    group, n_queries = query.shape[1] // n_kv_head, query.shape[2]
    _attend_kernel[(triton.cdiv(n_queries * group, PROGRAM_ROWS), splits, batch * n_kv_head)](
        query, _tiles(keys), _tiles(values), lengths, query_lengths, out, lse, partial,
        n_kv_head, capacity, n_queries, group, head_dim,
        num_warps=4, maxnreg=MEAN_REGISTERS
    )  # fmt: skip


def _tiles(table: Tensor) -> TensorDescriptor:
    """[B, Hkv, T_max, D] as rows of D, which the copy engine loads in tiles of TOKENS rows."""
    rows, tile = table.view(-1, table.shape[3]), [TOKENS.value, table.shape[3]]
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), tile, TILE.value)


@gluon.jit
def _attend_kernel(
    query_ptr, keys, values, lengths_ptr, query_lengths_ptr, out_ptr, lse_ptr, partial_ptr,
    n_kv_head, capacity, n_queries, G: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Attention of GROUPS·ROWS queries of one KV head over one split of the cache.

    Grid: (ceil(Q·G / (GROUPS·ROWS)), splits, B·Hkv). The row tiles of one split are neighbours, so
    that the second finds in the L2 cache what the first has read.
    """
    # Tokens that all rows of this program see, and the few that only some do (`_dense_kernel`).
    i_tile, i_split, i_row = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    n_valid = gl.load(query_lengths_ptr + i_row // n_kv_head)
    start = gl.load(lengths_ptr + i_row // n_kv_head) - n_valid
    q_first = i_tile * (ROWS * GROUPS) // G
    q_last = gl.minimum(((i_tile + 1) * (ROWS * GROUPS) - 1) // G, n_valid - 1)
    has_rows = q_first <= q_last
    seen_by_all = gl.where(has_rows, gl.maximum(start + q_first + 1, 0) // TOKENS, 0)  # tiles
    seen_by_any = gl.where(has_rows, start + q_last + 1, 0)
    share = gl.cdiv(seen_by_all, gl.num_programs(1))
    first = gl.minimum(i_split * share, seen_by_all)
    n_whole = gl.minimum(share, seen_by_all - first)
    n_masked = gl.cdiv(seen_by_any, TOKENS) - seen_by_all
    n_masked = gl.where(i_split == gl.num_programs(1) - 1, n_masked, 0)

    # Tiles in shared memory, and for every place of one a barrier that tells when it is loaded and
    # one that tells when both groups are done with it.
    DTYPE: gl.constexpr = query_ptr.dtype.element_ty
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(DTYPE, [GROUPS, ROWS, D], TILE)
    k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, D], TILE)
    v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, D], TILE)
    k_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_cleaned = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_loaded.index(i), count=1)
        mbarrier.init(v_loaded.index(i), count=1)
        mbarrier.init(k_done.index(i), count=GROUPS)
        mbarrier.init(v_done.index(i), count=GROUPS)
        mbarrier.init(v_cleaned.index(i), count=1)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    # One warp loads, two groups attend.
    tiles = k_tiles, v_tiles, k_loaded, v_loaded, k_done, v_done
    token = (i_row * capacity).to(gl.int32) + first * TOKENS  # the first row in the cache
    loads = keys, values, tiles, token, n_whole + n_masked
    pointers = query_ptr, out_ptr, lse_ptr, partial_ptr
    window = first, n_whole, n_masked, start, n_valid, seen_by_any, n_queries
    shared = queries, tiles, v_cleaned, turns, pointers, window
    gl.warp_specialize([
        (_attend, (gl.constexpr(0), shared, G, D)),
        (_attend, (gl.constexpr(1), shared, G, D)),
        (_load, loads),
    ], [4, 1], [REGISTERS, LOADING_REGISTERS])  # fmt: skip


@gluon.jit
def _load(keys, values, tiles, token, n_tiles):
    """Load tile after tile, each into the place that has been free for longest."""
    k_tiles, v_tiles, k_loaded, v_loaded, k_done, v_done = tiles
    for i in range(n_tiles):
        stage, phase = i % STAGES, i // STAGES & 1
        place = [token + i * TOKENS, 0]
        mbarrier.wait(k_done.index(stage), phase ^ 1)
        mbarrier.expect(k_loaded.index(stage), keys.block_type.nbytes)
        tma.async_copy_global_to_shared(keys, place, k_loaded.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_done.index(stage), phase ^ 1)
        mbarrier.expect(v_loaded.index(stage), values.block_type.nbytes)
        tma.async_copy_global_to_shared(values, place, v_loaded.index(stage), v_tiles.index(stage))


@gluon.jit
def _attend(W: gl.constexpr, shared, G: gl.constexpr, D: gl.constexpr):
    """Attention of the ROWS query rows of group W.

    Invariant: acc = Σ exp(s − m)·v and z = Σ exp(s − m) over the tokens whose values were
    multiplied so far. In the loop, a tile's values are multiplied beside the next one's keys.
    """
    queries, tiles, v_cleaned, turns, pointers, window = shared
    k_tiles, v_tiles, k_loaded, v_loaded, k_done, v_done = tiles
    query_ptr, out_ptr, lse_ptr, partial_ptr = pointers
    first, n_whole, n_masked, start, n_valid, seen_by_any, n_queries = window
    DTYPE: gl.constexpr = query_ptr.dtype.element_ty
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    i_tile, i_split, i_row = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    i_first = (i_tile * GROUPS + W) * ROWS

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
    none = gl.zeros([ROWS, TOKENS], gl.float32, LOGITS)
    if n_whole > 0:
        mbarrier.wait(k_loaded.index(0), 0)
        if W > 0:
            mbarrier.wait(turns.index(W), 0)
        key = k_tiles.index(0).permute((1, 0))
        logit = warpgroup_mma(query, key, none, use_acc=False, is_async=True)
        mbarrier.arrive(turns.index(1 - W), count=1)
        logit = warpgroup_mma_wait(0, deps=(logit,))
        mbarrier.arrive(k_done.index(0), count=1)
        weight, m, z, decay = _weigh(logit, m, z, D)
        weight = gl.convert_layout(weight.to(DTYPE), WEIGHTS)
        for i in range(1, n_whole):
            # Issue both products in this group's turn, then pass it on.
            stage, phase = i % STAGES, i // STAGES & 1
            before, phase_before = (i - 1) % STAGES, (i - 1) // STAGES & 1
            mbarrier.wait(k_loaded.index(stage), phase)
            mbarrier.wait(turns.index(W), (i if W > 0 else i - 1) & 1)
            key = k_tiles.index(stage).permute((1, 0))
            logit = warpgroup_mma(query, key, none, use_acc=False, is_async=True)
            mbarrier.wait(v_loaded.index(before), phase_before)
            acc = warpgroup_mma(weight, v_tiles.index(before), acc, is_async=True)
            mbarrier.arrive(turns.index(1 - W), count=1)

            # The softmax of this tile beside the product of the one before.
            logit = warpgroup_mma_wait(1, deps=(logit,))
            mbarrier.arrive(k_done.index(stage), count=1)
            next_weight, m, z, decay = _weigh(logit, m, z, D)
            next_weight = gl.convert_layout(next_weight.to(DTYPE), WEIGHTS)
            # This waits for nothing. Without its branch the compiler moves the wait for the product
            # before the softmax.
            mbarrier.wait(v_loaded.index(before), phase_before)
            acc, weight = warpgroup_mma_wait(0, deps=(acc, next_weight))
            mbarrier.arrive(v_done.index(before), count=1)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]
        before = (n_whole - 1) % STAGES
        mbarrier.wait(v_loaded.index(before), (n_whole - 1) // STAGES & 1)
        acc = warpgroup_mma(weight, v_tiles.index(before), acc)
        mbarrier.arrive(v_done.index(before), count=1)

    # The last split adds the few tokens that only some rows see.
    o_s = i_first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
    for j in range(n_masked):
        i = n_whole + j
        stage, phase = i % STAGES, i // STAGES & 1
        token = (first + i) * TOKENS
        mbarrier.wait(k_loaded.index(stage), phase)
        logit = warpgroup_mma(query, k_tiles.index(stage).permute((1, 0)), none, use_acc=False)
        mbarrier.arrive(k_done.index(stage), count=1)
        position = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LOGITS))
        is_visible = position[None, :] <= (start + o_s // G)[:, None]
        is_visible = is_visible & (o_s // G < n_valid)[:, None]
        weight, m, z, decay = _weigh(gl.where(is_visible, logit, float("-inf")), m, z, D)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, SUMS))[:, None]

        # A hidden value may be NaN, and 0 · NaN is NaN: the first group sets it to 0 for both.
        mbarrier.wait(v_loaded.index(stage), phase)
        if W == 0:
            value = v_tiles.index(stage).load(MEMORY)
            position = token + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, MEMORY))
            v_tiles.index(stage).store(gl.where((position < seen_by_any)[:, None], value, 0.0))
            fence_async_shared()
            mbarrier.arrive(v_cleaned.index(stage), count=1)
        else:
            mbarrier.wait(v_cleaned.index(stage), j // STAGES & 1)
        weight = gl.convert_layout(weight.to(DTYPE), WEIGHTS)
        acc = warpgroup_mma(weight, v_tiles.index(stage), acc)
        mbarrier.arrive(v_done.index(stage), count=1)

    # Rows past the window have run along in the loop without a mask: forget what they summed.
    z = gl.where(o_s // G < n_valid, z, 0.0)
    o_r = i_first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    o_d = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    acc = gl.where((o_r // G < n_valid)[:, None], acc, 0.0)
    if gl.num_programs(1) > 1:
        i_part = (i_row * gl.num_programs(0) + i_tile) * GROUPS + W
        i_part = i_part * gl.num_programs(1) + i_split
        p_part = partial_ptr + i_part * ROWS * (D + 2)
        gl.store(p_part + (o_r - i_first)[:, None] * D + o_d[None, :], acc)
        gl.store(p_part + ROWS * D + o_s - i_first, m)
        gl.store(p_part + ROWS * (D + 1) + o_s - i_first, z)
    else:
        total = gl.where(z == 0, 1.0, z)  # nothing visible: 0 and −∞
        lse = gl.where(z == 0, float("-inf"), m * D**-0.5 + gl.log(total))
        p_lse = lse_ptr + (i_row * G + o_s % G) * n_queries + o_s // G
        gl.store(p_lse, lse, mask=o_s // G < n_queries)
        acc = acc / gl.convert_layout(total, gl.SliceLayout(1, SUMS))[:, None]
        p_out = out_ptr + ((i_row * G + o_r % G) * n_queries + o_r // G)[:, None] * D + o_d[None, :]
        gl.store(p_out, acc.to(DTYPE), mask=(o_r // G < n_queries)[:, None])


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
