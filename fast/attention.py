"""Exact softmax attention in Triton: over selected blocks (eq. 2), or over all a window may see.

The reference gathers what is visible and applies one softmax. Both kernels here walk over the
tokens with a running maximum and sum, and share one sequence's tokens among several programs, its
*splits*, because a batch has fewer heads than the GPU has multiprocessors. Each split leaves its
sums in memory. The one that finishes last merges them (law 4), always in the same order, so that
reruns give the same bits. Split counters say who is last.

On Hopper, windows of 16-bit numbers go to a kernel in `gpu/hopper.py`, which computes the same
faster, and leaves its splits to a kernel that merges them.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resa.reference.checks import require

from .gpu import hopper
from .gpu.launch import let_next_start, overlapped, wait_for_previous
from .gpu.limits import INTERPRETED
from .pages import cached_rows, layout, row_stride, tile_rows

LOG2_E = tl.constexpr(1.4426950408889634)
MERGED_ROWS = 4  # query rows that one program merges
GROUP_ROWS = 16  # query heads of a group, padded to the fewest rows of a matrix product


def sparse_attention(
    query, keys, values, indices, lengths, block_size,
    *, table=None, return_lse=False, counts=None, split_counters=None,
):  # fmt: skip
    """Softmax attention of one query per sequence over the tokens of its selected blocks (eq. 2).

    query [B, Hq, D], keys and values [B, Hkv, T_max, D], indices [B, Hkv, N] with −1 for nothing,
    lengths [B] → out [B, Hq, D] in the query's dtype and, on request, lse [B, Hq] float32. No
    visible token gives zeros and −∞. Values of valid tokens must be finite. With a table [B, pages]
    int32, keys and values are pools [P, Hkv, N, D] (see `pages.py`).

    The decode loop passes two tensors of its own: counts [B] int32, so that only the first
    counts[s] indices are read, and split_counters [≥ B·Hkv] int32, zeros before and after. Its
    query, lengths and counts must be older than the kernel launched right before, which may not
    have ended.
    """
    batch, n_kv_head, capacity, page_size = layout(keys, table)
    head_dim, device = keys.shape[3], query.device
    stride = row_stride(table, keys=keys, values=values)
    group, rows, width = query.shape[1] // n_kv_head, batch * n_kv_head, indices.shape[2]
    query = query.contiguous()
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    if out.numel():
        lengths = lengths.to(torch.int32).contiguous()
        if indices.dtype != torch.int32:
            indices = indices.clamp(-1, capacity)  # far past the end stays past the end
        indices = indices.to(torch.int32).contiguous()
        early = overlapped(device) if counts is not None else {}
        if counts is None:  # −1 may stand anywhere, so every entry is looked at
            counts = torch.full_like(lengths, width)
        split_counters = _counters(split_counters, rows, device)

        tokens = min(256, 32768 // (head_dim * keys.element_size()))
        if rows * triton.cdiv(width * block_size, 128) <= count_processors(device):
            tokens = min(128, tokens)  # short lists: more programs with less to do each
        iterations = triton.cdiv(width * block_size, tokens)
        # A pipeline pays when it stays filled for a while. Before that, two programs hide each
        # other's latency better.
        is_short = rows * iterations <= 4 * count_processors(device)
        stages, resident = (1, 2) if is_short else (3, 1)
        if table is not None and not is_short:  # one load more stands before keys and values
            stages, resident = 2, 2
        splits = count_splits(rows, resident, iterations, device)
        partial = query.new_empty(rows, splits, GROUP_ROWS * (head_dim + 2), dtype=torch.float32)
        _sparse_kernel[(splits, n_kv_head, batch)](
            query, keys, values, table, indices, counts, lengths, out, lse, partial,
            split_counters, capacity, width, group, head_dim, block_size, page_size, stride, tokens,
            num_warps=4, num_stages=stages, **early
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _counters(split_counters: Tensor | None, needed: int, device: torch.device) -> Tensor:
    """The counters that a launch works with: `needed` zeros, or the caller's, if they suffice."""
    if split_counters is None:
        return torch.zeros(needed, dtype=torch.int32, device=device)
    given = f"{len(split_counters)} counters"
    require(len(split_counters) >= needed, "split_counters", given, f"at least {needed}")
    return split_counters


def count_splits(programs: int, resident: int, iterations: int, device: torch.device) -> int:
    """Splits with which `programs` fill the GPU once, `resident` of them per multiprocessor."""
    return max(1, min(count_processors(device) * resident // programs, iterations))


@cache
def count_processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; the interpreter has a few, so that there are splits to merge."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["width"])
def _sparse_kernel(
    query_ptr, keys_ptr, values_ptr, table_ptr, indices_ptr, counts_ptr, lengths_ptr, out_ptr,
    lse_ptr, partial_ptr, split_counters_ptr, capacity, width,
    G: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr,
    STRIDE: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Attention of the G heads of one KV head over one split of its list of blocks.

    Grid: (splits, Hkv, B). Tiles: queries [16, D], keys and values [TOKENS, D], several blocks or
    part of one. Invariant: acc = Σ exp(s − m)·v and z = Σ exp(s − m) over the visible tokens so
    far, m their largest logit s (all zero and −∞ before the first).
    """
    # The queries, and this split's share of the list.
    i_row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths_ptr + tl.program_id(2))
    total = tl.cdiv(length, BLOCK_SIZE)
    o_g, o_d, o_t = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, TOKENS)
    m_g = o_g < G
    p_query = query_ptr + (i_row * G + o_g)[:, None] * D + o_d
    query = tl.load(p_query, mask=m_g[:, None], other=0.0)  # [16, D]
    count = tl.load(counts_ptr + tl.program_id(2))
    share = tl.cdiv(count, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, count)
    m = tl.full([16], float("-inf"), tl.float32)
    z = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, D], tl.float32)

    # Wait for the indices. The query and the lengths are older than the kernel before this one.
    wait_for_previous()
    let_next_start()

    # Walk over the list. Nothing branches on an index: −1 and what lies past the end load zeros and
    # weigh exp(−∞).
    for start in range(first * BLOCK_SIZE, last * BLOCK_SIZE, TOKENS):
        o_entry = (start + o_t) // BLOCK_SIZE  # [TOKENS]
        block = tl.load(indices_ptr + i_row * width + o_entry, mask=o_entry < last, other=-1)
        is_block = (block >= 0) & (block < total)
        slot = (start + o_t) % BLOCK_SIZE
        position = tl.where(is_block, block, 0) * BLOCK_SIZE + slot  # fits 32 bits
        is_visible = is_block & (position < length)
        o_row = cached_rows(
            table_ptr, i_row, tl.num_programs(1), capacity, position, is_visible, PAGE
        )
        o_token = o_row[:, None] * STRIDE + o_d  # [TOKENS, D]
        key = tl.load(keys_ptr + o_token, mask=is_visible[:, None], other=0.0)
        value = tl.load(values_ptr + o_token, mask=is_visible[:, None], other=0.0)
        m, z, acc = _attend(query, key, value, is_visible[None, :], True, m, z, acc)
    o_out = i_row * G + o_g
    _finish(m, z, acc, partial_ptr, split_counters_ptr, i_row, out_ptr, lse_ptr, o_out, m_g)


@triton.jit
def _attend(query, key, value, is_visible, MASKED: tl.constexpr, m, z, acc):
    """One step of the running softmax; query [R, D], key and value [TOKENS, D], is_visible [R or 1,
    TOKENS]. The logits' scale stays outside of them: m is the largest product q·k.
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
def _finish(
    m, z, acc, partial_ptr, split_counters_ptr, i_counter, out_ptr, lse_ptr, o_out, m_out
):  # fmt: skip
    """Write the output rows o_out [R], once all their splits (grid axis 0) have been counted.

    partial holds, per counter and split, acc [R, D], m [R] and z [R]. Invariant: a split counter is
    zero before and after.
    """
    R: tl.constexpr = acc.shape[0]
    D: tl.constexpr = acc.shape[1]
    o_r, o_d = tl.arange(0, R), tl.arange(0, D)
    splits = tl.num_programs(0)
    is_last = True
    if splits > 1:
        p_split = partial_ptr + (i_counter * splits + tl.program_id(0)) * R * (D + 2)
        tl.store(p_split + o_r[:, None] * D + o_d, acc, mask=m_out[:, None])
        tl.store(p_split + R * D + o_r, m, mask=m_out)
        tl.store(p_split + R * (D + 1) + o_r, z, mask=m_out)
        tl.debug_barrier()  # every thread's part is written before one of them counts the split
        counted = tl.atomic_add(split_counters_ptr + i_counter, 1, sem="acq_rel")
        is_last = counted == splits - 1
        if is_last:
            p_first = partial_ptr + i_counter * splits * R * (D + 2)
            m, z, acc = _merge(p_first, splits, o_r, m_out, R, D)
            tl.store(split_counters_ptr + i_counter, 0)
    if is_last:
        _store_output(m, z, acc, out_ptr, lse_ptr, o_out, m_out)


@triton.jit
def _store_output(m, z, acc, out_ptr, lse_ptr, o_out, m_out):
    """Write rows o_out of the output and their log-sum-exps."""
    D: tl.constexpr = acc.shape[1]
    total = tl.where(z == 0, 1.0, z)  # nothing visible: 0 and −∞
    lse = tl.where(z == 0, float("-inf"), m * D**-0.5 + tl.log(total))
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + o_out[:, None] * D + tl.arange(0, D), out, mask=m_out[:, None])
    tl.store(lse_ptr + o_out, lse, mask=m_out)


@triton.jit
def _merge(p_first, splits, o_r, m_out, R: tl.constexpr, D: tl.constexpr):
    """The splits' m, z and acc merged into those of the whole; empty splits weigh nothing.

    Each has left those of R rows, the first at p_first. Merged are the rows o_r of them. m and z
    are merged apart, not as their log-sum-exp: where logits are huge, that has no digits left for
    z.
    """
    N: tl.constexpr = o_r.shape[0]
    AT_ONCE: tl.constexpr = 4 if N * D > 2048 else 8 if N * D > 1024 else 16  # as registers allow
    o_d = tl.arange(0, D)
    m = tl.full([N], float("-inf"), tl.float32)
    z = tl.zeros([N], tl.float32)
    acc = tl.zeros([N, D], tl.float32)
    for base in range(0, splits, AT_ONCE):
        for i in tl.static_range(AT_ONCE):  # unrolled, so that their loads wait together
            m_row = m_out & (tl.full([N], base + i, tl.int32) < splits)
            p_split = p_first + (base + i) * R * (D + 2)
            p_acc = p_split + o_r[:, None] * D + o_d
            p_m = p_split + R * D + o_r
            p_z = p_split + R * (D + 1) + o_r
            # .cg reads the shared cache: another multiprocessor wrote this a moment ago.
            acc_i = tl.load(p_acc, mask=m_row[:, None], other=0.0, cache_modifier=".cg")
            m_i = tl.load(p_m, mask=m_row, other=float("-inf"), cache_modifier=".cg")
            z_i = tl.load(p_z, mask=m_row, other=0.0, cache_modifier=".cg")
            m_next = tl.maximum(m, m_i)
            m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
            decay = tl.exp2((m - m_safe) * (D**-0.5 * LOG2_E))
            decay_i = tl.exp2((m_i - m_safe) * (D**-0.5 * LOG2_E))
            z = z * decay + z_i * decay_i
            acc = acc * decay[:, None] + acc_i * decay_i[:, None]
            m = m_next
    return m, z, acc


def dense_attention(
    query, keys, values, lengths,
    *, table=None, query_lengths=None, return_lse=False, split_counters=None,
):  # fmt: skip
    """Causal attention of a window of queries, the newest tokens of each sequence.

    query [B, Hq, Q, D], keys and values [B, Hkv, T_max, D], lengths [B] with the window's own
    tokens, query_lengths [B] (default Q) → out [B, Hq, Q, D] in the query's dtype and, on request,
    lse [B, Hq, Q] float32. Query i of sequence s stands at position lengths[s] − query_lengths[s] +
    i. Rows at or past query_lengths[s], or at negative positions, give zeros and −∞. With a table
    [B, pages] int32, keys and values are pools [P, Hkv, N, D] (see `pages.py`).

    The decode loop passes split_counters [≥ `count_split_counters`] int32 of its own, zeros before
    and after. The kernel for Hopper needs none.
    """
    batch, n_kv_head, capacity, page_size = layout(keys, table)
    head_dim, device = keys.shape[3], query.device
    stride = row_stride(table, keys=keys, values=values)
    n_queries, group = query.shape[2], query.shape[1] // n_kv_head
    query = query.contiguous()
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    if capacity == 0:
        out, lse = out.zero_(), lse.fill_(float("-inf"))
    elif out.numel():
        lengths = lengths.to(torch.int32).contiguous()
        if query_lengths is None:
            query_lengths = torch.full_like(lengths, n_queries)
        query_lengths = query_lengths.to(torch.int32).contiguous()
        n_rows = n_queries * group
        if hopper.suits(query, n_rows, page_size):
            _attend_on_hopper(query, keys, values, table, lengths, query_lengths, out, lse)
            return (out, lse) if return_lse else out
        rows, tokens, warps, stages, resident = dense_tile(head_dim, keys.element_size(), n_rows)
        n_counters = batch * n_kv_head * triton.cdiv(n_rows, rows)  # as `count_split_counters`
        split_counters = _counters(split_counters, n_counters, device)
        splits = count_splits(n_counters, resident, triton.cdiv(capacity, tokens), device)
        shape = n_counters if splits > 1 else 0, splits, rows * (head_dim + 2)
        partial = query.new_empty(shape, dtype=torch.float32)
        if table is None:
            keys, values = tile_of(keys, tokens), tile_of(values, tokens)
        elif stages > 1:
            stages += 2  # that look pages up
        _dense_kernel[(splits, triton.cdiv(n_rows, rows), batch * n_kv_head)](
            query, keys, values, table, lengths, query_lengths, out, lse, partial, split_counters,
            n_kv_head, capacity, n_queries, group, head_dim, page_size, stride, rows, tokens,
            num_warps=warps, num_stages=stages
        )  # fmt: skip
    return (out, lse) if return_lse else out


def count_split_counters(keys: Tensor, group: int, n_queries: int) -> int:
    """Split counters of a window of `n_queries` tokens: one per KV head and tile of query rows.

    keys [B, Hkv, T_max, D]. A shorter window never needs more.
    """
    batch, n_kv_head, _, head_dim = keys.shape
    rows, *_ = dense_tile(head_dim, keys.element_size(), n_queries * group)
    return batch * n_kv_head * triton.cdiv(n_queries * group, rows)


def dense_tile(head_dim: int, element_size: int, n_rows: int) -> tuple[int, int, int, int, int]:
    """The dense kernel's query rows, tokens per iteration, warps, stages, resident programs."""
    if element_size == 4:  # float32 is multiplied without the matrix units
        return (16 if n_rows <= 16 else 32), 32, 4, 1, 2
    if n_rows <= 16:
        return 16, min(256, 16384 // head_dim), 4, 3, 1
    if n_rows <= 64 or head_dim == 256:
        return 64, 64, 8 if head_dim == 256 else 4, 2, 1
    return 128, 128, 8, 3, 1


def tile_of(cache: Tensor, tokens: int) -> TensorDescriptor:
    """[B, Hkv, T_max, D] as rows of D, which the copy engine loads in tiles of `tokens` rows."""
    rows = cache.view(-1, cache.shape[3])
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [tokens, cache.shape[3]])


@triton.jit
def _dense_kernel(
    query_ptr, keys, values, table_ptr, lengths_ptr, query_lengths_ptr, out_ptr, lse_ptr,
    partial_ptr, split_counters_ptr, n_kv_head, capacity, n_queries, G: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr
):  # fmt: skip
    """Attention of ROWS queries of one KV head's group over one split of the cache.

    Grid: (splits, ceil(Q·G / ROWS), B·Hkv). Tiles: queries [ROWS, D], the G heads of a token next
    to each other; keys and values [TOKENS, D]. Invariant of acc, z, m as in the sparse kernel. The
    copy engine loads the tiles of a cache, the threads those of pages.
    """
    # The queries of this tile.
    i_row = tl.program_id(2).to(tl.int64)
    n_valid = tl.load(query_lengths_ptr + i_row // n_kv_head)
    start = tl.load(lengths_ptr + i_row // n_kv_head) - n_valid  # the window's first position
    o_r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, D)
    o_t = tl.arange(0, TOKENS)
    o_q = o_r // G
    m_query = o_q < n_valid
    o_out = (i_row * G + o_r % G) * n_queries + o_q  # [ROWS]
    p_query = query_ptr + o_out[:, None] * D + o_d
    query = tl.load(p_query, mask=m_query[:, None], other=0.0)  # [ROWS, D]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)

    # Tokens that all rows see need no mask. They are shared among the splits.
    q_first = tl.program_id(1) * ROWS // G
    q_last = tl.minimum((tl.program_id(1) * ROWS + ROWS - 1) // G, n_valid - 1)
    has_rows = q_first <= q_last
    seen_by_all = tl.where(has_rows, tl.maximum(start + q_first + 1, 0) // TOKENS * TOKENS, 0)
    seen_by_any = tl.where(has_rows, start + q_last + 1, 0)
    share = tl.cdiv(seen_by_all, TOKENS * tl.num_programs(0)) * TOKENS
    first = tl.program_id(0) * share
    for token in range(first, tl.minimum(first + share, seen_by_all), TOKENS):
        if PAGE == 0:
            o_first = (i_row * capacity + token).to(tl.int32)
            key, value = keys.load([o_first, 0]), values.load([o_first, 0])  # [TOKENS, D]
        else:
            m_t = tl.full([TOKENS], True, tl.int1)
            o_row = tile_rows(table_ptr, i_row, n_kv_head, capacity, token, o_t, m_t, PAGE)
            o_token = o_row[:, None] * STRIDE + o_d
            key, value = tl.load(keys + o_token), tl.load(values + o_token)
        m, z, acc = _attend(query, key, value, True, False, m, z, acc)

    # The last split adds the few tokens that only some rows see. A hidden value may be NaN, and 0 ·
    # NaN is NaN: set it to 0.
    if tl.program_id(0) == tl.num_programs(0) - 1:
        for token in tl.range(seen_by_all, seen_by_any, TOKENS, num_stages=1):
            m_t = token + o_t < seen_by_any
            if PAGE == 0:
                o_first = (i_row * capacity + token).to(tl.int32)
                key, value = keys.load([o_first, 0]), values.load([o_first, 0])
                value = tl.where(m_t[:, None], value, 0.0)
            else:
                o_row = tile_rows(table_ptr, i_row, n_kv_head, capacity, token, o_t, m_t, PAGE)
                o_token = o_row[:, None] * STRIDE + o_d
                key = tl.load(keys + o_token, mask=m_t[:, None], other=0.0)
                value = tl.load(values + o_token, mask=m_t[:, None], other=0.0)
            is_visible = (token + o_t[None, :] <= start + o_q[:, None]) & m_query[:, None]
            m, z, acc = _attend(query, key, value, is_visible, True, m, z, acc)

    # Rows past the window have run along in the loop without a mask: forget what they summed.
    z = tl.where(m_query, z, 0.0)
    acc = tl.where(m_query[:, None], acc, 0.0)
    i_counter = i_row * tl.num_programs(1) + tl.program_id(1)
    m_out = o_q < n_queries
    _finish(m, z, acc, partial_ptr, split_counters_ptr, i_counter, out_ptr, lse_ptr, o_out, m_out)


def _attend_on_hopper(
    query: Tensor, keys: Tensor, values: Tensor, table: Tensor | None, lengths: Tensor,
    query_lengths: Tensor, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill `out` and `lse` of a window by the kernel for Hopper, and merge its splits."""
    found = batch, n_kv_head, capacity, _ = layout(keys, table)
    n_queries, head_dim = query.shape[2:]
    group, rows = query.shape[1] // n_kv_head, batch * n_kv_head
    n_programs = rows * triton.cdiv(n_queries * group, hopper.PROGRAM_ROWS.value)
    n_tiles = triton.cdiv(capacity, hopper.TOKENS.value)
    splits = count_wave_splits(n_programs, n_tiles, count_processors(query.device))
    partial = hopper.attend(
        query, keys, values, table, found, lengths, query_lengths, out, lse, splits
    )
    if splits > 1:
        _merge_kernel[(triton.cdiv(n_queries * group, MERGED_ROWS), rows)](
            partial, out, lse, n_queries, splits, len(partial) // rows, group, head_dim,
            hopper.ROWS.value, MERGED_ROWS, **overlapped(query.device)
        )  # fmt: skip


@cache
def count_wave_splits(programs: int, n_tiles: int, processors: int) -> int:
    """Splits of programs, each with a multiprocessor to itself, with which the last ends first.

    In units of a tile's time, about: a program begins and ends in 4, a split is merged in 1/4. More
    than 8 waves win next to nothing, and cost memory.

    >>> count_wave_splits(programs=64, n_tiles=2048, processors=132)
    2
    >>> count_wave_splits(programs=48, n_tiles=512, processors=132)
    11
    """

    def time(splits: int) -> float:
        waves = triton.cdiv(programs * splits, processors)
        return waves * (triton.cdiv(n_tiles, splits) + 4) + splits / 4

    most = min(n_tiles, max(1, 8 * processors // programs))
    return min(range(1, most + 1), key=time)


@triton.jit(do_not_specialize=["n_queries", "splits", "n_parts"])
def _merge_kernel(
    partial_ptr, out_ptr, lse_ptr, n_queries, splits, n_parts,
    G: tl.constexpr, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """ROWS query rows of one KV head merged from all splits, R rows together.

    Grid: (ceil(Q·G / ROWS), B·Hkv).
    """
    wait_for_previous()
    let_next_start()
    i_row = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_out = o_r // G < n_queries
    i_part = i_row * n_parts + tl.program_id(0) * ROWS // R
    p_first = partial_ptr + i_part * splits * R * (D + 2)
    m, z, acc = _merge(p_first, splits, o_r % R, m_out, R, D)
    o_out = (i_row * G + o_r % G) * n_queries + o_r // G
    _store_output(m, z, acc, out_ptr, lse_ptr, o_out, m_out)
