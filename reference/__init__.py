"""Rectified sparse attention in pure PyTorch: the reference that ports and the Triton path are
checked against.

`README.md` in this folder says where to begin. Importing the package needs torch alone.
"""

if __name__ != "resa.reference":
    raise ImportError(
        "the folder `reference` is the package `resa.reference`: `make install`, then import that"
    )

from importlib import import_module
from typing import Any

from .blocks import active_blocks
from .cache import KVCache
from .config import GPTConfig, ReSAConfig
from .generate import Generation, decode_step, dense_pass, generate, prefill, rectify, sparse_step
from .model import GPT
from .operations import CHECKED_OPS, REFERENCE_OPS, Operations, checked
from .rope import RopeScaling
from .sampling import Sampling
from .speculate import speculate

# The public operations check their arguments; REFERENCE_OPS, inside a pass, do not.
block_bounds = CHECKED_OPS.block_bounds
score_blocks = CHECKED_OPS.score_blocks
select_blocks = CHECKED_OPS.select_blocks
sparse_attention = CHECKED_OPS.sparse_attention
dense_attention = CHECKED_OPS.dense_attention
sketch_keys = CHECKED_OPS.sketch_keys
score_sketch = CHECKED_OPS.score_sketch

# Loaders need more packages than torch, so they are imported when they are first used.
_LOADERS = {
    "load_model": "weights.checkpoint",
    "save_model": "weights.checkpoint",
    "load_pretrained": "weights.pretrained",
    "load_tokenizer": "weights.tokenizer",
    "open_model": "weights.models",
}

__all__ = [
    "GPT",
    "REFERENCE_OPS",
    "GPTConfig",
    "Generation",
    "KVCache",
    "Operations",
    "ReSAConfig",
    "RopeScaling",
    "Sampling",
    "active_blocks",
    "block_bounds",
    "checked",
    "decode_step",
    "dense_attention",
    "dense_pass",
    "generate",
    "load_model",
    "load_pretrained",
    "load_tokenizer",
    "open_model",
    "prefill",
    "rectify",
    "save_model",
    "score_blocks",
    "score_sketch",
    "select_blocks",
    "sketch_keys",
    "sparse_attention",
    "sparse_step",
    "speculate",
]


def __getattr__(name: str) -> Any:
    """Import a loader when it is asked for."""
    if name not in _LOADERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LOADERS[name]}", __name__), name)
