"""The operations in Triton, and their public forms, which check their arguments.

The contract is the reference's (`resa.reference.operations`); `gpu/limits.py` adds what the kernels
cannot do. 8-bit bounds have no counterpart there, so they are checked here. The unchecked
operations never wait for the device, so a CUDA graph can capture them. Their conversions do nothing
where a tensor has the right dtype and layout already. They alone take page tables (`pages.py`).
"""

from functools import wraps

import torch
from torch import Tensor

from resa.reference.operations import Operations, check_arguments, checked

from . import attention, blocks, estimate, sketch
from .gpu.bounds8 import Bounds8
from .gpu.limits import check_limits

TRITON_OPS = Operations(
    blocks.block_bounds,
    blocks.score_blocks,
    blocks.select_blocks,
    attention.sparse_attention,
    attention.dense_attention,
    sketch.sketch_keys,
    estimate.score_sketch,
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
