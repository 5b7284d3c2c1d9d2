"""The reference's model on the GPU: its weights and its mathematics, with fewer and larger kernels.

`FusedGPT` is `GPT` for decoding alone. Projections that read the same input are one matrix product,
and the work between two products is one kernel (gpu/elementwise.py). Attention is an argument, as
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resa.reference.checks import refuse
from resa.reference.model import GPT, Attend, Layer, RMSNorm
from resa.reference.rope import rotary_frequencies

from .gpu.elementwise import add_norm, split_heads, swiglu
from .operations import TRITON_OPS


def accelerated(model: GPT) -> GPT:
    """This model for the kernels, its weights shared. A subclass of `GPT` keeps its own layers."""
    return FusedGPT(model) if type(model) is GPT else model.with_ops(TRITON_OPS)


@dataclass(frozen=True)
class Linear:
    """x·weightᵀ + bias for several projections of one input, their outputs side by side."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]

    @classmethod
    def fused(cls, *layers: nn.Linear) -> Linear:
        """The layers as one, whose weights become views of one matrix: nothing is held twice."""
        bias = None if layers[0].bias is None else _fuse([layer.bias for layer in layers])
        return cls(_fuse([layer.weight for layer in layers]), bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, which every product reads."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass
class FusedLayer:
    """One layer: four matrix products, [..., in] → [..., out], and the weights of its norms."""

    attn_norm: Tensor
    mlp_norm: Tensor
    head_norms: tuple[Tensor | None, Tensor | None]  # of queries and keys
    qkv: Callable[[Tensor], Tensor]
    o: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    def matmuls(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The four matrix products by name, in the order in which they are taken."""
        return {name: getattr(self, name) for name in ("qkv", "o", "gate_up", "down")}

    @classmethod
    def of(cls, layer: Layer) -> FusedLayer:
        """The fused form of one of the reference's layers."""
        attn, mlp, norms = layer.attn, layer.mlp, (layer.attn.q_norm, layer.attn.k_norm)
        return cls(
            attn_norm=layer.attn_norm.weight,
            mlp_norm=layer.mlp_norm.weight,
            head_norms=tuple(x.weight if isinstance(x, RMSNorm) else None for x in norms),
            qkv=Linear.fused(attn.q_proj, attn.k_proj, attn.v_proj),
            o=Linear.fused(attn.o_proj),
            gate_up=Linear.fused(mlp.gate_proj, mlp.up_proj),
            down=Linear.fused(mlp.down_proj),
        )


class FusedGPT(GPT):
    """A `GPT` for decoding, built from one. It shares its weights and computes the same."""

    def __init__(self, model: GPT) -> None:
        nn.Module.__init__(self)  # no weights of its own
        self.config, self.ops = model.config, TRITON_OPS
        self.embed, self.norm, self.output = model.embed, model.norm, Linear.fused(model.output)
        self.fused = [FusedLayer.of(layer) for layer in model.layers]
        config, device = model.config, model.embed.weight.device
        self.frequencies = rotary_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, device, torch.float32
        )

    def _apply(self, *_: object, **__: object) -> FusedGPT:
        allowed = "one of the model that it is built from, before that"
        refuse("FusedGPT", "a move or a cast", allowed)

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [B, Q, C], as `GPT.hidden_states` computes them."""
        config = self.config
        heads, eps = (config.n_head, config.n_kv_head), config.norm_eps
        angles = positions[:, None, :, None] * self.frequencies  # [B, 1, Q, D/2]
        cos, sin = angles.cos(), angles.sin()
        if config.rope_scaling is not None:
            cos, sin = cos * config.rope_scaling.amplitude, sin * config.rope_scaling.amplitude

        # Each residual waits in `delta` until the next norm, whose kernel adds it.
        x, delta = self.embed(tokens), None
        for index, layer in enumerate(self.fused):
            projected = layer.qkv(add_norm(x, delta, layer.attn_norm, eps))
            query, key, value = split_heads(projected, cos, sin, *heads, *layer.head_norms, eps)
            out = attend(index, query, key, value)  # [B, Hq, Q, D]
            delta = layer.o(out.transpose(1, 2).flatten(2))  # [B, Q, C]
            gate_up = layer.gate_up(add_norm(x, delta, layer.mlp_norm, eps))
            delta = layer.down(swiglu(gate_up))
        return add_norm(x, delta, self.norm.weight, eps)


def _fuse(parts: Sequence[nn.Parameter]) -> Tensor:
    """The parameters [n_i, …] as one tensor [Σ n_i, …], which they share from then on.

    Parameters that lie one after the other already stay where they are.
    """
    first, rows = parts[0].detach(), sum(len(part) for part in parts)
    place, is_fused = first.data_ptr(), first.is_contiguous()
    for part in parts:
        is_fused &= part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        is_fused &= part.is_contiguous() and part.data_ptr() == place
        place += part.nbytes
    if is_fused:
        return first.as_strided((rows, *first.shape[1:]), first.stride())

    whole = torch.cat([part.detach() for part in parts])
    for part, own in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = own
    return whole
