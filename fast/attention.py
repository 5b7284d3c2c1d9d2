"""Exact softmax attention over a part of the cache, in Triton: selected blocks (eq. 2), or all a window may see.

Unlike the reference, which gathers what is visible and applies one softmax, both kernels walk over the tokens with a
running maximum and sum, and share one sequence's tokens among several programs (*splits*), because a batch has fewer
heads than the GPU has multiprocessors. Each split leaves its sums in memory; the one that arrives last merges them
(law 4), always in the same order, so that reruns give the same bits.

The public functions check their arguments, which waits for the device. The `enqueue_…` functions behind them only
launch, so that the decode loop can capture them in a CUDA graph.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resa.reference.checks import (
    INTEGERS,
    bind_shapes,
    check_dtypes,
    check_heads,
    check_lengths,
    is_integer,
    require,
)

from .checks import INTERPRETED, check_kernel_dtypes, check_layout, check_sizes
from .launch import let_next_start, overlapped, wait_for_previous

LOG2_E = tl.constexpr(1.4426950408889634)
MERGED_AT_ONCE = tl.constexpr(4)
GROUP_ROWS = 16  # query heads of a group, padded to the fewest rows of a matrix product


def sparse_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    lengths: Tensor,
    block_size: int,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one query per sequence over the valid tokens of its selected blocks (eq. 2).

    query [B, Hq, D], keys and values [B, Hkv, T_max, D], indices [B, Hkv, N] with −1 for nothing, lengths [B]
    → out [B, Hq, D] in the query's dtype and, if asked, lse [B, Hq] float32: the natural log-sum-exp of the logits
    scaled by D**-0.5. The G heads of a group share one selection. No visible token gives zeros and −∞. Values of
    valid tokens must be finite. Raises `ValueError` for arguments that do not fit together or that the kernels do
    not support.
    """
    sizes = bind_shapes(
        query=(query, "B Hq D"),
        keys=(keys, "B Hkv T_max D"),
        values=(values, "B Hkv T_max D"),
        indices=(indices, "B Hkv N"),
        lengths=(lengths, "B"),
    )
    check_heads(sizes["Hq"], sizes["Hkv"])
    check_kernel_dtypes(query=query, keys=keys, values=values)
    check_dtypes(INTEGERS, indices=indices)
    check_lengths("lengths", lengths, sizes["T_max"])
    require(is_integer(block_size, 1), "block_size", block_size, "an integer ≥ 1")
    check_sizes(D=sizes["D"], G=sizes["Hq"] // sizes["Hkv"], block_size=block_size, rows=sizes["B"] * sizes["Hkv"])
    check_layout(keys=keys, values=values)
    indices = indices.clamp(-1, sizes["T_max"]).to(torch.int32).contiguous()  # far past the end is past the end
    query, lengths = query.contiguous(), lengths.to(torch.int32).contiguous()
    counts = torch.full_like(lengths, sizes["N"])  # −1 may stand anywhere, so every entry is looked at
    arrivals = torch.zeros(sizes["B"] * sizes["Hkv"], dtype=torch.int32, device=query.device)
    out, lse = enqueue_sparse(query, keys, values, indices, counts, lengths, block_size, arrivals)
    return (out, lse) if return_lse else out


def enqueue_sparse(
    query: Tensor, keys: Tensor, values: Tensor, indices: Tensor, counts: Tensor, lengths: Tensor,
    block_size: int, arrivals: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_attention` without its checks, over the first counts[s] ≤ N indices of each sequence's lists.

    counts [B] int32. arrivals [≥ B·Hkv] int32 must be zeros; the kernel leaves zeros behind. The query and the lengths
    must not come from the kernel right before this one, which starts before that has ended.
    """
    batch, kv_heads, capacity, head_dim = keys.shape
    group, rows = query.shape[1] // kv_heads, batch * kv_heads
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    if out.numel():
        width, tokens = indices.shape[2], min(256, 32768 // (head_dim * keys.element_size()))
        iterations = triton.cdiv(width * block_size, tokens)
        # A pipeline pays when it stays filled for a while; before that, two programs hide each other's latency better.
        is_short = rows * iterations <= 4 * count_processors(query.device)
        stages, resident = (1, 2) if is_short else (3, 1)
        splits = count_splits(rows, resident, iterations, query.device)
        partial = query.new_empty(rows, splits, GROUP_ROWS * (head_dim + 2), dtype=torch.float32)
        _sparse_kernel[(splits, kv_heads, batch)](
            query, keys, values, indices, counts, lengths, out, lse, partial, arrivals, capacity, width,
            group, head_dim, block_size, tokens, num_warps=4, num_stages=stages, **overlapped(query.device),
        )  # fmt: skip
    return out, lse


def count_splits(programs: int, resident: int, iterations: int, device: torch.device) -> int:
    """In how many splits `programs` fill the GPU once, with `resident` of them on each multiprocessor."""
    return max(1, min(count_processors(device) * resident // programs, iterations))


@cache
def count_processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a few for the interpreter, which has none, so that there are splits to merge."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _sparse_kernel(
    query_ptr, keys_ptr, values_ptr, indices_ptr, counts_ptr, lengths_ptr, out_ptr, lse_ptr, partial_ptr, arrivals_ptr,
    capacity, width, G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Attention of the G heads of one KV head over one split of its list of blocks.

    Grid: (splits, Hkv, B). Tiles: queries [16, D], keys and values [TOKENS, D], several blocks or part of one.
    Invariant: acc = Σ exp(s − m)·v and z = Σ exp(s − m) over the visible tokens so far, m their largest logit s
    (all zero and −∞ before the first). Nothing branches on an index: −1 and what lies past the end load zeros and
    weigh exp(−∞).
    """
    i_row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + tl.program_id(2))
    total = tl.cdiv(length, BLOCK_SIZE)
    o_g, o_d, o_t = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, TOKENS)
    m_g = o_g < G
    query = tl.load(query_ptr + (i_row * G + o_g)[:, None] * D + o_d, mask=m_g[:, None], other=0.0)  # [16, D]
    count = tl.load(counts_ptr + tl.program_id(2))
    share = tl.cdiv(count, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, count)
    m = tl.full([16], float("-inf"), tl.float32)
    z = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, D], tl.float32)
    wait_for_previous()  # for the indices; the query and the lengths are older than the kernel before this one
    let_next_start()
    for start in range(first * BLOCK_SIZE, last * BLOCK_SIZE, TOKENS):
        o_entry = (start + o_t) // BLOCK_SIZE  # [TOKENS]
        block = tl.load(indices_ptr + i_row * width + o_entry, mask=o_entry < last, other=-1)
        is_block = (block >= 0) & (block < total)
        position = tl.where(is_block, block, 0) * BLOCK_SIZE + (start + o_t) % BLOCK_SIZE  # fits 32 bits
        is_visible = is_block & (position < length)
        o_token = (i_row * capacity + position)[:, None] * D + o_d  # [TOKENS, D]
        key = tl.load(keys_ptr + o_token, mask=is_visible[:, None], other=0.0)
        value = tl.load(values_ptr + o_token, mask=is_visible[:, None], other=0.0)
        m, z, acc = _attend(query, key, value, is_visible[None, :], True, m, z, acc)
    o_out = i_row * G + o_g
    _finish(m, z, acc, partial_ptr, arrivals_ptr, i_row, out_ptr, lse_ptr, o_out, m_g)


@triton.jit
def _attend(query, key, value, is_visible, MASKED: tl.constexpr, m, z, acc):
    """One step of the running softmax: query [R, D], key and value [TOKENS, D], is_visible [R or 1, TOKENS].

    The logits' scale stays outside of them: m is the largest product q·k.
    """
    SCALE: tl.constexpr = query.shape[1] ** -0.5
    product = tl.dot(query, tl.trans(key), input_precision="ieee")  # [R, TOKENS]
    if MASKED:
        product = tl.where(is_visible, product, float("-inf"))
    m_next = tl.maximum(m, tl.max(product, axis=1))
    m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)  # −∞ − −∞ would be NaN
    weight = tl.exp2((product - m_safe[:, None]) * (SCALE * LOG2_E))
    decay = tl.exp2((m - m_safe) * (SCALE * LOG2_E))
    z = z * decay + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision="ieee")
    return m_next, z, acc


@triton.jit
def _finish(m, z, acc, partial_ptr, arrivals_ptr, i_unit, out_ptr, lse_ptr, o_out, m_out):
    """Write the output rows o_out [R] of unit i_unit, once all its splits (grid axis 0) have arrived.

    partial holds, per unit and split, acc [R, D], m [R] and z [R]. Invariant: the count of arrivals is zero before and
    after.
    """
    R: tl.constexpr = acc.shape[0]
    D: tl.constexpr = acc.shape[1]
    o_r, o_d = tl.arange(0, R), tl.arange(0, D)
    splits = tl.num_programs(0)
    is_last = True
    if splits > 1:
        p_split = partial_ptr + (i_unit * splits + tl.program_id(0)) * R * (D + 2)
        tl.store(p_split + o_r[:, None] * D + o_d, acc, mask=m_out[:, None])
        tl.store(p_split + R * D + o_r, m, mask=m_out)
        tl.store(p_split + R * (D + 1) + o_r, z, mask=m_out)
        tl.debug_barrier()  # every thread's part is written before one of them reports it
        is_last = tl.atomic_add(arrivals_ptr + i_unit, 1, sem="acq_rel") == splits - 1
        if is_last:
            m, z, acc = _merge(partial_ptr + i_unit * splits * R * (D + 2), splits, m_out, R, D)
            tl.store(arrivals_ptr + i_unit, 0)
    if is_last:
        total = tl.where(z == 0, 1.0, z)  # nothing visible: 0 and −∞
        lse = tl.where(z == 0, float("-inf"), m * D**-0.5 + tl.log(total))
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + o_out[:, None] * D + o_d, out, mask=m_out[:, None])
        tl.store(lse_ptr + o_out, lse, mask=m_out)


@triton.jit
def _merge(partial_ptr, splits, m_out, R: tl.constexpr, D: tl.constexpr):
    """The splits' m, z and acc as those of the whole; empty splits weigh nothing.

    Merged by m and z apart, not by their log-sum-exp: where logits are huge, that has no digits left for z.
    """
    o_r, o_d = tl.arange(0, R), tl.arange(0, D)
    m = tl.full([R], float("-inf"), tl.float32)
    z = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, D], tl.float32)
    for base in range(0, splits, MERGED_AT_ONCE):
        for i in tl.static_range(MERGED_AT_ONCE):  # unrolled, so that their loads wait together
            m_row = m_out & (base + i < splits)
            p_split = partial_ptr + (base + i) * R * (D + 2)
            # .cg reads the shared cache: another multiprocessor wrote this a moment ago.
            acc_i = tl.load(p_split + o_r[:, None] * D + o_d, mask=m_row[:, None], other=0.0, cache_modifier=".cg")
            m_i = tl.load(p_split + R * D + o_r, mask=m_row, other=float("-inf"), cache_modifier=".cg")
            z_i = tl.load(p_split + R * (D + 1) + o_r, mask=m_row, other=0.0, cache_modifier=".cg")
            m_next = tl.maximum(m, m_i)
            m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
            decay = tl.exp2((m - m_safe) * (D**-0.5 * LOG2_E))
            decay_i = tl.exp2((m_i - m_safe) * (D**-0.5 * LOG2_E))
            z = z * decay + z_i * decay_i
            acc = acc * decay[:, None] + acc_i * decay_i[:, None]
            m = m_next
    return m, z, acc


def dense_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    query_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of a window of queries, the newest tokens of each sequence, over its whole cache.

    query [B, Hq, Q, D], keys and values [B, Hkv, T_max, D], lengths [B] (the window's own tokens included),
    query_lengths [B] (default Q) → out [B, Hq, Q, D] in the query's dtype and, if asked, lse [B, Hq, Q] float32.
    Query i of sequence s stands at position lengths[s] − query_lengths[s] + i and sees the keys up to and including
    that position. Rows at or past query_lengths[s], or at negative positions, give zeros and −∞. Values of valid
    tokens must be finite. Raises `ValueError` for arguments that do not fit together or that the kernels do not
    support.
    """
    sizes = bind_shapes(
        query=(query, "B Hq Q D"),
        keys=(keys, "B Hkv T_max D"),
        values=(values, "B Hkv T_max D"),
        lengths=(lengths, "B"),
    )
    if query_lengths is None:
        query_lengths = torch.full_like(lengths, sizes["Q"])
    bind_shapes(lengths=(lengths, "B"), query_lengths=(query_lengths, "B"))
    check_heads(sizes["Hq"], sizes["Hkv"])
    check_kernel_dtypes(query=query, keys=keys, values=values)
    check_lengths("lengths", lengths, sizes["T_max"])
    check_lengths("query_lengths", query_lengths, sizes["Q"])
    check_sizes(D=sizes["D"], G=sizes["Hq"] // sizes["Hkv"], rows=sizes["B"] * sizes["Hkv"])
    check_layout(keys=keys, values=values)
    for argument, tensor in (("keys", keys), ("values", values)):  # the copy engine's tiles begin at multiples of 16
        require(tensor.data_ptr() % 16 == 0, argument, f"address {tensor.data_ptr():#x}", "one divisible by 16")
    lengths, query_lengths = (x.to(torch.int32).contiguous() for x in (lengths, query_lengths))
    units = count_dense_units(keys, sizes["Hq"] // sizes["Hkv"], sizes["Q"])
    arrivals = torch.zeros(units, dtype=torch.int32, device=query.device)
    out, lse = enqueue_dense(query.contiguous(), keys, values, lengths, query_lengths, arrivals)
    return (out, lse) if return_lse else out


def count_dense_units(keys: Tensor, group: int, n_queries: int) -> int:
    """How many arrival counters `enqueue_dense` needs: one per KV head and tile of query rows."""
    batch, kv_heads, _, head_dim = keys.shape
    rows, *_ = dense_tile(head_dim, keys.element_size(), n_queries * group)
    return batch * kv_heads * triton.cdiv(n_queries * group, rows)


def enqueue_dense(
    query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, query_lengths: Tensor, arrivals: Tensor
) -> tuple[Tensor, Tensor]:
    """`dense_attention` without its checks. arrivals [≥ `count_dense_units`] int32: zeros, and zeros afterwards."""
    batch, kv_heads, capacity, head_dim = keys.shape
    n_queries, group = query.shape[2], query.shape[1] // kv_heads
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    if capacity == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if out.numel():
        rows, tokens, warps, stages, resident = dense_tile(head_dim, keys.element_size(), n_queries * group)
        tiles = triton.cdiv(n_queries * group, rows)
        units = batch * kv_heads * tiles
        splits = count_splits(units, resident, triton.cdiv(capacity, tokens), query.device)
        partial = query.new_empty(units if splits > 1 else 0, splits, rows * (head_dim + 2), dtype=torch.float32)
        _dense_kernel[(splits, tiles, batch * kv_heads)](
            query, tile_of(keys, tokens), tile_of(values, tokens), lengths, query_lengths, out, lse, partial, arrivals,
            kv_heads, capacity, n_queries, group, head_dim, rows, tokens, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse


def dense_tile(head_dim: int, element_size: int, n_rows: int) -> tuple[int, int, int, int, int]:
    """Query rows and tokens per iteration, warps, pipeline stages, resident programs of the dense kernel."""
    if element_size == 4:  # float32 is multiplied without the matrix units
        return (16 if n_rows <= 16 else 32), 32, 4, 1, 2
    if n_rows <= 16:
        return 16, min(256, 16384 // head_dim), 4, 3, 1
    if n_rows <= 64 or head_dim == 256:
        return 64, 64, 8 if head_dim == 256 else 4, 2, 1
    return 128, 128, 8, 3, 1


def tile_of(table: Tensor, tokens: int) -> TensorDescriptor:
    """[B, Hkv, T_max, D] as rows of D, to be loaded in tiles of `tokens` rows by the bulk copy engine."""
    rows = table.view(-1, table.shape[3])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [tokens, table.shape[3]])


@triton.jit
def _dense_kernel(
    query_ptr, keys, values, lengths_ptr, query_lengths_ptr, out_ptr, lse_ptr, partial_ptr, arrivals_ptr,
    n_kv_head, capacity, n_queries, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS queries of one KV head's group over one split of the cache.

    Grid: (splits, ceil(Q·G / ROWS), B·Hkv). Tiles: queries [ROWS, D], the G heads of a token next to each other; keys
    and values [TOKENS, D]. Invariant of acc, z, m as in the sparse kernel. Tokens that all rows see come first,
    without a mask; the last split then adds the few that only some see.
    """
    i_row = tl.program_id(2).to(tl.int64)
    n_valid = tl.load(query_lengths_ptr + i_row // n_kv_head)
    start = tl.load(lengths_ptr + i_row // n_kv_head) - n_valid  # the window's first position
    o_r, o_d, o_t = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, TOKENS)
    o_q = o_r // G
    m_query = o_q < n_valid
    o_out = (i_row * G + o_r % G) * n_queries + o_q  # [ROWS]
    query = tl.load(query_ptr + o_out[:, None] * D + o_d, mask=m_query[:, None], other=0.0)  # [ROWS, D]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)

    q_first = tl.program_id(1) * ROWS // G
    q_last = tl.minimum((tl.program_id(1) * ROWS + ROWS - 1) // G, n_valid - 1)
    seen_by_all = tl.where(q_first <= q_last, tl.maximum(start + q_first + 1, 0) // TOKENS * TOKENS, 0)
    seen_by_any = tl.where(q_first <= q_last, start + q_last + 1, 0)
    share = tl.cdiv(seen_by_all, TOKENS * tl.num_programs(0)) * TOKENS
    first = tl.program_id(0) * share
    i_token = i_row * capacity  # the sequence's first row in the cache
    for token in range(first, tl.minimum(first + share, seen_by_all), TOKENS):
        key = keys.load([(i_token + token).to(tl.int32), 0])  # [TOKENS, D]
        value = values.load([(i_token + token).to(tl.int32), 0])
        m, z, acc = _attend(query, key, value, True, False, m, z, acc)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        for token in tl.range(seen_by_all, seen_by_any, TOKENS, num_stages=1):
            key = keys.load([(i_token + token).to(tl.int32), 0])
            value = values.load([(i_token + token).to(tl.int32), 0])
            value = tl.where((token + o_t < seen_by_any)[:, None], value, 0.0)  # 0 · NaN would be NaN
            is_visible = (token + o_t[None, :] <= start + o_q[:, None]) & m_query[:, None]
            m, z, acc = _attend(query, key, value, is_visible, True, m, z, acc)
    z = tl.where(m_query, z, 0.0)  # rows past the window have run along in the loop without a mask
    acc = tl.where(m_query[:, None], acc, 0.0)
    i_unit = i_row * tl.num_programs(1) + tl.program_id(1)
    _finish(m, z, acc, partial_ptr, arrivals_ptr, i_unit, out_ptr, lse_ptr, o_out, o_q < n_queries)
