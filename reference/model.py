"""A GPT whose attention is an argument: one transformer to train, to prefill and to decode with.

`GPT.hidden_states` computes each layer's queries, keys and values, hands them to an `attend`
function, and goes on with what comes back. `causal_attention` below is the one for training. Those
for decoding stand inside `dense_pass` and `sparse_step`; they use the operations `model.ops`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import KVCache
from .checks import accumulation_dtype
from .config import GPTConfig
from .operations import REFERENCE_OPS, Operations
from .rope import apply_rotary, rotary_angles

# attend(layer, query [B, Hq, Q, D], key [B, Hkv, Q, D], value [B, Hkv, Q, D]) → [B, Hq, Q, D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight over the last dimension, in float32 or float64."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Sums of squares need more than 16 bits.
        wide = x.to(accumulation_dtype(x.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    """The projections of grouped-query attention, without the attention itself."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(config.head_dim, config.norm_eps)
        self.k_norm = norm(config.head_dim, config.norm_eps)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, Q, C] → query [B, Hq, Q, D], key and value [B, Hkv, Q, D]."""
        # Project and split into heads.
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, Q, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )

        # Norm, then RoPE. Keys are cached rotated, so they must be fed at their own positions.
        query = apply_rotary(self.q_norm(query), cos, sin)
        key = apply_rotary(self.k_norm(key), cos, sin)
        return query, key, value

    def project(self, out: Tensor) -> Tensor:
        """Attention's output [B, Hq, Q, D] → hidden states [B, Q, C]."""
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # The gate decides how much of each channel passes.
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """The parts of one pre-norm layer; `GPT.hidden_states` puts them together."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)


class GPT(nn.Module):
    """The transformer of the specification; its decoding runs on the operations `ops`."""

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
        """Draw normal weights; projections into the residual stream shrink with depth."""
        residual_std = 0.02 / (2 * self.config.n_layer) ** 0.5
        for name, parameter in self.named_parameters():
            # Norms keep their ones.
            if parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if is_residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of plain causal attention over tokens [B, T], for training."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.output(self.hidden_states(tokens, positions, causal_attention))

    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [B, Q, C] of tokens at positions [B, Q], through `attend`."""
        x, config = self.embed(tokens), self.config
        rotation = config.head_dim, config.rope_theta, config.rope_scaling
        cos, sin = rotary_angles(positions, *rotation, accumulation_dtype(x.dtype))
        # Each layer adds attention, then the MLP, to the residual stream.
        for index, layer in enumerate(self.layers):
            query, key, value = layer.attn.heads(layer.attn_norm(x), cos, sin)
            x = x + layer.attn.project(attend(index, query, key, value))
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.norm(x)

    def with_ops(self, ops: Operations) -> GPT:
        """This very model, its weights shared, decoding with other operations."""
        twin = copy(self)
        twin.ops = ops
        return twin

    def new_cache(self, capacity: int, block_size: int, sketch_bits: int | None = None) -> KVCache:
        """An empty cache of this model's dtype and on its device."""
        place = {"dtype": self.embed.weight.dtype, "device": self.embed.weight.device}
        return KVCache.empty(self.config, capacity, block_size, sketch_bits, **place)


def causal_attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend to the token itself and all before it: the `Attend` of training, by torch's kernel."""
    # On a GPU torch stores all T × T scores of grouped float32 heads. Copying KV heads takes less.
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)
