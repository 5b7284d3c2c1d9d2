"""Exact softmax attention over part of the cache: selected blocks (eq. 2), or all a window may see.

Both operations gather keys and values and apply one softmax to what is visible. Everything else
gets a logit of −∞ and a value of 0, so what lies there, NaN included, changes no bit (law 5).
"""

import torch

from .checks import accumulation_dtype


def sparse_attention(query, keys, values, indices, lengths, block_size, *, return_lse=False):
    """Softmax attention of one query per sequence over the tokens of its selected blocks (eq. 2).

    query [B, Hq, D], keys and values [B, Hkv, T_max, D], indices [B, Hkv, N] with −1 for nothing,
    lengths [B] → out [B, Hq, D] in the query's dtype and, on request, lse [B, Hq]: the natural
    log-sum-exp of the logits scaled by D**-0.5, float32 (float64 for float64 input). The heads of a
    group share one selection. No visible token gives 0 and −∞. Valid tokens' values must be finite.
    """
    # Positions of the selected blocks' tokens. An index of −1 selects nothing.
    (batch, n_kv_head, capacity, _), device = keys.shape, query.device
    slots = torch.arange(block_size, device=device)
    positions = (indices.long()[..., None] * block_size + slots).flatten(2)  # [B, Hkv, N·b]
    visible = (positions >= 0) & (positions < lengths.view(-1, 1, 1))

    # Gather keys and values by row of D channels, which is far faster than torch.gather on a CPU.
    # An invisible slot may hold NaN, and 0 · NaN is NaN: set its value to 0.
    if capacity == 0:  # no row to gather
        positions, visible = positions[..., :0], visible[..., :0]
    token = positions.masked_fill(~visible, 0)
    head = torch.arange(batch * n_kv_head, device=device).view(batch, n_kv_head, 1)
    row = (head * capacity + token).flatten()
    chosen_keys = keys.flatten(0, 2).index_select(0, row).unflatten(0, token.shape)
    chosen_values = values.flatten(0, 2).index_select(0, row).unflatten(0, token.shape)
    chosen_values = chosen_values.masked_fill(~visible[..., None], 0.0)

    # One softmax over all of them.
    grouped = query.unflatten(1, (n_kv_head, -1))  # [B, Hkv, G, D]
    out, lse = softmax_attention(grouped, chosen_keys, chosen_values, visible[:, :, None])
    out, lse = out.flatten(1, 2), lse.flatten(1, 2)
    return (out, lse) if return_lse else out


def dense_attention(query, keys, values, lengths, *, query_lengths=None, return_lse=False):
    """Causal attention of each sequence's newest tokens over its whole cache.

    query [B, Hq, Q, D], keys and values [B, Hkv, T_max, D], lengths [B] with the queries' own
    tokens, query_lengths [B] (default Q) → out [B, Hq, Q, D] in the query's dtype and, on request,
    lse [B, Hq, Q]. Query i of sequence s stands at position lengths[s] − query_lengths[s] + i and
    sees the keys up to and including that position. Rows at or past query_lengths[s], or at
    negative positions, give zeros and −∞. Values of valid tokens must be finite.
    """
    # What each query sees: everything up to its own position.
    n_queries, n_kv_head, device = query.shape[2], keys.shape[1], query.device
    if query_lengths is None:
        query_lengths = torch.full_like(lengths, n_queries)
    row = torch.arange(n_queries, device=device)
    last_seen = (lengths - query_lengths)[:, None] + row  # [B, Q], the query's own position
    last_seen = last_seen.masked_fill(row >= query_lengths[:, None], -1)
    longest = int(lengths.max()) if len(lengths) else 0
    visible = torch.arange(longest, device=device) <= last_seen[..., None]  # [B, Q, T]

    # A token that no query sees may hold NaN, and 0 · NaN is NaN: set its value to 0.
    keys, values = keys[:, :, :longest], values[:, :, :longest]
    unseen = ~visible.any(dim=1)[:, None, :, None]  # [B, 1, T, 1]
    if unseen.any():
        values = values.masked_fill(unseen, 0.0)

    # One softmax per query; the G heads of a group are G·Q rows over the same keys.
    grouped = query.unflatten(1, (n_kv_head, -1))  # [B, Hkv, G, Q, D]
    group = grouped.shape[2]
    visible = visible[:, None].repeat(1, 1, group, 1)  # [B, 1, G·Q, T]
    out, lse = softmax_attention(grouped.flatten(2, 3), keys, values, visible)
    out = out.unflatten(2, (group, n_queries)).flatten(1, 2)  # [B, Hq, Q, D]
    lse = lse.unflatten(2, (group, n_queries)).flatten(1, 2)  # [B, Hq, Q]
    return (out, lse) if return_lse else out


def softmax_attention(query, keys, values, visible):
    """Softmax attention of R queries over S tokens per KV head, and its log-sum-exp.

    query [B, Hkv, R, D], keys and values [B, Hkv, S, D], visible [B, 1 or Hkv, 1 or R, S]
    → out [B, Hkv, R, D] in the query's dtype, lse [B, Hkv, R] in the accumulation dtype.
    """
    dtype = accumulation_dtype(query.dtype)
    logits = (query.to(dtype) * query.shape[-1] ** -0.5) @ keys.to(dtype).mT  # [B, Hkv, R, S]
    logits = logits.masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(dim=-1)
    out = logits.softmax(dim=-1) @ values.to(dtype)

    # Where nothing is visible every weight is NaN; the result is defined as 0.
    return out.masked_fill(lse[..., None] == float("-inf"), 0.0).to(query.dtype), lse
