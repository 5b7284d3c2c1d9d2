"""Exact softmax attention over a part of the cache: selected blocks (eq. 2), or everything a window may see.

Both operations gather what is visible and share one softmax. Masking is true −∞ and masked values are replaced
by zero, so that memory which should not be read, NaN included, changes no bit of the result (law 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import (
    FLOATS,
    INTEGERS,
    accumulation_dtype,
    bind_shapes,
    check_dtypes,
    check_heads,
    check_lengths,
    is_integer,
    require,
)


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
    → out [B, Hq, D] in the query's dtype and, if asked, lse [B, Hq]: the natural log-sum-exp of the logits
    scaled by D**-0.5, float32 (float64 for float64 input). The G heads of a group share one selection.
    No visible token gives zeros and −∞. Values of valid tokens must be finite. Raises `ValueError` for arguments that
    do not fit together.
    """
    sizes = bind_shapes(
        query=(query, "B Hq D"),
        keys=(keys, "B Hkv T_max D"),
        values=(values, "B Hkv T_max D"),
        indices=(indices, "B Hkv N"),
        lengths=(lengths, "B"),
    )
    check_heads(sizes["Hq"], sizes["Hkv"])
    check_dtypes(FLOATS, query=query, keys=keys, values=values)
    check_dtypes(INTEGERS, indices=indices)
    check_lengths("lengths", lengths, sizes["T_max"])
    require(is_integer(block_size, 1), "block_size", block_size, "an integer ≥ 1")
    slots = torch.arange(block_size, device=query.device)
    positions = (indices.long()[..., None] * block_size + slots).flatten(2)  # [B, Hkv, N·b]
    visible = (positions >= 0) & (positions < lengths.view(-1, 1, 1))
    if sizes["T_max"] == 0:  # no slot to gather from
        positions, visible = positions[..., :0], visible[..., :0]
    # Invisible slots fetch the newest visible token instead, under a weight of zero: 0 · NaN would be NaN.
    newest = positions.masked_fill(~visible, 0).amax(dim=2, keepdim=True) if positions.numel() else positions
    token = torch.where(visible, positions, newest)
    # One index into rows of D channels: far faster than an index per dimension.
    head = torch.arange(sizes["B"] * sizes["Hkv"], device=query.device).view(sizes["B"], sizes["Hkv"], 1)
    row = head * sizes["T_max"] + token
    chosen_keys = keys.flatten(0, 2).index_select(0, row.flatten()).unflatten(0, row.shape)  # [B, Hkv, N·b, D]
    chosen_values = values.flatten(0, 2).index_select(0, row.flatten()).unflatten(0, row.shape)
    grouped = query.unflatten(1, (sizes["Hkv"], -1))  # [B, Hkv, G, D]
    out, lse = _softmax_attention(grouped, chosen_keys, chosen_values, visible[:, :, None])
    return (out.flatten(1, 2), lse.flatten(1, 2)) if return_lse else out.flatten(1, 2)


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
    query_lengths [B] (default Q) → out [B, Hq, Q, D] in the query's dtype and, if asked, lse [B, Hq, Q]. Query i
    of sequence s stands at position lengths[s] − query_lengths[s] + i and sees the keys up to and including that
    position. Rows at or past query_lengths[s], or at negative positions, give zeros and −∞. Values of valid tokens
    must be finite: 0 · NaN is NaN, so that a row would see the NaN of a later one.
    Raises `ValueError` for arguments that do not fit together.
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
    check_dtypes(FLOATS, query=query, keys=keys, values=values)
    check_lengths("lengths", lengths, sizes["T_max"])
    check_lengths("query_lengths", query_lengths, sizes["Q"])
    longest = int(lengths.max()) if len(lengths) else 0
    row = torch.arange(sizes["Q"], device=query.device)
    last_seen = (lengths - query_lengths)[:, None] + row  # [B, Q], the query's own position
    last_seen = last_seen.masked_fill(row >= query_lengths[:, None], -1)
    visible = torch.arange(longest, device=query.device) <= last_seen[..., None]  # [B, Q, T]
    keys, values = keys[:, :, :longest], values[:, :, :longest]
    unseen = ~visible.any(dim=1)[:, None, :, None]  # [B, 1, T, 1]
    if unseen.any():  # under a weight of zero, but 0 · NaN would be NaN
        values = values.masked_fill(unseen, 0.0)
    groups = sizes["Hq"] // sizes["Hkv"]
    packed = query.unflatten(1, (sizes["Hkv"], groups)).flatten(2, 3)  # [B, Hkv, G·Q, D]
    visible = visible[:, None].repeat(1, 1, groups, 1)  # [B, 1, G·Q, T]
    out, lse = _softmax_attention(packed, keys, values, visible)
    out, lse = (x.unflatten(2, (groups, -1)).flatten(1, 2) for x in (out, lse))  # [B, Hq, Q, D], [B, Hq, Q]
    return (out, lse) if return_lse else out


def _softmax_attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of R queries over S tokens, per KV head.

    query [B, Hkv, R, D], keys and values [B, Hkv, S, D], visible [B, Hkv or 1, R or 1, S]
    → out [B, Hkv, R, D] in the query's dtype, lse [B, Hkv, R] in the accumulation dtype. Values must be finite even
    where they are not visible.
    """
    dtype = accumulation_dtype(query.dtype)
    logits = (query.to(dtype) * query.shape[-1] ** -0.5) @ keys.to(dtype).mT  # [B, Hkv, R, S]
    logits = logits.masked_fill(~visible, float("-inf"))
    lse = logits.logsumexp(dim=-1)  # −∞ where nothing is visible; the weights there are NaN
    out = logits.softmax(dim=-1) @ values.to(dtype)
    return out.masked_fill(lse[..., None] == float("-inf"), 0.0).to(query.dtype), lse
