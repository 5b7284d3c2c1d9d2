"""torch's own product of 4-bit weights, timed beside the one that `four_bit.py` uses; nothing decodes with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from resa.reference.checks import require

from ..four_bit import GROUP, OFFSET, widened
from .layer import distance

INNER_TILES = 8  # the widest of the layouts that torch's GPU kernel reads


class TorchFourBitLinear:
    """x [rows, in] → [rows, out] in bfloat16, for codes [out, in] and scales [out, in / 128] as in `four_bit.py`."""

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        stored = (codes + OFFSET).to(torch.int32)
        scale = scale.to(torch.bfloat16).T.contiguous()  # [in / 128, out]
        self.scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=2)  # (stored − 8) · scale + zero
        if codes.is_cuda:
            pairs = (stored[:, ::2] << 4 | stored[:, 1::2]).to(torch.uint8)
            self.packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
            self.multiply = torch.ops.aten._weight_int4pack_mm
        else:
            self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(stored, INNER_TILES)
            self.multiply = torch.ops.aten._weight_int4pack_mm_for_cpu

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.packed, GROUP, self.scale_and_zero)


class TorchLayer:
    """A layer's matrix products of sizes (out, in), with random weights; each is compared with the plain product."""

    def __init__(self, sizes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        self.products = {}
        for name, (rows, columns) in sizes.items():
            codes = torch.randint(-OFFSET, OFFSET, (rows, columns), dtype=torch.int8, device=device)
            scale = torch.rand(rows, columns // GROUP, device=device).bfloat16() + 0.5
            self.products[name] = TorchFourBitLinear(codes, scale)
            x = torch.randn(8, columns, device=device).bfloat16()
            error = distance(self.products[name](x), x @ widened(codes, scale).T)
            limit = 4 * torch.finfo(x.dtype).eps
            require(error <= limit, f"torch's {name}", f"error {error:.2g}", f"at most {limit:.2g} before it is timed")

    def __call__(self, inputs: Mapping[str, Tensor]) -> None:
        for name, product in self.products.items():
            product(inputs[name])
