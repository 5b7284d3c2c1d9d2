"""Weights in 4 bits, for the same model: whole numbers −8 … 7 with one scale per 128 neighbours of a row.

What a weight is rounded to is decided here, in the open; the products are those of the library `humming`
(`pip install 'resa[four-bit]'`), which compiles them for the GPU on first use and stays limited by memory from one row
to the 256 of a rectification. Where there is no GPU the rounded weights are multiplied as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resa.reference.checks import require

from .model import FusedGPT, Linear

GROUP = 128  # neighbours in a row that share a scale
OFFSET = 8  # codes are stored as 0 … 15


def round_to_four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes −8 … 7 and their scales, weight ≈ code · scale: weight [out, in] → [out, in] int8, [out, in / 128].

    A group's scale gives the number furthest from zero the code −8, whatever its sign, so that all sixteen codes are
    within reach; it has the weight's dtype. Raises `ValueError` where `in` is no multiple of 128.
    """
    columns = weight.shape[1]
    require(columns % GROUP == 0, "in", columns, f"a multiple of {GROUP}, weights per scale")
    groups = weight.float().unflatten(1, (-1, GROUP))  # [out, in / 128, 128]
    furthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = (furthest / -8).to(weight.dtype)
    step = torch.where(scale == 0, 1, scale).float()  # a group of zeros has the scale 0
    codes = (groups / step).round().clamp(-8, 7).to(torch.int8)
    return codes.flatten(1), scale.flatten(1)


def widened(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes [out, in] and scales [out, in / 128] stand for: [out, in], in the scales' dtype."""
    return (codes.unflatten(1, (-1, GROUP)).float() * scale[..., None].float()).to(scale.dtype).flatten(1)


class FourBitLinear:
    """A `Linear` whose weight is rounded to 4 bits: x [..., in] → [..., out], in float16 or bfloat16 as it was."""

    def __init__(self, linear: Linear) -> None:
        weight = linear.weight
        is_half = not weight.is_cuda or weight.dtype in (torch.float16, torch.bfloat16)
        require(is_half, "weight", weight.dtype, "float16 or bfloat16")
        codes, scale = round_to_four_bits(weight)
        self.rows = len(codes)
        self.nbytes = codes.numel() // 2 + scale.nbytes  # read by every product
        if codes.is_cuda:
            self.product = _library_product(codes, scale, linear.bias)
        else:
            self.product = Linear(widened(codes, scale), linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():  # as of a prompt's part in which no prompt ends; the library knows no product of nothing
            return x.new_empty(*x.shape[:-1], self.rows)
        return self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _library_product(codes: Tensor, scale: Tensor, bias: Tensor | None) -> torch.nn.Module:
    """The library's product of x [rows, in] with these weights, [rows, out]."""
    try:
        from humming.layer import HummingLayer
    except ImportError:
        needed = "4-bit weights on a GPU need the package `humming-kernels`: pip install 'resa[four-bit]'"
        raise ImportError(needed) from None
    rows, columns = codes.shape
    layer = HummingLayer(
        shape_n=rows,
        shape_k=columns,
        weight_config={"dtype": "int4", "group_size": GROUP},
        torch_dtype=scale.dtype,
        has_bias=bias is not None,
    ).to(codes.device)
    place = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    # Eight codes in 32 bits, the first in the lowest four.
    packed = ((codes.int() + OFFSET).unflatten(1, (-1, 8)) << place).sum(dim=2, dtype=torch.int32)
    given = {"weight": packed, "weight_scale": scale} | ({} if bias is None else {"bias": bias})
    layer.load_from_tensors(given)
    layer.transform()
    return layer


@torch.no_grad()
def quantise(model: FusedGPT) -> FusedGPT:
    """Round every matrix of the model to 4 bits, in place, one after the other; the embedding stays as it is.

    What the model was built from keeps its own weights: drop it, or nothing is saved. Raises `ValueError` for a model
    that is rounded already, or in another dtype on a GPU than float16 or bfloat16.
    """
    require(isinstance(model.output, Linear), "model", "one in 4 bits", "one that is not rounded yet")
    for layer in model.fused:
        for name, product in layer.products().items():
            setattr(layer, name, FourBitLinear(product))
    model.output = FourBitLinear(model.output)
    return model
