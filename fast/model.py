"""The five operations that decoding is made of, in Triton. The model that takes them is the reference's own."""

from __future__ import annotations

from resa.reference.model import Operations

from .attention import dense_attention, sparse_attention
from .blocks import block_bounds, score_blocks, select_blocks

TRITON_OPS = Operations(block_bounds, score_blocks, select_blocks, sparse_attention, dense_attention)
