"""Rectified sparse attention in Triton: the operations of `resa.reference`, at the speed of memory.

The same files hold the same functions under the same names; `generate` decodes through CUDA graphs. The model is the
reference's own, which takes these operations as `GPT(config, ops=TRITON_OPS)`.
"""

if __name__ != "resa.fast":
    raise ImportError("the folder `fast` is the package `resa.fast`: run `make install`, then import that")

from resa.reference.model import Operations

from .attention import dense_attention, sparse_attention
from .blocks import block_bounds, score_blocks, select_blocks
from .cache import write_window
from .generate import generate, prefill

TRITON_OPS = Operations(block_bounds, score_blocks, select_blocks, sparse_attention, dense_attention)

__all__ = [
    "TRITON_OPS",
    "block_bounds",
    "dense_attention",
    "generate",
    "prefill",
    "score_blocks",
    "select_blocks",
    "sparse_attention",
    "write_window",
]
