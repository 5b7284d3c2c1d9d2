"""The five operations in Triton, and their public forms, which check their arguments.

The contract is the reference's (`resa.reference.operations`); `gpu/limits.py` adds what the kernels
cannot do. Two things have no counterpart there, so they are checked here: 8-bit bounds, and
`write_window`.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import Tensor

from resa.reference.checks import bind_shapes, check_lengths, require, require_integer
from resa.reference.operations import Operations, check_arguments, checked

from . import attention, blocks, cache
from .gpu.bounds8 import Bounds8
from .gpu.limits import check_kernel_dtypes, check_limits

TRITON_OPS = Operations(
    blocks.block_bounds,
    blocks.score_blocks,
    blocks.select_blocks,
    attention.sparse_attention,
    attention.dense_attention,
)

CHECKED_OPS = checked(TRITON_OPS, limits=check_limits)


@wraps(blocks.score_blocks)
def score_blocks(
    query: Tensor, bounds: Tensor | Bounds8, lengths: Tensor, block_size: int
) -> Tensor:
    if not isinstance(bounds, Bounds8):
        return CHECKED_OPS.score_blocks(query, bounds, lengths, block_size)

    # The contract knows floats alone, so it sees a tensor of the codes' shape in the query's dtype.
    codes, dtype = bounds.codes, getattr(query, "dtype", None)
    arguments = {"query": query, "lengths": lengths, "block_size": block_size}
    stand_in = torch.empty((), dtype=dtype, device=codes.device).expand(codes.shape)
    sizes = check_arguments("score_blocks", {**arguments, "bounds": stand_in})
    check_limits("score_blocks", {**arguments, "bounds": codes}, sizes)
    return blocks.score_blocks(query, bounds, lengths, block_size)


@wraps(cache.write_window)
def write_window(
    keys: Tensor, values: Tensor, bounds: Tensor | Bounds8, new_keys: Tensor, new_values: Tensor,
    start: Tensor, end: Tensor, block_size: int
) -> None:  # fmt: skip
    # Shapes and dtypes.
    table = bounds.codes if isinstance(bounds, Bounds8) else bounds
    new, cached = "B Hkv Q D", "B Hkv T_max D"
    sizes = bind_shapes(
        keys=(keys, cached), values=(values, cached), bounds=(table, "B Hkv 2 D M"),
        new_keys=(new_keys, new), new_values=(new_values, new), start=(start, "B"), end=(end, "B")
    )  # fmt: skip
    floats = {"keys": keys, "values": values, "new_keys": new_keys, "new_values": new_values}
    if table is bounds:
        check_kernel_dtypes(**floats, bounds=bounds)
    require_integer("block_size", block_size, 1)
    check_limits("write_window", {**floats, "bounds": table, "block_size": block_size}, sizes)

    # Numbers of blocks and tokens.
    n_blocks = -(-sizes["T_max"] // block_size)
    allowed = f"{n_blocks} for {sizes['T_max']} tokens"
    require(sizes["M"] == n_blocks, "bounds", f"{sizes['M']} blocks", allowed)
    check_lengths("start", start, sizes["T_max"])
    check_lengths("end", end, sizes["T_max"])
    check_lengths("end − start", end - start, sizes["Q"])
    cache.write_window(keys, values, bounds, new_keys, new_values, start, end, block_size)
