"""Weights in 4 bits, for the fused model: integers −8 … 7 with one scale per 128 neighbours of a
row.

The rounding is decided here, in the open. The products are those of the library `humming`
(`pip install humming-kernels`), which compiles them for the GPU on first use and is fast for the
few rows of a step and for the 256 of a rectification. Without a GPU the rounded weights are
multiplied as they are.
"""

import json
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from resa.reference.checks import require

from ..model import FusedGPT, Linear

GROUP = 128  # neighbours in a row that share a scale
OFFSET = 8  # codes are stored as 0 … 15
TILE_ROWS = 128  # of the weight, in one of the library's tiles
WIDE = 16_384  # rows of a weight, from which on shallow tiles, and more of them at once, are faster


def round_to_four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes −8 … 7 and their scales, weight ≈ code · scale.

    weight [out, in] → [out, in] int8, [out, in / 128] in the weight's dtype. A group's scale gives
    the number furthest from zero the code −8, whatever its sign, so that all sixteen codes are
    within reach.
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
    """The weights [out, in] that codes [out, in] and scales [out, in / 128] stand for."""
    wide = codes.unflatten(1, (-1, GROUP)).float() * scale[..., None].float()
    return wide.to(scale.dtype).flatten(1)


class FourBitLinear:
    """A `Linear` whose weight is rounded to 4 bits: x [..., in] → [..., out], its dtype kept."""

    def __init__(self, linear: Linear) -> None:
        codes, scale = round_to_four_bits(linear.weight)
        self.nbytes = codes.numel() // 2 + scale.nbytes  # read by every product
        if codes.is_cuda:
            self.matmul = LibraryMatmul(codes, scale, linear.bias)
        else:
            self.matmul = Linear(widened(codes, scale), linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self.matmul(x)


class LibraryMatmul:
    """The library's product with 4-bit weights: x [..., in] → [..., out], of one row or more."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        from humming.layer import HummingLayer  # pip install humming-kernels

        # Pad to whole tiles with rows of zeros.
        self.rows, columns = codes.shape
        missing = -self.rows % TILE_ROWS
        codes, scale = (F.pad(part, (0, 0, 0, missing)) for part in (codes, scale))
        self.layer = HummingLayer(
            shape_n=len(codes),
            shape_k=columns,
            weight_config={"dtype": "int4", "group_size": GROUP},
            torch_dtype=scale.dtype,
            has_bias=bias is not None,
        ).to(codes.device)

        # Eight codes go into 32 bits, the first into the lowest four.
        place = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
        eights = (codes.int() + OFFSET).unflatten(1, (-1, 8)) << place
        tensors = {"weight": eights.sum(dim=2, dtype=torch.int32), "weight_scale": scale}
        if bias is not None:
            tensors["bias"] = F.pad(bias, (0, missing))
        self.layer.load_from_tensors(tensors)
        self.layer.transform()

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = self.layer(rows, tuning_config=tiles(len(rows), self.rows))[:, : self.rows]
        return out.contiguous().unflatten(0, x.shape[:-1])


@cache
def tiles(n_rows: int, width: int) -> str | None:
    """The library's tiles for n_rows rows times a weight of `width` rows; None: its own choice.

    For the few rows of a decoding step its choice reads at half the memory's speed. These are its
    tiles for longer rows of weights, started early (its kernels keep the rule of gpu/launch.py).
    docs/log.md has the trials.
    """
    if n_rows > 16:
        return None
    few = 8 if n_rows <= 8 else 16
    depth, per_sm = (64, 4) if width >= WIDE else (128, 2)
    chosen = {
        "mma_type": "mma",
        "block_shape": [few, TILE_ROWS, depth],
        "warp_shape": [few, 64, 32],
    }
    chosen |= {"num_stages": 4, "num_ctas_per_sm": per_sm, "use_stream_k": True, "use_pdl": True}
    return json.dumps(chosen)


@torch.no_grad()
def quantise(model: FusedGPT) -> FusedGPT:
    """Round every matrix of the model to 4 bits, in place; the embedding stays as it is.

    The model that it was built from keeps its own weights: drop it, or nothing is saved.
    """
    for layer in model.fused:
        for name, matmul in layer.matmuls().items():
            setattr(layer, name, FourBitLinear(matmul))
    model.output = FourBitLinear(model.output)
    return model
