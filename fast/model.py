"""The reference's model on the GPU: its weights and its mathematics, with fewer and larger kernels.

`FusedGPT` is the transformer of `resa.reference.model` once more, for decoding alone: projections that read the same
input are one matrix product, and what lies between two products is one kernel (elementwise.py). The attention is still
an argument, and the five operations are those in Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resa.reference.checks import refuse
from resa.reference.model import GPT, Attend, Layer, Operations, RMSNorm, rotary_frequencies

from .attention import dense_attention, sparse_attention
from .blocks import block_bounds, score_blocks, select_blocks
from .elementwise import add_norm, split_heads, swiglu

TRITON_OPS = Operations(block_bounds, score_blocks, select_blocks, sparse_attention, dense_attention)


def accelerated(model: GPT) -> GPT:
    """The same model, its weights shared, for the kernels; one whose transformer is not `GPT`'s own keeps it."""
    return FusedGPT(model) if type(model) is GPT else model.with_ops(TRITON_OPS)


@dataclass(frozen=True)
class Linear:
    """x·weightᵀ + bias, for several projections of one input at once: their outputs, one after the other."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]

    @classmethod
    def joining(cls, *layers: nn.Linear) -> Linear:
        """The layers' weights become views of one matrix, so that nothing is held twice."""
        bias = None if layers[0].bias is None else _join([layer.bias for layer in layers])
        return cls(_join([layer.weight for layer in layers]), bias)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, which every product reads."""
        return self.weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass
class FusedLayer:
    """One layer: four matrix products, [..., in] → [..., out] each, and the weights of its norms."""

    attn_norm: Tensor
    mlp_norm: Tensor
    head_norms: tuple[Tensor | None, Tensor | None]  # of queries and keys
    qkv: Callable[[Tensor], Tensor]
    o: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]

    def products(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The four matrix products by name, in the order in which they are taken."""
        return {name: getattr(self, name) for name in ("qkv", "o", "gate_up", "down")}

    @classmethod
    def of(cls, layer: Layer) -> FusedLayer:
        """The same layer."""
        attn, mlp = layer.attn, layer.mlp
        norms = [norm.weight if isinstance(norm, RMSNorm) else None for norm in (attn.q_norm, attn.k_norm)]
        return cls(
            layer.attn_norm.weight,
            layer.mlp_norm.weight,
            tuple(norms),
            qkv=Linear.joining(attn.q_proj, attn.k_proj, attn.v_proj),
            o=Linear.joining(attn.o_proj),
            gate_up=Linear.joining(mlp.gate_proj, mlp.up_proj),
            down=Linear.joining(mlp.down_proj),
        )


class FusedGPT(GPT):
    """A `GPT` for decoding: built from one, sharing its weights, and computing what it does."""

    def __init__(self, model: GPT) -> None:
        nn.Module.__init__(self)  # no weights of its own
        self.config, self.ops = model.config, TRITON_OPS
        self.embed, self.norm, self.output = model.embed, model.norm, Linear.joining(model.output)
        self.fused = [FusedLayer.of(layer) for layer in model.layers]
        config, device = model.config, model.embed.weight.device
        self.frequencies = rotary_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling, device, torch.float32
        )

    def _apply(self, *_: object, **__: object) -> FusedGPT:
        refuse("FusedGPT", "a move or a cast", "one of the model that it is built from, before that")

    @torch.no_grad()
    def transform(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """As `GPT.transform`."""
        config = self.config
        shape, eps = (config.n_head, config.n_kv_head), config.norm_eps
        angles = positions[:, None, :, None] * self.frequencies  # [B, 1, Q, D/2]
        cos, sin = angles.cos(), angles.sin()
        if config.rope_scaling is not None:
            cos, sin = cos * config.rope_scaling.amplitude, sin * config.rope_scaling.amplitude
        x, delta = self.embed(tokens), None
        for index, layer in enumerate(self.fused):
            projected = layer.qkv(add_norm(x, delta, layer.attn_norm, eps))
            out = attend(index, *split_heads(projected, cos, sin, *shape, *layer.head_norms, eps))  # [B, Hq, Q, D]
            delta = layer.o(out.transpose(1, 2).flatten(2))  # [B, Q, C]
            gate_up = layer.gate_up(add_norm(x, delta, layer.mlp_norm, eps))
            delta = layer.down(swiglu(gate_up))
        return add_norm(x, delta, self.norm.weight, eps)


def _join(parts: Sequence[nn.Parameter]) -> Tensor:
    """The parameters [n_i, …] as one tensor [Σ n_i, …], which they share from then on; found joined, they stay."""
    first, rows = parts[0].detach(), sum(len(part) for part in parts)
    place, is_joined = first.data_ptr(), first.is_contiguous()
    for part in parts:
        is_joined &= part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        is_joined &= part.is_contiguous() and part.data_ptr() == place
        place += part.nbytes
    if is_joined:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, own in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = own
    return whole
