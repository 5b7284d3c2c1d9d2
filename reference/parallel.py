"""Decoding along given tokens in one pass: what rectified sparse decoding computes, without its loop.

When the tokens are known, every step can be computed at once. There are two streams: the *exact* one is dense
attention over the text, the *decoded* one is what decoding computes, step for step. In the decoded stream the query at
t sees keys and values of the exact stream before `exact_until[t]`, the beginning of its window, and of the decoded
stream from there on; it attends to the blocks that a sparse step at t would select among them. So one pass takes the
place of all steps, for training and for wide sweeps, in which all ways of decoding share one exact stream.
`generate.decode_along` is the plain version of this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import block_bounds, select_blocks
from .checks import accumulation_dtype, bind_shapes, is_integer, require
from .config import ReSAConfig
from .model import GPT, causal_attention, for_query_heads


def exact_until(n_tokens: int, prompt_tokens: int, config: ReSAConfig) -> Tensor:
    """Per position t, how many tokens of the cache are exact while t is fed: [T] int64 (laws 6 and 7).

    >>> exact_until(8, 2, ReSAConfig(interval=3)).tolist()
    [2, 2, 2, 2, 2, 5, 5, 5]
    >>> exact_until(5, 2, ReSAConfig(interval=None)).tolist()
    [2, 2, 2, 2, 2]
    """
    decoded = (torch.arange(n_tokens) - prompt_tokens).clamp(min=0)
    f = config.interval
    return prompt_tokens + (torch.zeros_like(decoded) if f is None else decoded // f * f)


Score = Callable[[Tensor, Tensor], Tensor]  # query [B, Hq, T, D], bounds [B, Hkv, 2, D, M] → [B, Hkv, T, M]


def pooled_scores(query: Tensor, bounds: Tensor) -> Tensor:
    """Eq. 4 for many queries: query [B, Hq, T, D], bounds [B, Hkv, 2, D, M] → [B, Hkv, T, M]."""
    return block_upper_bounds(query.unflatten(1, (bounds.shape[1], -1)).mean(dim=2), bounds)


def block_upper_bounds(query: Tensor, bounds: Tensor) -> Tensor:
    """Of query · key over every block: query [..., T, D], bounds [..., 2, D, M] → [..., T, M].

    max(q·lo, q·hi) is q·hi where q is positive and q·lo where it is negative: two matrix products.
    """
    lo, hi = bounds.to(query.dtype).unbind(dim=-3)
    return query.clamp(min=0) @ hi + query.clamp(max=0) @ lo


@dataclass(frozen=True)
class ExactStream:
    """Dense attention over some tokens: what decoding finds in the cache wherever it is exact, and what it predicts."""

    tokens: Tensor  # [B, T]
    keys: tuple[Tensor, ...]  # [B, Hkv, T, D] of every layer, after RoPE
    values: tuple[Tensor, ...]  # [B, Hkv, T, D]
    hidden: Tensor  # [B, T, C] final hidden states


def exact_stream(model: GPT, tokens: Tensor) -> ExactStream:
    """Dense attention over `tokens` [B, T]; differentiable. ValueError for tokens that are not the model's."""
    sizes = bind_shapes(tokens=(tokens, "B T"))
    model.check_tokens(tokens)
    require(sizes["T"] <= model.config.context, "tokens", sizes["T"], f"at most context = {model.config.context}")
    keys, values = [], []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys.append(key)
        values.append(value)
        return causal_attention(layer, query, key, value)

    hidden = model.transform(tokens, torch.arange(sizes["T"], device=tokens.device).expand_as(tokens), attend)
    return ExactStream(tokens, tuple(keys), tuple(values), hidden)


def decode_at_once(
    model: GPT, exact: ExactStream, config: ReSAConfig, prompt_tokens: int, score: Score = pooled_scores
) -> Tensor:
    """Final hidden states [B, T, C] of decoding along the tokens [B, T] of the exact stream.

    The first `prompt_tokens` are prefilled, and exact; the others are decoded one by one, all sequences in step.
    Differentiable in both streams. `score` takes the place of eq. 4, for comparison. Blocks must not be cut by windows
    that are rectified: of interval and block size one divides the other, and unless f is 1 or never, `prompt_tokens` is
    a multiple of the block size. Errors: ValueError for what does not fit, `dense_below` included.
    """
    n_tokens, f = exact.tokens.shape[1], config.interval
    check_decoding(n_tokens, config, prompt_tokens)
    if prompt_tokens == n_tokens:
        return exact.hidden
    at = torch.arange(prompt_tokens, n_tokens, device=exact.tokens.device)  # [S]
    until = exact_until(n_tokens, prompt_tokens, config)[prompt_tokens:].to(at.device)
    is_dense = torch.zeros_like(at, dtype=torch.bool)
    if f is not None and config.schedule == "fused":  # every f-th step is a dense pass, its own token exact as well
        is_dense = (at - prompt_tokens) % f == f - 1
        until = torch.where(is_dense, at + 1, until)
    n_exact = int(until.max())  # keys of the exact stream that any step may see
    seen = torch.cat((torch.arange(n_exact, device=at.device), at))  # positions of both streams' keys
    is_decoded = torch.arange(len(seen), device=at.device) >= n_exact
    may_see = (seen <= at[:, None]) & ((seen >= until[:, None]) == is_decoded)  # [S, keys]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = may_see
        if layer >= config.dense_layers:
            taken = selected_tokens(query, exact.keys[layer], key, until, config, score)  # [B, Hkv, S, T]
            taken = torch.cat((taken[..., :n_exact], taken[..., prompt_tokens:]), dim=-1)
            mask = for_query_heads(query, (taken | is_dense[:, None]) & may_see)
        pairs = ((exact.keys[layer], key), (exact.values[layer], value))
        keys, values = (for_query_heads(query, torch.cat((old[:, :, :n_exact], new), dim=2)) for old, new in pairs)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    decoded = model.transform(exact.tokens[:, prompt_tokens:], at.expand(len(exact.tokens), -1), attend)
    return torch.cat((exact.hidden[:, :prompt_tokens], decoded), dim=1)


@torch.no_grad()
def selected_tokens(
    query: Tensor, exact_key: Tensor, key: Tensor, until: Tensor, config: ReSAConfig, score: Score
) -> Tensor:
    """Which tokens the blocks of the last S steps hold, future ones included: [B, Hkv, S, T] bool (eq. 3–5).

    query [B, Hq, S, D], keys of the exact stream [B, Hkv, T, D] and of the decoded one [B, Hkv, S, D], until [S]: where
    a step finds decoded keys instead. The block that holds a step's own token is selected whatever it scores, so that
    its bounds are those of whole blocks.
    """
    (batch, _, n_tokens, _), n_steps, b = exact_key.shape, len(until), config.block_size
    lengths = torch.full((batch,), n_tokens, dtype=torch.int32, device=key.device)
    decoded_key = torch.cat((exact_key[:, :, : n_tokens - n_steps], key), dim=2)
    wide = query.to(accumulation_dtype(query.dtype))
    with torch.autocast(key.device.type, enabled=False):  # half-precision products would tie what differs
        scores = [score(wide, block_bounds(each, lengths, b)) for each in (exact_key, decoded_key)]
    ends = (torch.arange(scores[0].shape[-1], device=key.device) + 1) * b
    joined = torch.where(ends <= until[:, None], *scores)  # [B, Hkv, S, M]
    # Every step as a sequence of its own, as long as its cache is then.
    steps = joined.transpose(1, 2).flatten(0, 1)  # [B·S, Hkv, M]
    step_lengths = torch.arange(n_tokens - n_steps + 1, n_tokens + 1, dtype=torch.int32, device=key.device)
    indices = select_blocks(steps, step_lengths.repeat(batch), config).long()  # [B·S, Hkv, N]
    spare = steps.shape[-1]
    chosen = torch.zeros(*steps.shape[:2], spare + 1, dtype=torch.bool, device=key.device)
    chosen.scatter_(2, indices.masked_fill(indices < 0, spare), True)
    by_block = chosen[..., :spare].unflatten(0, (batch, n_steps)).transpose(1, 2)
    return by_block.repeat_interleave(b, dim=-1)[..., :n_tokens]


def check_decoding(n_tokens: int, config: ReSAConfig, prompt_tokens: int) -> None:
    """Refuse by name what can't be decoded at once along `n_tokens` tokens."""
    b, f = config.block_size, config.interval
    require(config.dense_below == 0, "config.dense_below", config.dense_below, "0: all sequences decode in step")
    least, multiple = (1, "") if f in (1, None) else (b, f"a multiple of block_size = {b}, ")
    fits = is_integer(prompt_tokens, 1) and prompt_tokens <= n_tokens and prompt_tokens % least == 0
    require(fits, "prompt_tokens", prompt_tokens, f"{multiple}{least} … {n_tokens}")
    nested = f is None or f % b == 0 or b % f == 0
    require(nested, "config.interval", f, f"a divisor or a multiple of block_size = {b}, or None")
