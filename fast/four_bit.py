"""Weights in 4 bits, for the same model: signed integers with one scale per 128 of a row, multiplied as they are.

The products are those of the package `humming` (`pip install 'resa[four-bit]'`), which compiles them for the GPU on
first use. torch's own product of 4-bit weights takes about as long for 8 rows as 16-bit weights do, and its time grows
with the rows; these stay limited by memory, and serve the many rows of a rectification too (docs/performance.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resa.reference.checks import require

from .model import FusedGPT, Linear

GROUP = 128  # weights of one row that share a scale


class FourBitLinear(nn.Module):
    """A `Linear` whose weight is rounded to 4 bits: [..., in] → [..., out], float16 or bfloat16 as it was."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        from humming.layer import HummingLayer

        weight, bias = linear.weight, linear.bias
        rows, columns = weight.shape
        require(columns % GROUP == 0, "in", columns, f"a multiple of {GROUP}, weights per scale")
        self.product = HummingLayer(
            shape_n=rows,
            shape_k=columns,
            weight_config={"dtype": "int4", "group_size": GROUP},
            torch_dtype=weight.dtype,
            has_bias=bias is not None,
        ).to(weight.device)
        self.product.load_from_unquantized(weight)
        if bias is not None:
            self.product.load_from_tensors({"bias": bias})
        self.product.transform()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


@torch.no_grad()
def quantise(model: FusedGPT) -> None:
    """Round every matrix of the model to 4 bits, in place, one after the other; the embedding stays as it is."""
    for layer in model.fused:
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(layer, name, FourBitLinear(getattr(layer, name)))
    model.output = FourBitLinear(Linear.joining(model.output))
