"""Decoding along given tokens in one pass: what rectified sparse decoding computes, without its loop.

When the tokens are known, every step can be computed at once. Two streams run side by side: the *exact* one is dense
attention over the text, the *decoded* one is what decoding computes, step for step. In the decoded stream the query at
t sees keys and values of the exact stream before `exact_until[t]`, the beginning of its window, and of the decoded
stream from there on; it attends to the blocks that a sparse step at t would select among them. So one pass of 2·T keys
takes the place of T steps, for training and for wide sweeps. `generate.decode_along` is the plain version of this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import block_bounds, select_blocks
from .checks import accumulation_dtype, bind_shapes, is_integer, require
from .config import ReSAConfig
from .model import GPT, causal_attention, rotary_angles


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


def decode_at_once(
    model: GPT,
    tokens: Tensor,
    config: ReSAConfig,
    prompt_tokens: int,
    score: Score = pooled_scores,
) -> tuple[Tensor, Tensor]:
    """Final hidden states [B, T, C] of dense attention and of decoding, along `tokens` [B, T].

    The first `prompt_tokens` are prefilled, the others decoded one by one, all sequences in step. Differentiable in
    both streams. `score` takes the place of eq. 4, for comparison. Blocks must not be cut by windows: `prompt_tokens`
    is a multiple of the block size, and of interval and block size one divides the other. Errors: ValueError for what
    does not fit, `dense_below` included.
    """
    check_decoding(model, tokens, config, prompt_tokens)
    n_tokens, f = tokens.shape[1], config.interval
    at = torch.arange(n_tokens, device=tokens.device)
    exact = exact_until(n_tokens, prompt_tokens, config).to(tokens.device)
    is_dense = at < prompt_tokens  # steps whose own attention is dense
    if f is not None and config.schedule == "fused":
        is_dense = is_dense | ((at - prompt_tokens) % f == f - 1)
    shape, x = model.config, model.embed(tokens)
    positions = at.expand_as(tokens)
    angle_dtype = accumulation_dtype(x.dtype)
    cos, sin = rotary_angles(positions, shape.head_dim, shape.rope_theta, angle_dtype, shape.rope_scaling)
    y = x
    kept: dict[str, Tensor] = {}

    def attend_exact(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kept["key"], kept["value"] = key, value
        return causal_attention(layer, query, key, value)

    def attend_decoded(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        taken = (at <= at[:, None]).expand(*key.shape[:2], -1, -1)  # [B, Hkv, T, T]
        if layer >= config.dense_layers:
            taken = taken & selected_tokens(query, kept["key"], key, exact, config, score)
        before = at < exact[:, None]  # [T, T]: keys of the exact stream
        mask = torch.cat((taken & before, taken & ~before), dim=-1)  # [B, Hkv, T, 2·T]
        groups = shape.n_head // shape.n_kv_head
        keys, values = torch.cat((kept["key"], key), dim=2), torch.cat((kept["value"], value), dim=2)
        keys, values, mask = (each.repeat_interleave(groups, dim=1) for each in (keys, values, mask))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    for index, layer in enumerate(model.layers):
        x = layer(x, cos, sin, index, attend_exact)
        y = torch.where(is_dense[:, None], x, layer(y, cos, sin, index, attend_decoded))
    return model.norm(x), model.norm(y)


@torch.no_grad()
def selected_tokens(
    query: Tensor,
    exact_key: Tensor,
    key: Tensor,
    exact: Tensor,
    config: ReSAConfig,
    score: Score = pooled_scores,
) -> Tensor:
    """Which tokens each step's blocks hold, its future ones included: [B, Hkv, T, T] bool (eq. 3–5).

    query [B, Hq, T, D], keys [B, Hkv, T, D] of both streams, exact [T]: where a step finds decoded keys instead. The
    block that holds a step's own token is selected whatever it scores, so that its bounds are those of whole blocks.
    """
    (batch, _, n_tokens, _), b = key.shape, config.block_size
    lengths = torch.full((batch,), n_tokens, dtype=torch.int32, device=key.device)
    wide = query.to(accumulation_dtype(query.dtype))
    with torch.autocast(key.device.type, enabled=False):  # half-precision products would tie what differs
        scores = [score(wide, block_bounds(each, lengths, b)) for each in (exact_key, key)]
    ends = (torch.arange(scores[0].shape[-1], device=key.device) + 1) * b
    joined = torch.where(ends <= exact[:, None], *scores)  # [B, Hkv, T, M]
    # Every step as a sequence of its own, as long as its cache is then.
    steps = joined.transpose(1, 2).flatten(0, 1)  # [B·T, Hkv, M]
    step_lengths = torch.arange(1, n_tokens + 1, dtype=torch.int32, device=key.device).repeat(batch)
    indices = select_blocks(steps, step_lengths, config).long()  # [B·T, Hkv, N]
    spare = steps.shape[-1]
    chosen = torch.zeros(*steps.shape[:2], spare + 1, dtype=torch.bool, device=key.device)
    chosen.scatter_(2, indices.masked_fill(indices < 0, spare), True)
    by_block = chosen[..., :spare].unflatten(0, (batch, n_tokens)).transpose(1, 2)
    return by_block.repeat_interleave(b, dim=-1)[..., :n_tokens]


def check_decoding(model: GPT, tokens: Tensor, config: ReSAConfig, prompt_tokens: int) -> None:
    """Refuse by name what can't be decoded at once."""
    sizes = bind_shapes(tokens=(tokens, "B T"))
    model.check_tokens(tokens)
    b, f = config.block_size, config.interval
    fits = is_integer(prompt_tokens, b) and prompt_tokens % b == 0 and prompt_tokens <= sizes["T"]
    require(fits, "prompt_tokens", prompt_tokens, f"a multiple of block_size = {b}, at most {sizes['T']}")
    nested = f is None or f % b == 0 or b % f == 0
    require(nested, "config.interval", f, f"a divisor or a multiple of block_size = {b}, or None")
    require(config.dense_below == 0, "config.dense_below", config.dense_below, "0: all sequences decode in step")
    require(sizes["T"] <= model.config.context, "tokens", sizes["T"], f"at most context = {model.config.context}")
