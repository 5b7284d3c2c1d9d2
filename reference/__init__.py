"""Rectified sparse attention in pure PyTorch: the reference that ports and the Triton path are checked against.

Read it in the order in which data flows:
`config → cache → blocks → attention → model → sampling → speculate → generate`.
"""

if __name__ != "resa.reference":
    raise ImportError("the folder `reference` is the package `resa.reference`: run `make install`, then import that")

from .attention import dense_attention, sparse_attention
from .blocks import active_blocks, block_bounds, score_blocks, select_blocks
from .cache import KVCache
from .checkpoint import load_model, save_model
from .config import GPTConfig, ReSAConfig, RopeScaling
from .generate import Generation, decode_along, decode_step, generate, prefill, rectify, sparse_step
from .model import GPT, REFERENCE_OPS, Operations
from .pretrained import load_pretrained
from .sampling import sample_token
from .tokenizer import load_tokenizer

__all__ = [
    "GPT",
    "REFERENCE_OPS",
    "GPTConfig",
    "Generation",
    "KVCache",
    "Operations",
    "ReSAConfig",
    "RopeScaling",
    "active_blocks",
    "block_bounds",
    "decode_along",
    "decode_step",
    "dense_attention",
    "generate",
    "load_model",
    "load_pretrained",
    "load_tokenizer",
    "prefill",
    "rectify",
    "sample_token",
    "save_model",
    "score_blocks",
    "select_blocks",
    "sparse_attention",
    "sparse_step",
]
