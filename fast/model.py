"""The reference's model on the GPU: its weights and its mathematics, with fewer and larger kernels.

`FusedGPT` is `GPT` for decoding alone. Projections that read the same input are one matrix product,
and the work between two products is one kernel (gpu/elementwise.py). Attention is an argument, as
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resa.reference.checks import refuse, require
from resa.reference.model import GPT, Attend, Layer, RMSNorm
from resa.reference.rope import rotary_frequencies
from resa.reference.weights.checkpoint import hollow_model

from .gpu.elementwise import add_norm, split_heads, swiglu
from .operations import TRITON_OPS


def accelerated(model: GPT) -> GPT:
    """This model for the kernels; it stays as it is. A subclass of `GPT` keeps its own layers."""
    return FusedGPT(model) if type(model) is GPT else model.with_ops(TRITON_OPS)


def check_plain(model: GPT) -> None:
    """Refuse a model of which the fused layers would ignore something.

    They read weights and call no module. So adapters, hooks, wrapped, subclassed or parametrised
    projections, and tensors that are more than numbers are refused by name.
    """
    if type(model) is not GPT:  # keeps its own layers
        return
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    allowed = "none (resa.reference calls every module)"
    require(not any(hooks), "model", "a hook on all modules", allowed)
    example = hollow_model(replace(model.config, n_layer=1)).to(model.embed.weight.dtype)
    example.layers = nn.ModuleList([example.layers[0]] * model.config.n_layer)
    _check_module("model", model, example)


def _check_module(name: str, module: nn.Module, example: nn.Module) -> None:
    """Refuse a module that is not like `example` in all but its numbers, and so for its parts."""
    allowed = f"a plain {type(example).__name__} (resa.reference decodes any model)"
    require(type(module) is type(example), name, type(module).__name__, allowed)
    is_hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    require(not is_hooked, name, "a forward hook", allowed)

    # Methods of the class, settings of the configuration, parameters of one type and shape.
    for field in vars(module).keys() - vars(example).keys() - {"_compiled_call_impl"}:
        if hasattr(type(module), field):
            refuse(f"{name}.{field}", "a method of its own", allowed)
    for field, wanted in vars(example).items():
        is_setting = isinstance(wanted, (int, float, type(None))) and field != "training"
        if is_setting and getattr(module, field) != wanted:
            refuse(f"{name}.{field}", getattr(module, field), str(wanted))
    for field, wanted in example._parameters.items():
        given, allowed = _description(module._parameters.get(field)), _description(wanted)
        require(given == allowed, f"{name}.{field}", given, allowed)
    for field in module._modules.keys() - example._modules.keys():
        refuse(f"{name}.{field}", "a part that is not called", "the configuration's parts")
    for field, part in example._modules.items():
        _check_module(f"{name}.{field}", getattr(module, field), part)


def _description(parameter: Tensor | None) -> str:
    """Say what a parameter is: type, dtype and shape."""
    if parameter is None:
        return "None"
    return f"{type(parameter).__name__} {list(parameter.shape)} {parameter.dtype}"


@dataclass(frozen=True)
class Linear:
    """x·weightᵀ + bias for several projections of one input, their outputs side by side."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]

    @classmethod
    def fused(cls, *layers: nn.Linear) -> Linear:
        """The layers as one. Weights that lie one after the other are read where they are."""
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
            attn_norm=layer.attn_norm.weight.contiguous(),
            mlp_norm=layer.mlp_norm.weight.contiguous(),
            head_norms=tuple(
                x.weight.contiguous() if isinstance(x, RMSNorm) else None for x in norms
            ),
            qkv=Linear.fused(attn.q_proj, attn.k_proj, attn.v_proj),
            o=Linear.fused(attn.o_proj),
            gate_up=Linear.fused(mlp.gate_proj, mlp.up_proj),
            down=Linear.fused(mlp.down_proj),
        )


class FusedGPT(GPT):
    """A `GPT` for decoding, built from one, which stays as it is. It computes the same.

    Weights that lie one after the other are shared, as those of loaded models do; others that are
    fused are copied.
    """

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
        return add_norm(x, delta, self.norm.weight.contiguous(), eps)


def _fuse(parts: Sequence[nn.Parameter]) -> Tensor:
    """The parameters [n_i, …] as one tensor [Σ n_i, …]: a view if they lie one after the other."""
    first, rows = parts[0].detach(), sum(len(part) for part in parts)
    place, is_fused = first.data_ptr(), first.is_contiguous()
    for part in parts:
        is_fused &= part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        is_fused &= part.is_contiguous() and part.data_ptr() == place
        place += part.nbytes
    if is_fused:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    return torch.cat([part.detach() for part in parts])
