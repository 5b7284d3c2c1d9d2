"""A GPT whose attention is an argument: one transformer for training, dense passes and sparse steps.

`GPT` computes queries, keys and values, hands them to an `attend` function, and goes on with what comes back.
Three such functions exist: causal attention over the tokens themselves (training), a dense pass that writes a
window into the cache and attends to all of it (prefill and rectification), and a sparse step (eq. 2–5). The five
operations behind the last two are an explicit argument, so that a faster rendering of them replaces none of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import dense_attention, sparse_attention
from .blocks import block_bounds, score_blocks, select_blocks
from .cache import KVCache
from .checks import INTEGERS, accumulation_dtype, bind_shapes, check_dtypes, require
from .config import GPTConfig, ReSAConfig, RopeScaling

# attend(layer, query [B, Hq, Q, D], key [B, Hkv, Q, D], value [B, Hkv, Q, D]) -> [B, Hq, Q, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Operations:
    """The five operations that decoding is made of; their signatures are the contract of every port."""

    block_bounds: Callable[..., Tensor]
    score_blocks: Callable[..., Tensor]
    select_blocks: Callable[..., Tensor]
    sparse_attention: Callable[..., Tensor]
    dense_attention: Callable[..., Tensor]


REFERENCE_OPS = Operations(block_bounds, score_blocks, select_blocks, sparse_attention, dense_attention)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight over the last dimension, in float32 (float64 for float64 input)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(accumulation_dtype(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


def rotary_frequencies(
    size: int, theta: float, scaling: RopeScaling | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Radians per position of every pair of `size` channels, [D/2]: theta^(−2i/D), slowed down as `scaling` says."""
    # In this order, because trained models had their frequencies rounded so.
    plain = 1.0 / theta ** (torch.arange(0, size, 2, device=device, dtype=dtype) / size)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        kept = torch.zeros_like(plain)
    elif scaling.kind == "llama3":  # a ramp over the turns that a pair makes within the original context
        turns = scaling.original_context * plain / (2 * math.pi)
        kept = ((turns - scaling.slow) / (scaling.fast - scaling.slow)).clamp(0, 1)
    else:  # yarn: a ramp over pairs, between those that make `fast` and `slow` turns
        ends = [
            size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.fast, scaling.slow)
        ]
        first, last = (math.floor(ends[0]), math.ceil(ends[1])) if scaling.whole_pairs else ends
        first, last = max(first, 0), min(last, size - 1)
        pair = torch.arange(size // 2, device=device, dtype=dtype)
        kept = 1 - ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * kept + plain / scaling.factor * (1 - kept)


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angle per channel pair; positions [B, Q] → two [B, 1, Q, D/2]."""
    frequencies = rotary_frequencies(head_dim, theta, scaling, positions.device, dtype)
    angles = positions.to(dtype)[:, None, :, None] * frequencies
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return angles.cos() * amplitude, angles.sin() * amplitude


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i of the first half with channel i of the second by the position's angle; x [B, H, Q, D]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention without the attention itself, which the caller supplies."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size, kv_size = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, Q, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = apply_rotary(self.q_norm(query), cos, sin)
        key = apply_rotary(self.k_norm(key), cos, sin)  # cached after norm and RoPE
        out = attend(layer, query, key, value)  # [B, Hq, Q, D]
        return self.o_proj(out.transpose(1, 2).flatten(2))  # [B, Q, C]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, layer, attend)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The transformer of the specification; `ops` are the five operations its decoding runs on."""

    def __init__(self, config: GPTConfig, *, ops: Operations = REFERENCE_OPS) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tied_embeddings:
            self.output.weight = self.embed.weight

    def reset_parameters(self) -> None:
        """Normal weights; the two projections that add to the residual stream shrink with depth."""
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if is_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of dense causal attention over `tokens` [B, T] alone; no cache. Used for training."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.output(self.transform(tokens, positions, causal_attention))

    def with_ops(self, ops: Operations) -> GPT:
        """This very model, its weights shared, decoding with other operations."""
        twin = copy(self)
        twin.ops = ops
        return twin

    def new_cache(self, batch: int, capacity: int, block_size: int) -> KVCache:
        """An empty cache for this model, of its dtype and on its device."""
        weight = self.embed.weight
        return KVCache.empty(
            self.config, batch, capacity, block_size, self.ops.block_bounds, dtype=weight.dtype, device=weight.device
        )

    def dense_pass(self, tokens: Tensor, cache: KVCache, start: Tensor, counts: Tensor) -> Tensor:
        """Feed a window densely: write its keys and values, then attend to everything up to each token.

        Sequence s feeds `tokens[s, :counts[s]]` at positions start[s], start[s] + 1, …; what the cache held there
        is overwritten. tokens [B, Q], start and counts [B] → final hidden states [B, Q, C], of which the rows
        past counts[s] mean nothing. A sequence with count 0 and start at its length is left as it is.
        """
        sizes = self._check_pass(tokens, "B Q", cache, start=start, counts=counts)
        window = cache.open_window(start, counts, sizes["Q"])

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write(layer, key, value, window)
            keys, values = cache.keys[layer], cache.values[layer]
            return self.ops.dense_attention(query, keys, values, window.end, query_lengths=counts)

        positions = start[:, None] + torch.arange(sizes["Q"], device=tokens.device)
        hidden = self.transform(tokens, positions, attend)
        cache.commit(window)
        return hidden

    def sparse_pass(self, tokens: Tensor, cache: KVCache, active: Tensor, config: ReSAConfig) -> Tensor:
        """Feed one token per active sequence: append, select blocks, attend to those alone (eq. 2–5).

        tokens [B], active [B] bool → final hidden states [B, C]; rows of inactive sequences mean nothing. The first
        `config.dense_layers` layers attend to everything.
        """
        self._check_pass(tokens, "B", cache, active=active)
        require(config.block_size == cache.block_size, "config.block_size", config.block_size, f"{cache.block_size}")
        start, b = cache.lengths, config.block_size
        window = cache.open_window(start, active.to(start.dtype), 1)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.write(layer, key, value, window)
            if layer < config.dense_layers:
                counts = window.end - window.start
                keys, values = cache.keys[layer], cache.values[layer]
                return self.ops.dense_attention(query, keys, values, window.end, query_lengths=counts)
            step_query = query[:, :, 0]  # [B, Hq, D]
            scores = self.ops.score_blocks(step_query, cache.bounds[layer], window.end, b)
            indices = self.ops.select_blocks(scores, window.end, config)
            keys, values = cache.keys[layer], cache.values[layer]
            out = self.ops.sparse_attention(step_query, keys, values, indices, window.end, b)
            return out[:, :, None]  # [B, Hq, 1, D]

        hidden = self.transform(tokens[:, None], start[:, None], attend)
        cache.commit(window)
        return hidden[:, 0]

    def transform(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """The transformer up to its final norm, its attention supplied; tokens and positions [B, Q] → [B, Q, C]."""
        x = self.embed(tokens)
        config, dtype = self.config, accumulation_dtype(x.dtype)
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_theta, dtype, config.rope_scaling)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, index, attend)
        return self.norm(x)

    def _check_pass(self, tokens: Tensor, letters: str, cache: KVCache, **per_sequence: Tensor) -> dict[str, int]:
        others = {name: (tensor, "B") for name, tensor in per_sequence.items()}
        sizes = bind_shapes(cache=(cache.lengths, "B"), tokens=(tokens, letters), **others)
        self.check_tokens(tokens)
        return sizes

    def check_tokens(self, tokens: Tensor) -> None:
        """The tokens must be integers of the vocabulary."""
        check_dtypes(INTEGERS, tokens=tokens)
        if tokens.numel():
            low, high = (int(limit) for limit in tokens.aminmax())
            vocabulary = self.config.vocab_size
            require(low >= 0 and high < vocabulary, "tokens", f"{low} … {high}", f"0 … {vocabulary - 1}")


def causal_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of every token over itself and those before it, through torch's own fused kernel.

    query [B, Hq, T, D], key and value [B, Hkv, T, D] → [B, Hq, T, D]. On a GPU that kernel takes no groups in float32;
    asked for them, torch would keep every score instead, which is far more than the copies made here.
    """
    key, value = (for_query_heads(query, each) for each in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def for_query_heads(query: Tensor, per_kv_head: Tensor) -> Tensor:
    """Every KV head once for each query head of its group: [B, Hkv, …] → [B, Hq, …], Hq as in query [B, Hq, Q, D]."""
    return per_kv_head.repeat_interleave(query.shape[1] // per_kv_head.shape[1], dim=1)
