"""Weights in 4 bits, for the same model: whole numbers −8 … 7 with one scale per 128 neighbours of a row.

What a weight is rounded to is decided here, in the open; the products are those of the library `humming`
(`pip install humming-kernels`), which compiles them for the GPU on first use and is fast for the few rows of
a step and for the 256 of a rectification alike. Where there is no GPU the rounded weights are multiplied as they are.
"""

from __future__ import annotations

import json
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from resa.reference.checks import require

from .model import FusedGPT, Linear

GROUP = 128  # neighbours in a row that share a scale
OFFSET = 8  # codes are stored as 0 … 15
TILE_ROWS = 128  # of the weight, in a tile of the library's
WIDE = 16_384  # rows of a weight, from which on shallow tiles, and more of them at once, are faster


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
            self.product = LibraryProduct(codes, scale, linear.bias)
        else:
            self.product = Linear(widened(codes, scale), linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():  # as of a prompt's part in which no prompt ends; the library knows no product of nothing
            return x.new_empty(*x.shape[:-1], self.rows)
        return self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class LibraryProduct:
    """The library's product of x [rows, in] with these weights: [rows, out]."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        try:
            from humming.layer import HummingLayer
        except ImportError:
            needed = "4-bit weights on a GPU need the package `humming-kernels`: pip install humming-kernels"
            raise ImportError(needed) from None
        self.rows, columns = codes.shape
        missing = -self.rows % TILE_ROWS  # rows of zeros, which the library's tiles need
        codes, scale = (F.pad(part, (0, 0, 0, missing)) for part in (codes, scale))
        self.layer = HummingLayer(
            shape_n=len(codes),
            shape_k=columns,
            weight_config={"dtype": "int4", "group_size": GROUP},
            torch_dtype=scale.dtype,
            has_bias=bias is not None,
        ).to(codes.device)
        place = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
        # Eight codes in 32 bits, the first in the lowest four.
        packed = ((codes.int() + OFFSET).unflatten(1, (-1, 8)) << place).sum(dim=2, dtype=torch.int32)
        given = {"weight": packed, "weight_scale": scale}
        self.layer.load_from_tensors(given if bias is None else given | {"bias": F.pad(bias, (0, missing))})
        self.layer.transform()

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x, tuning_config=tiles(len(x), self.rows))[:, : self.rows].contiguous()


@cache
def tiles(n_rows: int, width: int) -> str | None:
    """How the library shall tile a product of n_rows rows with a weight of `width` rows; None: as it would itself.

    What it would choose for the few rows of a decoding step reads at half the memory's speed; these are its tiles for
    longer rows of weights, started early (see launch.py: its kernels keep that rule). docs/log.md has the trials.
    """
    if n_rows > 16:
        return None
    few = 8 if n_rows <= 8 else 16
    depth, per_sm = (64, 4) if width >= WIDE else (128, 2)
    chosen = {"mma_type": "mma", "block_shape": [few, TILE_ROWS, depth], "warp_shape": [few, 64, 32]}
    chosen |= {"num_stages": 4, "num_ctas_per_sm": per_sm, "use_stream_k": True, "use_pdl": True}
    return json.dumps(chosen)


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
